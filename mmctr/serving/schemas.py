"""The requests and answers of the HTTP API of `mmctr serve`, with the allowed ranges of all values."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, StrictInt, StrictStr

MAX_BODY, MAX_PICTURE = 1_000_000, 16_000_000
"""largest number of bytes of a JSON body, and of an upload"""
MAX_K, MAX_ITEMS = 1000, 5000
"""largest number of results, and of items to score"""
Id = StrictInt | StrictStr
"""a raw id of a request; an integer may be written as text"""
EXACT = 2**53 - 1
"""largest integer that JavaScript, and any reader of JSON that knows floats alone, reads exactly"""


def written_id(raw_id: int | str) -> int | str:
    """An id as JSON carries it: an integer beyond 2^53 as text, since readers would round the number."""
    return str(raw_id) if isinstance(raw_id, int) and abs(raw_id) > EXACT else raw_id


WrittenId = Annotated[int | str, PlainSerializer(written_id)]
"""a raw id of an answer"""

Text = Annotated[str, Field(min_length=1, max_length=2000)]


K = Annotated[int, Field(ge=1, le=MAX_K)]


RankerName = Literal["ranker", "baseline"]


class Body(BaseModel):
    """Base class of requests: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


class QueryPart(Body):
    """A part of a query: an item, a text, a picture (base64) or a user, with a weight."""

    item_id: Id | None = None
    text: Text | None = None
    image: str | None = Field(default=None, max_length=MAX_BODY, description="base64 of a JPEG, PNG, WebP or GIF")
    user_id: Id | None = None
    weight: float = Field(default=1.0, ge=-100, le=100, allow_inf_nan=False)


class SearchRequest(Body):
    """A search for the items nearest to a query of one or more parts."""

    parts: list[QueryPart] = Field(min_length=1, max_length=16)
    k: K = 10
    where: list[Text] = Field(default=[], max_length=16, description="conditions like colour=red or price<20")


class EmbedRequest(Body):
    """Texts to embed."""

    texts: list[Text] = Field(min_length=1, max_length=256)


class Moment(Body):
    """The user and the time for which items are scored."""

    user_id: Id | None = Field(default=None, description="null: a user who is not in the log")
    history: list[Id] | None = Field(
        default=None, max_length=1000, description="items clicked, oldest first, instead of those in the log"
    )
    at: int | float | None = Field(
        default=None, description="a time in the unit of the column timestamp of the log: only earlier clicks count"
    )
    context: dict[str, Any] = Field(default={}, description="values of context columns")
    ranker: RankerName = "ranker"


class ScoreRequest(Moment):
    """Items to score for a user."""

    items: list[Id] = Field(min_length=1, max_length=MAX_ITEMS)


class RankRequest(Moment):
    """A request for the best items for a user."""

    candidates: int = Field(default=200, ge=1, le=MAX_ITEMS, description="items taken from the index by the history")
    k: K = 10
    among: Literal["all", "cold", "warm"] = Field(default="all", description="cold items were in no training row")


class ExplainRequest(Moment):
    """An item whose score is to be explained."""

    item_id: Id


class Found(BaseModel):
    """An item of a search result."""

    item_id: WrittenId
    score: float
    title: str | None = None


class Scored(Found):
    """An item with a click probability."""

    cold: bool
    """whether the item occurs in no training row"""


class Answer(BaseModel):
    """The result of a search, nearest item first."""

    items: list[Found]


class Ranking(BaseModel):
    """Scored items, and the number of behaviours that the user has."""

    items: list[Scored]
    history_length: int


class Vectors(BaseModel):
    """One vector for each text."""

    vectors: list[list[float]]


class Reason(BaseModel):
    """The effect of one behaviour on a score."""

    item_id: WrittenId
    title: str | None
    effect: float
    """log-odds of a click with the whole history, minus the log-odds without this behaviour"""
    weight: float | None
    """attention weight, for rankers with attention"""


class Explanation(BaseModel):
    """A click probability, and the effect of each behaviour."""

    score: float
    history: list[Reason]
