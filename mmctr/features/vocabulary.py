"""RankingVocabulary: the items, users and feature values that occur in training rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from pydantic import model_validator

from mmctr.config import Config
from mmctr.data.prepare import Dataset
from mmctr.data.splits import Splits
from mmctr.data.tables import one_array, read_table, rows_of
from mmctr.features.columns import (
    FeatureConfig,
    NumericFeature,
    Vocabulary,
    learn_vocabularies,
)
from mmctr.features.crosses import HISTORY, CrossFeature
from mmctr.features.trees import LEAVES, Trees
from mmctr.files import read_json, replace_file, write_json
from mmctr.manifests import require_types


class FeatureConfigs(Config):
    """Side features by column name."""

    item: dict[str, FeatureConfig] = {}
    """features of items: columns of the items table"""
    user: dict[str, FeatureConfig] = {}
    """features of users: columns of the users table"""
    context: dict[str, FeatureConfig] = {}
    """features of impressions: further columns of the interactions table that are known before the click"""
    cross: dict[str, CrossFeature] = {}
    """combinations of item, user and context features, under names of your choice"""

    @model_validator(mode="after")
    def _distinct(self) -> FeatureConfigs:
        both = set(self.user) & set(self.context)
        if both:
            raise ValueError(f"the column {sorted(both)[0]!r} is declared as a user and a context feature; keep one")
        if "item_id" in self.item:
            raise ValueError("item_id is not a side feature: the embedder's id_dim makes the ID vector")
        declared = self.user | self.context
        columns = self.item | declared
        choices = ["user_id", "item_id", "history.item_id", *columns, *(HISTORY + name for name in self.item)]
        if LEAVES in declared | self.cross:
            raise ValueError(f"the name {LEAVES!r} is taken; rename the feature")
        for name, config in self.cross.items():
            if name in declared:
                raise ValueError(f"the cross {name!r} has the name of another feature; rename it")
            for part in config.of:
                if part not in choices:
                    raise ValueError(f"the cross {name!r} is of {part!r}, which is none of {', '.join(choices)}")
                feature = columns.get(part.removeprefix(HISTORY))
                if isinstance(feature, NumericFeature) and not feature.buckets:
                    raise ValueError(f"the cross {name!r} is of the number {part!r}; give it `buckets`")
        return self


@dataclass(frozen=True)
class RankingVocabulary:
    """The items and users that have a row of the ID tables, and the vocabularies of the side features."""

    item_ids: pa.Array
    """raw ids of the items with at least one training impression; row i + 1 of the ID table is `item_ids[i]`"""
    clicks: np.ndarray
    """(number of item_ids,) training clicks on each of these items"""
    user_ids: pa.Array
    """raw ids of the users with at least one training impression; row i + 1 of the user table is `user_ids[i]`"""
    item: dict[str, Vocabulary] = field(default_factory=dict)
    """name of the item feature -> vocabulary"""
    user: dict[str, Vocabulary] = field(default_factory=dict)
    """name of the user feature -> vocabulary"""
    context: dict[str, Vocabulary] = field(default_factory=dict)
    """name of the context feature -> vocabulary"""
    trees: Trees | None = None
    """fitted trees of the ranker GBDT+LR; None for other rankers"""

    @classmethod
    def learn(cls, dataset: Dataset, splits: Splits, features: FeatureConfigs) -> RankingVocabulary:
        """Learn from training rows alone.

        Every training item counts once for the values of item features, every training user once for user features,
        and every training row once for context features.

        Args:
            dataset: the dataset of training.
            splits: split of the interactions of the dataset.
            features: the declared side features.

        Raises:
            ValueError: a declared column is missing or does not fit the declared feature.
        """
        warm = np.flatnonzero(splits.seen)
        users = np.unique(splits.train.user)
        return cls(
            item_ids=dataset.catalog.item_ids.take(pa.array(warm)),
            clicks=splits.clicks[warm],
            user_ids=user_ids(dataset).take(pa.array(users)),
            item=learn_vocabularies(features.item, dataset.catalog.table, warm, "items table"),
            user=learn_vocabularies(features.user, dataset.users, users, "users table"),
            context=learn_vocabularies(features.context, dataset.context, splits.train.source, "interactions table"),
        )

    def save(self, folder: Path) -> None:
        """Write Parquet and JSON files into a folder, which is created where it does not exist."""
        folder.mkdir(parents=True, exist_ok=True)
        tables = {
            "items.parquet": pa.table({"item_id": self.item_ids, "clicks": self.clicks}),
            "users.parquet": pa.table({"user_id": self.user_ids}),
        }
        for name, table in tables.items():
            replace_file(folder / name, lambda path, table=table: pyarrow.parquet.write_table(table, path))
        groups = {"item": self.item, "user": self.user, "context": self.context}
        write_json(
            folder / "features.json", {g: {n: v.to_json() for n, v in group.items()} for g, group in groups.items()}
        )
        if self.trees is not None:
            self.trees.save(folder)

    @classmethod
    def load(cls, folder: Path) -> RankingVocabulary:
        """Read the vocabulary that `save` has written into a folder.

        Raises:
            ValueError: a file is missing, damaged or holds something else; the message names the file.
        """
        items = read_table(folder / "items.parquet", ("item_id", "clicks"))
        users = read_table(folder / "users.parquet", ("user_id",))
        groups = _read_features(folder / "features.json")
        return cls(
            item_ids=one_array(items.column("item_id")),
            clicks=items.column("clicks").to_numpy(),
            user_ids=one_array(users.column("user_id")),
            **groups,
            trees=Trees.load(folder) if Trees.are_saved(folder) else None,
        )

    def item_rows(self, item_ids: pa.Array) -> np.ndarray:
        """Rows of items in the ID table.

        Args:
            item_ids: (n,) raw ids.

        Returns:
            (n,) int64, 0 for an item unseen in training.

        Raises:
            ValueError: the ids of training are integers and these ids are strings, or the other way round.
        """
        return rows_of(item_ids, self.item_ids, "the run's items and this dataset's") + 1


def _read_features(path: Path) -> dict[str, dict[str, Vocabulary]]:
    """The vocabularies of side features by group ("item", "user", "context") and name."""
    values = read_json(path)
    require_types(values, path, item=dict, user=dict, context=dict)
    groups: dict[str, dict[str, Vocabulary]] = {}
    for group in ("item", "user", "context"):
        groups[group] = {}
        for name, entry in values[group].items():
            require_types(entry, f"{path}: {group}: {name}", values=list, mean=float, std=float)
            groups[group][name] = Vocabulary(entry["values"], entry["mean"], entry["std"])
    return groups


def user_ids(dataset: Dataset) -> pa.Array:
    """The raw ids of the users of a dataset by user row."""
    return one_array(dataset.users.column("user_id"))
