"""The requests that `mmctr serve` takes and the answers it gives, with their bounds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

MAX_BODY, MAX_PICTURE = 1_000_000, 16_000_000
"""bytes of a JSON body, and of an upload"""
MAX_K, MAX_ITEMS = 1000, 5000
Id = StrictInt | StrictStr


Text = Annotated[str, Field(min_length=1, max_length=2000)]


K = Annotated[int, Field(ge=1, le=MAX_K)]


RankerName = Literal["ranker", "baseline"]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class QueryPart(Body):
    """One of an item, a text, a picture (base64) or a user, and its weight in the mix."""

    item_id: Id | None = None
    text: Text | None = None
    image: str | None = Field(default=None, max_length=MAX_BODY, description="base64 of a JPEG, PNG, WebP or GIF")
    user_id: Id | None = None
    weight: float = Field(default=1.0, ge=-100, le=100, allow_inf_nan=False)


class SearchRequest(Body):
    parts: list[QueryPart] = Field(min_length=1, max_length=16)
    k: K = 10
    where: list[Text] = Field(default=[], max_length=16, description="conditions like colour=red or price<20")


class EmbedRequest(Body):
    texts: list[Text] = Field(min_length=1, max_length=256)


class Moment(Body):
    """For whom, and as of when."""

    user_id: Id | None = Field(default=None, description="null: somebody who is not in the log")
    history: list[Id] | None = Field(
        default=None, max_length=1000, description="items clicked, oldest first, instead of those in the log"
    )
    at: int | None = Field(default=None, description="a time as in the log: what was clicked before it counts")
    context: dict[str, Any] = Field(default={}, description="values of context columns")
    ranker: RankerName = "ranker"


class ScoreRequest(Moment):
    items: list[Id] = Field(min_length=1, max_length=MAX_ITEMS)


class RankRequest(Moment):
    candidates: int = Field(default=200, ge=1, le=MAX_ITEMS, description="items taken from the index by the history")
    k: K = 10
    among: Literal["all", "cold", "warm"] = Field(default="all", description="cold items were in no training row")


class ExplainRequest(Moment):
    item_id: Id


class Found(BaseModel):
    item_id: int | str
    score: float
    title: str | None = None


class Scored(Found):
    cold: bool
    """no training row held it"""


class Answer(BaseModel):
    items: list[Found]


class Ranking(BaseModel):
    items: list[Scored]
    history_length: int


class Vectors(BaseModel):
    vectors: list[list[float]]


class Reason(BaseModel):
    item_id: int | str
    title: str | None
    effect: float
    """log-odds of a click with the whole history minus those without this item"""
    weight: float | None
    """of attention, for rankers that have it"""


class Explanation(BaseModel):
    score: float
    history: list[Reason]
