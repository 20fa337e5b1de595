"""RankingData: a dataset encoded with the vocabularies of a ranker, from which batches of impressions are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from torch import Tensor

from mmctr.data.batches import Features
from mmctr.data.content import ItemContent
from mmctr.data.interactions import Impressions
from mmctr.data.prepare import Dataset
from mmctr.data.tables import rows_of
from mmctr.features.behavior_collator import BehaviorCollator, NegativeSampler, behaviors_read
from mmctr.features.columns import (
    BehaviorView,
    FeatureColumns,
    encode_table,
)
from mmctr.features.crosses import cross_features
from mmctr.features.trees import TreeColumns, Trees, TreesConfig
from mmctr.features.vocabulary import FeatureConfigs, RankingVocabulary, user_ids


class RankingData:
    """A dataset encoded with a vocabulary, from which collators of impressions are made.

    The dataset may be the dataset of training or any other dataset with the same columns.

    Args:
        dataset: a prepared dataset with a click log.
        vocabulary: items, users and feature values of training.
        features: the declared side features.
        max_history: largest number of behaviours of an impression.
        content: (N, D) frozen content vectors of the catalog and the (N,) mask of items with a vector, for trees.

    Raises:
        ValueError: the dataset lacks a declared column or has no click log.
    """

    def __init__(
        self,
        dataset: Dataset,
        vocabulary: RankingVocabulary,
        features: FeatureConfigs,
        max_history: int,
        content: tuple[Tensor, Tensor] | None = None,
    ):
        self.vocabulary = vocabulary
        self.max_history = max_history
        self.content = content
        catalog = dataset.catalog
        self.id_rows = vocabulary.item_rows(catalog.item_ids)
        """(N,) row of each catalog item in the ID table, 0 for a cold item"""
        items = encode_table(features.item, vocabulary.item, catalog.table, "items table")
        self.items = FeatureColumns({"item_id": torch.from_numpy(self.id_rows), **items.columns})
        self.user_rows = torch.from_numpy(rows_of(user_ids(dataset), vocabulary.user_ids, "users") + 1)
        self.users = encode_table(features.user, vocabulary.user, dataset.users, "users table")
        # the further columns of the log are read only if a context feature is declared
        context = dataset.context if features.context else pa.table({})
        self.context = encode_table(features.context, vocabulary.context, context, "interactions table")
        self.derived: tuple[Callable[[BehaviorView], Features], ...] = ()
        if features.cross:
            self.derived += (partial(cross_features, features.cross),)
        if vocabulary.trees is not None:
            projected = self.projected(vocabulary.trees.columns)
            self.derived += (partial(vocabulary.trees.leaves, content=projected),)

    @property
    def clicks(self) -> np.ndarray:
        """(N,) number of training clicks on each catalog item."""
        return np.concatenate([[0], self.vocabulary.clicks])[self.id_rows]

    def projected(self, columns: TreeColumns) -> np.ndarray | None:
        """The principal components of the content vectors that trees read.

        Args:
            columns: the columns of the trees.

        Returns:
            (N, P) float32, NaN for an item without a content vector; None where the trees read no content.
        """
        if columns.projection is None:
            return None
        if self.content is None:
            return np.full((len(self.id_rows), columns.projection.components.shape[1]), np.float32("nan"))
        vectors, has = (part.cpu().numpy() for part in self.content)
        return np.where(has[:, None], columns.projection(vectors), np.float32("nan"))

    def fit_trees(self, config: TreesConfig, impressions: Impressions, id_dropout: float, seed: int) -> Trees:
        """Fit boosted trees. As in the training of rankers, ID dropout imitates cold items.

        The columns of the trees are chosen from the items, users and rows of these impressions alone: values that only
        other rows have, as those of the test, do not change the trees.

        Args:
            config: number and size of the trees.
            impressions: impressions to fit the trees on.
            id_dropout: probability that an item gets the ID row of unknown items.
            seed: seed of the run.
        """
        items, users = (torch.from_numpy(np.unique(rows)).long() for rows in (impressions.item, impressions.user))
        source = torch.from_numpy(impressions.source)
        columns = TreeColumns.learn(
            config,
            FeatureColumns(self.items.take(items)),
            FeatureColumns(self.users.take(users) | self.context.take(source)),
            None if self.content is None else (self.content[0].cpu()[items], self.content[1].cpu()[items]),
        )
        content = self.projected(columns)
        parts: list[np.ndarray] = []
        is_category: list[bool] = []

        def collect(view: BehaviorView) -> Features:
            x, is_category[:] = columns(view, content)
            parts.append(x)
            return {}

        collator = replace(self.collator(impressions, id_dropout=id_dropout, seed=seed), derived=(collect,))
        for step, begin in enumerate(range(0, len(impressions), 4096)):
            collator(np.arange(begin, min(begin + 4096, len(impressions))), step)
        return Trees.fit(config, columns, np.concatenate(parts), is_category, impressions.label, seed)

    def samples(self, impressions: Impressions) -> tuple[np.ndarray, np.ndarray]:
        """The number of impressions in which each row of the ID tables occurs.

        Args:
            impressions: training impressions.

        Returns:
            (rows of the item ID table,) and (rows of the user ID table,) int64 counts.
        """
        items = samples_of_items(impressions, len(self.id_rows), self.max_history)
        users = self.user_rows.numpy()[impressions.user]
        sizes = len(self.vocabulary.item_ids) + 1, len(self.vocabulary.user_ids) + 1
        of_items = np.bincount(self.id_rows, weights=items, minlength=sizes[0])
        return of_items.astype(np.int64), np.bincount(users, minlength=sizes[1])

    def collator(
        self,
        impressions: Impressions,
        *,
        content: ItemContent | None = None,
        encode_history: bool = True,
        max_encoded: int | None = None,
        negatives: NegativeSampler | None = None,
        id_dropout: float = 0.0,
        user_dropout: float = 0.0,
        seed: int = 0,
    ) -> BehaviorCollator:
        """A collator for the impressions of a split.

        Args:
            impressions: impressions of a split of the dataset.
            content: pictures and texts of the catalog, for a ranker that encodes items; None: no item is encoded.
            encode_history: with `content`: whether behaviours are encoded as well as targets.
            max_encoded: with `content`: largest number of distinct items of a step that are encoded; None: all.
            negatives: sampler of one negative per behaviour, for rankers with an auxiliary loss.
            id_dropout: probability that a distinct item of a batch gets the ID row of unknown items.
            user_dropout: probability that a user gets the ID row of unknown users.
            seed: seed of the run.
        """
        return BehaviorCollator(
            impressions=impressions,
            items=self.items,
            user_rows=self.user_rows,
            users=self.users,
            context=self.context,
            max_history=self.max_history,
            content=content,
            encode_history=encode_history,
            max_encoded=max_encoded,
            derived=self.derived,
            negatives=negatives,
            id_dropout=id_dropout,
            user_dropout=user_dropout,
            seed=seed,
        )


def samples_of_items(impressions: Impressions, num_items: int, max_history: int) -> np.ndarray:
    """The number of impressions with each item as the target or among the behaviours.

    Args:
        impressions: impressions of a split.
        num_items: N, number of catalog items.
        max_history: largest number of behaviours of an impression.

    Returns:
        (N,) int64; an item that occurs several times in one impression counts once.
    """
    counts = np.zeros(num_items, np.int64)
    for begin in range(0, len(impressions), 1 << 16):
        part = slice(begin, begin + (1 << 16))
        index, offsets = behaviors_read(impressions, part, max_history)
        target = impressions.item[part].astype(np.int64)
        impression = np.repeat(np.arange(len(target)), np.diff(offsets.numpy()))
        behaviors = impressions.history[index.numpy()]
        pairs = [np.arange(len(target)) * num_items + target, impression * num_items + behaviors]
        counts += np.bincount(np.unique(np.concatenate(pairs)) % num_items, minlength=num_items)
    return counts
