"""Boosted trees as a feature transform: the leaf of each tree into which an impression falls (He et al. 2014).

The trees are fitted by LightGBM, from the optional extra `gbdt`. The trees read features that a linear model cannot
combine: numbers, codes of categories, the most frequent values of lists, the share of behaviours with the same value as
the target, and the principal components of frozen content vectors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mmctr.config import Config
from mmctr.data.batches import Features, Jagged
from mmctr.data.hashing import stream_seed
from mmctr.features.columns import BehaviorView, FeatureColumns, known_values, pooled_by
from mmctr.features.lightgbm_text import checked_model
from mmctr.manifests import read_manifest, require_types, write_manifest
from mmctr.run_folder import AGAIN

LEAVES = "gbdt_leaves"
"""name of the context feature that holds the leaves"""


class TreesConfig(Config):
    """Gradient-boosted trees of LightGBM, whose leaves are a feature of the linear model."""

    share: float = Field(default=0.25, gt=0, lt=1)
    """fraction of the training rows, drawn at random, on which the trees are fitted; the linear model is trained on the
    other rows, because leaves predict the rows better on which the trees were fitted than other rows"""
    num_trees: int = Field(default=100, ge=1)
    """number of trees; an impression has one leaf in every tree"""
    num_leaves: int = Field(default=32, ge=2)
    """largest number of leaves of a tree"""
    learning_rate: float = Field(default=0.1, gt=0)
    """factor on the output of every tree"""
    min_rows: int = Field(default=50, ge=1)
    """least number of rows of a leaf"""
    top_values: int = Field(default=16, ge=0)
    """number of the most frequent values of a multi-valued feature for which the trees have a column"""
    content_dims: int = Field(default=16, ge=0)
    """number of principal components of frozen content vectors for which the trees have a column"""


@dataclass(frozen=True)
class Projection:
    """Projection of content vectors onto principal components, scaled to unit norm."""

    mean: np.ndarray
    """(D,) mean vector"""
    components: np.ndarray
    """(D, P) principal components, the one with the largest variance first"""

    @classmethod
    def fit(cls, vectors: np.ndarray, dims: int) -> Projection:
        """Fit the principal components.

        Args:
            vectors: (N, D) content vectors, of which at most 50,000 are read.
            dims: P, number of components.
        """
        sample = vectors[np.random.default_rng(0).permutation(len(vectors))[:50_000]].astype(np.float64)
        mean = sample.mean(0)
        _, basis = np.linalg.eigh((sample - mean).T @ (sample - mean))
        return cls(mean, basis[:, ::-1][:, :dims])

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """Project (N, D) vectors to (N, P) float32 of unit norm."""
        projected = ((vectors - self.mean) @ self.components).astype(np.float32)
        return projected / np.maximum(np.linalg.norm(projected, axis=1, keepdims=True), 1e-12)


@dataclass(frozen=True)
class TreeColumns:
    """The columns of numbers that trees read of impressions."""

    item: list[str]
    """names of the item features"""
    impression: list[str]
    """names of the user and context features"""
    top: dict[str, list[int]]
    """`item NAME` or `impression NAME` -> values of the multi-valued feature that have a column"""
    projection: Projection | None = None
    """projection of content vectors; None: no columns of content"""

    @classmethod
    def learn(
        cls,
        config: TreesConfig,
        items: FeatureColumns,
        impressions: FeatureColumns,
        content: tuple[Tensor, Tensor] | None,
    ) -> TreeColumns:
        """Choose the columns.

        Args:
            config: number of columns of multi-valued features and of content vectors.
            items: features of the distinct items of the training rows.
            impressions: features of the distinct users of the training rows, and context features of these rows.
            content: (n, D) content vectors of the items of the training rows and the (n,) mask of items with a vector;
                None: no columns of content.
        """
        top = {}
        of_items = {f"item {name}": column for name, column in items.columns.items()}
        of_impressions = {f"impression {name}": column for name, column in impressions.columns.items()}
        for name, column in (of_items | of_impressions).items():
            if isinstance(column, Jagged):
                counts = np.bincount(column.values.numpy(), minlength=1)
                by_count = np.argsort(-counts, kind="stable")[: config.top_values]
                top[name] = [int(value) for value in by_count if counts[value]]
        projection = None
        if content is not None and config.content_dims:
            vectors, has = (part.cpu().numpy() for part in content)
            if has.any():
                projection = Projection.fit(vectors[has], config.content_dims)
        return cls(list(items.columns), list(impressions.columns), top, projection)

    def __call__(self, view: BehaviorView, content: np.ndarray | None = None) -> tuple[np.ndarray, list[bool]]:
        """Compute the columns of B impressions.

        Args:
            view: side features of the impressions.
            content: (N, P) projected content vectors by catalog row, NaN for an item without a vector.

        Returns:
            (B, C) float32 columns, NaN for a missing value, and for each column whether the values are codes of
            categories.
        """
        lengths = np.diff(view.offsets.numpy())
        parts: list[np.ndarray] = [lengths]
        is_category = [False]

        def add(name: str, feature: Tensor | Jagged) -> None:
            columns = self._feature_columns(name, feature)
            parts.extend(columns)
            is_category.extend([not isinstance(feature, Jagged) and feature.ndim == 1] * len(columns))

        for name in self.impression:
            add(f"impression {name}", view.impression[name])
        for name in self.item:
            target = view.target(name)
            add(f"item {name}", target)
            if isinstance(target, Jagged) or target.ndim == 1:
                shared = _shared(known_values(target), pooled_by(known_values(view.history(name)), view.offsets))
                parts.append(np.where(lengths > 0, shared / np.maximum(lengths, 1), np.nan))
                is_category.append(False)
        if content is not None:
            target = content[view.target_rows.numpy()]
            parts += [*target.T, *_similarity(target, content[view.history_rows.numpy()], view.offsets.numpy())]
            is_category += [False] * (target.shape[1] + 3)
        return np.stack(parts, 1).astype(np.float32), is_category

    def _feature_columns(self, name: str, feature: Tensor | Jagged) -> list[np.ndarray]:
        """The columns of one feature: a code, a number, or for each of the top values whether a row has the value."""
        if isinstance(feature, Jagged):
            values, row = feature.values.numpy(), _row_of(feature)
            columns = []
            for value in self.top[name]:
                column = np.zeros(len(feature.offsets) - 1)
                column[row[values == value]] = 1
                columns.append(column)
            return columns
        if feature.ndim == 1:
            return [np.where(feature.numpy() > 0, feature.numpy(), np.nan)]
        value, missing = feature.numpy().T
        return [np.where(missing > 0, np.nan, value)]


def _row_of(feature: Jagged) -> np.ndarray:
    """(V,) the row of each value."""
    lengths = np.diff(feature.offsets.numpy())
    return np.repeat(np.arange(len(lengths)), lengths)


def _shared(target: Jagged, behaviors: Jagged) -> np.ndarray:
    """(B,) number of values of the behaviours that the target has too."""
    row, value = _row_of(target), target.values.numpy()
    of, values = _row_of(behaviors), behaviors.values.numpy()
    num_rows, num_values = len(target.offsets) - 1, int(max(value.max(initial=0), values.max(initial=0))) + 1
    if num_rows * num_values <= 1 << 26:
        wanted = np.zeros(num_rows * num_values, bool)
        wanted[row * num_values + value] = True
        is_shared = wanted[of * num_values + values]
    else:
        is_shared = np.isin(of * num_values + values, row * num_values + value)
    return np.bincount(of, weights=is_shared, minlength=num_rows)


def _similarity(target: np.ndarray, behaviors: np.ndarray, offsets: np.ndarray) -> list[np.ndarray]:
    """Cosines of the targets (B, P) with the behaviours (H, P) of the impression: the mean, the largest, and the cosine
    with the newest behaviour, (B,) each, NaN where undefined."""
    lengths = np.diff(offsets)
    cosine = np.einsum("hp,hp->h", target[np.repeat(np.arange(len(target)), lengths)], behaviors)
    defined = np.isfinite(cosine)
    some = np.flatnonzero(lengths > 0)
    mean, largest, newest = (np.full(len(target), np.nan) for _ in range(3))
    if len(some):
        starts = offsets[:-1][some]
        total, count = (np.add.reduceat(x, starts) for x in (np.where(defined, cosine, 0), defined.astype(np.float64)))
        with np.errstate(invalid="ignore"):
            mean[some] = np.where(count > 0, total / np.maximum(count, 1), np.nan)
        top = np.maximum.reduceat(np.where(defined, cosine, -2), starts)
        largest[some] = np.where(top > -2, top, np.nan)
        newest[some] = cosine[offsets[1:][some] - 1]
    return [mean, largest, newest]


@dataclass(frozen=True)
class Trees:
    """Fitted trees: `trees.leaves(view, content)` is the context feature `LEAVES`."""

    columns: TreeColumns
    """the columns that the trees read"""
    model: str
    """the model as text in the format of LightGBM"""
    booster: Any = field(compare=False)
    """the `lightgbm.Booster` of the model"""
    num_leaves: int
    """number of rows of the table of leaves per tree"""

    @property
    def num_rows(self) -> int:
        """Number of rows of the table of leaves; row 0 is unused."""
        return self.booster.num_trees() * self.num_leaves + 1

    @classmethod
    def fit(
        cls,
        config: TreesConfig,
        columns: TreeColumns,
        x: np.ndarray,
        is_category: list[bool],
        label: np.ndarray,
        seed: int,
    ) -> Trees:
        """Fit trees; equal arguments give equal trees.

        Args:
            config: number and size of the trees.
            columns: the columns that the trees read.
            x: (n, C) columns of n impressions.
            is_category: for each column whether the values are codes of categories.
            label: (n,) 0 or 1.
            seed: seed of the run.

        Raises:
            ValueError: LightGBM is not installed.
        """
        lightgbm = _lightgbm()
        categories = [i for i, flag in enumerate(is_category) if flag]
        settings = {
            "objective": "binary",
            "num_leaves": config.num_leaves,
            "learning_rate": config.learning_rate,
            "min_data_in_leaf": config.min_rows,
            "num_threads": torch.get_num_threads(),
            "deterministic": True,
            "force_row_wise": True,
            "seed": seed,
            "verbosity": -1,
        }
        data = lightgbm.Dataset(x, label, categorical_feature=categories, params={"verbosity": -1})
        booster = lightgbm.train(settings, data, num_boost_round=config.num_trees)
        return cls(columns, booster.model_to_string(), booster, config.num_leaves)

    def leaves(self, view: BehaviorView, content: np.ndarray | None = None) -> Features:
        """The context feature `LEAVES` of B impressions.

        Args:
            view: side features of the impressions.
            content: (N, P) projected content vectors by catalog row, NaN for an item without a vector.

        Returns:
            {LEAVES: a `Jagged` over B impressions with one row per tree}.
        """
        x, _ = self.columns(view, content)
        # one thread: loader workers are forked processes, in which the threads of OpenMP do not exist
        leaf = np.asarray(self.booster.predict(x, pred_leaf=True, num_threads=1), np.int64).reshape(len(x), -1)
        trees = leaf.shape[1]
        rows = leaf + np.arange(trees) * self.num_leaves + 1
        return {LEAVES: Jagged(torch.from_numpy(rows.ravel()), torch.arange(len(x) + 1) * trees)}

    def save(self, folder: Path) -> None:
        """Write `trees.json` into a folder, which is created where it does not exist."""
        projection = self.columns.projection
        values = {
            "item": self.columns.item,
            "impression": self.columns.impression,
            "top": self.columns.top,
            "mean": None if projection is None else projection.mean.tolist(),
            "components": None if projection is None else projection.components.tolist(),
            "num_leaves": self.num_leaves,
            "model": self.model,
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_manifest(folder / "trees.json", values, [])

    @staticmethod
    def are_saved(folder: Path) -> bool:
        """Whether a folder holds trees that `save` has written."""
        return (folder / "trees.json").is_file()

    @classmethod
    def load(cls, folder: Path) -> Trees:
        """Read the trees that `save` has written into a folder.

        Raises:
            ValueError: the file is missing or damaged, or LightGBM is not installed.
        """
        path = folder / "trees.json"
        values = read_manifest(path, AGAIN).values
        optional = (list, type(None))
        require_types(
            values,
            path,
            item=list,
            impression=list,
            top=dict,
            mean=optional,
            components=optional,
            num_leaves=int,
            model=str,
        )
        projection = None
        if values["mean"] is not None:
            try:
                projection = Projection(np.array(values["mean"], float), np.array(values["components"], float))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}: mean and components are no numbers ({error}); {AGAIN}") from None
            if projection.mean.ndim != 1 or projection.components.shape[:1] != projection.mean.shape:
                raise ValueError(f"{path}: mean and components do not fit each other; {AGAIN}")
        for names in (values["item"], values["impression"], list(values["top"])):
            if not all(isinstance(name, str) for name in names):
                raise ValueError(f"{path}: a name of a feature is no text; {AGAIN}")
        if not all(isinstance(top, list) and all(isinstance(v, int) for v in top) for top in values["top"].values()):
            raise ValueError(f"{path}: top holds something else than numbers of values; {AGAIN}")
        columns = TreeColumns(values["item"], values["impression"], values["top"], projection)
        try:
            model = checked_model(values["model"], most_leaves=values["num_leaves"])
            booster = _lightgbm().Booster(model_str=model)
        except _lightgbm().basic.LightGBMError as error:
            raise ValueError(f"{path}: LightGBM cannot read the model ({error}); {AGAIN}") from None
        except ValueError as error:
            raise ValueError(f"{path}: the model {error}; {AGAIN}") from None
        return cls(columns, values["model"], booster, values["num_leaves"])


def disjoint_rows(num_rows: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Divide training rows into rows for the trees and rows for the linear model that reads the leaves.

    Args:
        num_rows: number of training rows.
        share: fraction of the rows for the trees.
        seed: seed of the run.

    Returns:
        Two ascending arrays of rows.

    Raises:
        ValueError: one of the arrays would be empty.
    """
    order = np.random.default_rng(stream_seed(seed, "rows of the trees")).permutation(num_rows)
    count = round(share * num_rows)
    if not 0 < count < num_rows:
        raise ValueError(f"trees.share={share} of {num_rows} training rows leaves none to trees or to the linear model")
    return np.sort(order[:count]), np.sort(order[count:])


def _lightgbm() -> Any:
    try:
        import lightgbm
    except ImportError:
        raise ValueError("the ranker gbdt_lr needs LightGBM: pip install 'mmctr[gbdt]'") from None
    return lightgbm
