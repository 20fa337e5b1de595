"""The config of a study: methods, protocols, seeds, and the tables of item vectors that the study makes itself."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from mmctr.config import Config
from mmctr.data.splits import SplitConfig

STUDY_KEYS = ("data.path", "split", "seed", "run_dir")
"""keys of a run's config that the study sets for all methods"""


class FactorsConfig(Config):
    """A table of the true factors of a ToyWorld, one-hot: an upper bound for encoders."""

    name: Literal["factors"] = "factors"


class ShuffledConfig(Config):
    """A table that gives each item the vector of another item: a control for leaks."""

    name: Literal["shuffled"] = "shuffled"
    of: str | list[str]
    """path of a table of item vectors, or several paths whose vectors are concatenated, as for `content.path`"""
    seed: int = Field(default=0, ge=0)
    """of the permutation of the vectors"""


TableConfig = Annotated[FactorsConfig | ShuffledConfig, Field(discriminator="name")]


def _without_study_keys(overrides: list[str]) -> list[str]:
    """The overrides of a method; ValueError for a key that the study sets for all methods."""
    for override in overrides:
        key = override.partition("=")[0]
        if key == "data" or any(key == name or key.startswith(f"{name}.") for name in STUDY_KEYS):
            raise ValueError(f"{key} is the same for all methods of a study; leave it out here")
    return overrides


Overrides = Annotated[list[str], AfterValidator(_without_study_keys)]
"""changes of a recipe config, `key=value` each"""


class MethodConfig(Config):
    """A method: a recipe config of `finetune.train` with overrides."""

    config: str
    """path of a config of `finetune.train`, from where the study is started"""
    set: Overrides = []
    """`key=value` overrides of the recipe config"""
    table: str | None = None
    """name in `tables` of the study: the table is read as the content of items"""
    after: str | None = None
    """an earlier method, whose run of the same protocol and seed is the expert of this method, `task.make.run`"""


class StudyConfig(Config):
    """A comparison of methods under protocols and seeds on one dataset."""

    data: str
    """dataset folder"""
    protocols: dict[str, SplitConfig] = Field(min_length=1)
    """split of the interactions into training, validation and test, by name"""
    methods: dict[str, MethodConfig] = Field(min_length=1)
    """compared rankers, by name"""
    set: Overrides = []
    """`key=value` overrides of all methods; the overrides of a method come later"""
    baseline: str
    """the method that the other methods are compared with"""
    oracle: str | None = None
    """the method that is an upper bound, for the share of the gap that other methods close"""
    tables: dict[str, TableConfig] = {}
    """item tables that the study makes, for `methods.NAME.table`"""
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[0, 1, 2], min_length=1)
    """training seeds; every method runs once with each of them"""
    bootstrap: int = Field(default=200, ge=20)
    """bootstrap resamples of users for an interval"""
    out: str
    """folder of the runs, the tables and the results"""

    @field_validator("protocols", "methods", "tables")
    @classmethod
    def _check_folder_names(cls, parts: dict[str, Any]) -> dict[str, Any]:
        """ValueError for a name that cannot be the name of a folder."""
        for name in parts:
            if not re.fullmatch(r"[\w-][\w.-]*", name):
                raise ValueError(f"the name {name!r} is also that of a folder: use letters, digits, _, - and .")
        return parts

    @model_validator(mode="after")
    def _check_references(self) -> Self:
        """ValueError for seeds given twice, and for names of methods and tables that the study lacks."""
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
                earlier = ", ".join(before) or "there is none"
                raise ValueError(f"methods.{name}.after: no method above it is called {method.after!r} ({earlier})")
        return self
