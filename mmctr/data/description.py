"""The description of a dataset, `dataset.yaml`: which files hold the tables, how they are written, and which columns
are the item, the user, the time and the label."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from mmctr.config import Config
from mmctr.data.expressions import parse_expression

DESCRIPTION = "dataset.yaml"
"""name of the description in a dataset folder"""
Value = str | bool | int | float


class IdSource(Config):
    """A column of ids."""

    column: str
    """name of the column"""
    zero_pad: int | None = Field(default=None, ge=1, le=64)
    """number of characters that ids are filled up to with zeros on the left, for ids whose zeros a program has lost"""
    lower: bool = False
    """write ids in lower case, for logs and catalogs that differ in case"""


class TimeSource(Config):
    """A column of times."""

    column: str | None = None
    """name of the column"""
    row_number: bool = False
    """the rows are in the order of time, and the number of a row is the time: for files without a column of times"""
    unit: Literal["s", "ms", "us", "ns"] | None = None
    """unit of numbers, counted from 1970; None: any unit, kept as it is"""
    format: str | None = None
    """how text is written, in the codes of `strptime`, such as `%m/%d/%Y %I:%M:%S %p`; None: as ISO 8601"""
    time_zone: str = "UTC"
    """time zone of text without one, such as `Europe/Berlin`"""

    @model_validator(mode="after")
    def _numbers_or_text(self) -> TimeSource:
        if (self.column is None) != self.row_number:
            raise ValueError("give either `column`, or `row_number: true` for files without a column of times")
        if self.unit and self.format:
            raise ValueError("give either `unit`, for numbers, or `format`, for text")
        return self


class PictureSource(Config):
    """Where the picture of an item is."""

    pattern: str
    """path of the picture file relative to the folder, with columns in braces: `images/{item_id}.jpg`, and
    `images/{item_id:.3}/{item_id}.jpg` for the first three characters of the id as the name of a folder"""


class ImpressionsSource(Config):
    """A column that holds all items of an impression with the labels, such as `N1-0 N2-1`."""

    column: str
    """name of the column"""
    separator: str = Field(default=" ", min_length=1)
    """text between two items"""
    label_separator: str = Field(default="-", min_length=1)
    """text between an item and the label"""


class WeightSource(Config):
    """Weights of rows by the value of a column."""

    column: str
    """name of the column, such as `event`"""
    values: dict[str, Annotated[float, Field(ge=0)]] = Field(min_length=1)
    """weight of each value of the column; a row with another value has the weight 1"""


class TableDescription(Config):
    """The files of a table, and how they are written."""

    files: str | list[str] | dict[str, str | list[str]]
    """files relative to the folder: names, folders or patterns such as `logs/dt=*/part-*.parquet`, read one after the
    other; a folder named `dt=2020-01-01` adds the column `dt`. A mapping of parts to files, such as `{train: a.csv,
    test: b.csv}`, adds the column `split`, which the split `given` reads"""
    format: Literal["parquet", "csv", "tsv", "jsonl"] | None = None
    """format of the files; None: by the ending of the name"""
    separator: str | None = Field(default=None, min_length=1)
    """text between two columns of a CSV file"""
    encoding: str = "utf8"
    """encoding of CSV files, such as `latin-1`"""
    quotes: bool = True
    """whether values of CSV files may stand in double quotes"""
    columns: list[str] | None = Field(default=None, min_length=1)
    """names of the columns of CSV files without a first row of names"""
    rename: dict[str, str] = {}
    """new name -> column of the files"""
    constants: dict[str, Value] = {}
    """further columns with one value"""

    @property
    def patterns(self) -> list[tuple[str | None, str]]:
        """Each pattern of `files` with the part of the split that the files are; None without parts."""
        parts = self.files if isinstance(self.files, dict) else {None: self.files}
        return [
            (part, pattern)
            for part, patterns in parts.items()
            for pattern in ([patterns] if isinstance(patterns, str) else patterns)
        ]


class ItemsDescription(TableDescription):
    """The catalog."""

    item_id: str | IdSource = "item_id"
    """column of the ids of items"""
    image: str | PictureSource | None = None
    """column of pictures, or a pattern of paths; None: the column `image`, where there is one"""


class UsersDescription(TableDescription):
    """The users."""

    user_id: str | IdSource = "user_id"
    """column of the ids of users"""


class InteractionsDescription(TableDescription):
    """The click log."""

    user_id: str | IdSource = "user_id"
    """column of the ids of users"""
    item_id: str | IdSource = "item_id"
    """column of the ids of items"""
    timestamp: str | TimeSource = "timestamp"
    """column of the times"""
    impressions: ImpressionsSource | None = None
    """column with all items of an impression and the labels, which becomes a row for each item, in the place of
    `item_id` and `label`; the rows of an impression have the same `impression_id`"""
    label: Value = "label"
    """an expression over the columns that is true for a positive, such as `rating >= 4`; or 1, where all rows are"""
    labels: dict[str, str] = {}
    """name -> expression of further labels, which become columns of 0 and 1"""
    weight: str | WeightSource | None = None
    """column of the weights of the rows, which becomes the column `weight`; or weights by the value of a column"""

    @field_validator("label", "labels")
    @classmethod
    def _expressions(cls, value: Any) -> Any:
        for text in value.values() if isinstance(value, dict) else [value]:
            if isinstance(text, str):
                parse_expression(text)
        return value


class DatasetDescription(Config):
    """The content of `dataset.yaml`."""

    items: ItemsDescription | None = None
    """the catalog; None: the items of the click log, which then have nothing but ids"""
    interactions: InteractionsDescription | None = None
    """the click log; None: a catalog alone"""
    users: UsersDescription | None = None
    """the users; None: nothing is known of users"""

    @model_validator(mode="after")
    def _something(self) -> DatasetDescription:
        if self.items is None and self.interactions is None:
            raise ValueError("describe `items`, `interactions` or both")
        return self
