"""The config of a study: methods, protocols and seeds, and the tables of vectors the study makes."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from mmctr.config import Config
from mmctr.data.splits import SplitConfig

OWN_KEYS = ("data.path", "split", "seed", "run_dir")
"""keys of a cell's config that the study sets"""


class FactorsConfig(Config):
    """The true factors of a ToyWorld, one-hot: what the best encoder could know."""

    name: Literal["factors"] = "factors"


class ShuffledConfig(Config):
    """Vectors that stand beside the wrong items: what leaks, if anything does."""

    name: Literal["shuffled"] = "shuffled"
    of: str | list[str]
    """a table of item vectors, or several side by side, as `content.path` takes them"""
    seed: int = Field(default=0, ge=0)


TableConfig = Annotated[FactorsConfig | ShuffledConfig, Field(discriminator="name")]


def _without_own_keys(overrides: list[str]) -> list[str]:
    for override in overrides:
        key = override.partition("=")[0]
        if key == "data" or any(key == name or key.startswith(f"{name}.") for name in OWN_KEYS):
            raise ValueError(f"{key} is the same for all methods of a study; leave it out here")
    return overrides


Overrides = Annotated[list[str], AfterValidator(_without_own_keys)]
"""`key=value`, as the recipe takes them"""


class MethodConfig(Config):
    """A recipe config of `finetune.train`, and what is changed in it."""

    config: str
    set: Overrides = []
    """`key=value` overrides, as the recipe takes them"""
    table: str | None = None
    """one of the study's `tables`, read as the content of items"""
    after: str | None = None
    """a method above, whose run of the same protocol and seed is the expert, `task.make.run`"""


class StudyConfig(Config):
    """What is compared with what, on which rows."""

    data: str
    """dataset folder"""
    protocols: dict[str, SplitConfig] = Field(min_length=1)
    """how the log is cut, by name"""
    methods: dict[str, MethodConfig] = Field(min_length=1)
    set: Overrides = []
    """`key=value` overrides of all methods, before their own"""
    baseline: str
    """the method that differences are taken from"""
    oracle: str | None = None
    """the method that is the ceiling"""
    tables: dict[str, TableConfig] = {}
    """item tables the study makes itself, for `methods.NAME.table`"""
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[0, 1, 2], min_length=1)
    bootstrap: int = Field(default=200, ge=20)
    """resamples behind an interval"""
    out: str
    """folder of the runs, the tables and the results"""

    @field_validator("protocols", "methods", "tables")
    @classmethod
    def _names_are_folders(cls, parts: dict[str, Any]) -> dict[str, Any]:
        for name in parts:
            if not re.fullmatch(r"[\w-][\w.-]*", name):
                raise ValueError(f"the name {name!r} is also that of a folder: use letters, digits, _, - and .")
        return parts

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {self.seeds} holds a seed twice; keep one")
        for key, name in (("baseline", self.baseline), ("oracle", self.oracle)):
            if name is not None and name not in self.methods:
                raise ValueError(f"{key}: no method is called {name!r}; it is one of {', '.join(self.methods)}")
        if self.oracle == self.baseline:
            raise ValueError(f"oracle: {self.oracle!r} is the baseline too; name another method, or leave oracle out")
        for name, method in self.methods.items():
            if method.table is not None and method.table not in self.tables:
                known = ", ".join(self.tables) or "none is declared"
                raise ValueError(f"methods.{name}.table: {method.table!r} is not among `tables` ({known})")
            if method.after is not None and any(
                change.partition("=")[0] in ("task.make", "task.make.run") for change in (*self.set, *method.set)
            ):
                raise ValueError(f"methods.{name}: `after` sets task.make.run; leave it out of `set`")
            before = list(self.methods)[: list(self.methods).index(name)]
            if method.after is not None and method.after not in before:
                there = ", ".join(before) or "there is none"
                raise ValueError(f"methods.{name}.after: no method above it is called {method.after!r} ({there})")
        return self
