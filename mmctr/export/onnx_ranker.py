"""The ONNX graph of a ranker, and the item vectors that the graph reads.

A server stores the vectors of the catalog, looks up the vectors of the target and of the behaviours, and runs the graph
on these vectors and on features of the user and of the impression. The preparation of numbers is part of the graph.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmctr.data.batches import ItemBatch, Jagged
from mmctr.data.hashing import GOLDEN
from mmctr.data.prepare import Dataset
from mmctr.data.tables import as_text
from mmctr.distributed import start_processes
from mmctr.embedders.item_embedder import ContentNone
from mmctr.export.onnx_graph import (
    INT8_PROBABILITY,
    Axis,
    Graph,
    Inputs,
    Port,
    Session,
    int8_entry,
    quantise,
    write_graph,
)
from mmctr.export.padded_rankers import padded_logits
from mmctr.features.columns import (
    FeatureConfig,
    MultiValuedFeature,
    NumericFeature,
    Vocabulary,
    encode_column,
    encode_table,
)
from mmctr.features.crosses import CrossFeature
from mmctr.files import write_json
from mmctr.rankers.base import RankerInput
from mmctr.run_folder import RunFolder
from mmctr.runs.finished import open_ranker
from mmctr.tasks import RankingTask

BATCH, LENGTH = Axis("B"), Axis("L")
PREFIX = "feature."
"""prefix of the inputs for features of users and impressions"""
CHUNK = 8192
"""items that are embedded at once"""


class RankerGraph(nn.Module):
    """A ranker task with the features of users and impressions, as a module for the export."""

    def __init__(self, task: RankingTask):
        super().__init__()
        self.ranker, self.users, self.context = task.ranker, task.users, task.context
        self.reads_history = task.config.ranker.weight_dim is None
        self.features, self.vocabularies = context_features(task)

    def forward(self, inputs: Inputs) -> dict[str, Tensor]:
        """`logit` (B,) and `probability` (B,), from the inputs that `ports_of` describes."""
        target = inputs["target"]
        if self.reads_history:
            history, length = inputs["history"], inputs["history_length"]
        else:
            history, length = target[:, None, :], torch.zeros_like(target[:, 0], dtype=torch.int64)
        context = self._features(inputs, target)
        if self.users is not None:
            context = torch.cat([self.users(inputs["user"]), context], dim=1)
        logit = padded_logits(self.ranker, target, history, length, context).float()
        return {"logit": logit, "probability": torch.sigmoid(logit)}

    def _features(self, inputs: Inputs, target: Tensor) -> Tensor:
        """The vectors (B, C) of all features."""
        parts = [self._embedded(name, inputs[PREFIX + name]) for name in self.context.names]
        if self.context.weights and parts:
            return torch.stack(parts).sum(0)
        return torch.cat(parts, dim=1) if parts else target[:, :0]

    def _embedded(self, name: str, values: Tensor) -> Tensor:
        """The vectors (B, d) of one feature."""
        config, context = self.features[name], self.context
        if isinstance(config, CrossFeature | MultiValuedFeature):
            is_value = (values > 0)[..., None]
            rows = torch.where(is_value, context.tables[name](values), 0.0)
            return rows.sum(1) if name in context.summed else rows.sum(1) / is_value.sum(1).clamp(min=1)
        if not isinstance(config, NumericFeature):
            return context.tables[name](values)
        numbers = number_inputs(config, self.vocabularies[name], values)
        if name in context.tables:
            return context.tables[name](numbers)
        return context.numbers[name](numbers) if name in context.numbers else numbers


def number_inputs(config: NumericFeature, vocabulary: Vocabulary, numbers: Tensor) -> Tensor:
    """Prepare numbers as `encode_column` does.

    Args:
        config: the config of the feature.
        vocabulary: mean, standard deviation and bucket edges.
        numbers: (B,) float64, NaN for a missing number.

    Returns:
        (B,) bucket numbers, or (B, 2) float: the scaled number and whether it is missing.
    """
    given = numbers.abs() < 1e150  # not of NaN either
    numbers = torch.where(given, numbers, 0.0)
    if config.log:
        given = given & (numbers > -1)
        numbers = torch.log1p(torch.where(given, numbers, 0.0))
    if config.buckets:
        edges = torch.tensor(vocabulary.values, dtype=torch.float64)
        return torch.where(given, (numbers[:, None] >= edges).sum(1) + 1, 0)
    scaled = torch.where(given, (numbers - vocabulary.mean) / vocabulary.std, 0.0).clamp(-1e6, 1e6)
    return torch.stack([scaled, (~given).double()], 1).float()


def context_features(task: RankingTask) -> tuple[dict[str, Any], dict[str, Vocabulary]]:
    """The features of users and impressions by name, and the vocabularies by name; crosses have no vocabulary."""
    features = task.config.features
    return {**features.user, **features.context, **features.cross}, {**task.vocabulary.user, **task.vocabulary.context}


def ports_of(task: RankingTask, dim: int) -> dict[str, Port]:
    """The inputs of the graph of a ranker, in order.

    Args:
        task: the ranker.
        dim: size D of item vectors.
    """
    ports = {"target": Port([BATCH, dim], "float32", "vector of the item to score")}
    if task.config.ranker.weight_dim is None:
        ports["history"] = Port(
            [BATCH, LENGTH, dim],
            "float32",
            "vectors of the items clicked before, oldest first, padded behind with anything; training read the latest "
            f"{task.config.max_history}: cut off older ones",
        )
        ports["history_length"] = Port([BATCH], "int64", "behaviours in each row of history, 0 ... L")
    if task.users is not None:
        ports["user"] = Port([BATCH], "int64", "1 + row of the user in vocabulary/users.parquet; 0: unknown")
    for number, (name, config) in enumerate(context_features(task)[0].items()):
        ports[PREFIX + name] = _feature_port(name, config, Axis(f"V{number}"))
    return ports


def _feature_port(name: str, config: FeatureConfig | CrossFeature, values: Axis) -> Port:
    """The input of a feature; `values` is the dimension of the values of a multi-valued feature or cross."""
    if isinstance(config, CrossFeature):
        return Port(
            [BATCH, values], "int64", f"rows of the combinations of {' x '.join(config.of)}, see crosses; 0 pads"
        )
    if isinstance(config, MultiValuedFeature):
        return Port(
            [BATCH, values], "int64", f"1 + place in the vocabulary of {name!r} of each value; 0: unknown, pads"
        )
    if isinstance(config, NumericFeature):
        return Port([BATCH], "float64", f"the number {name!r} as it is in the table; NaN: missing")
    return Port([BATCH], "int64", f"1 + place in the vocabulary of {name!r}; 0: unknown or missing")


def export_ranker(run: Path, out: Path, data: str | None, int8: bool) -> dict[str, Any]:
    """Write `ranker.onnx`, `items.safetensors`, `items.parquet` and `vocabulary/` of a ranking run.

    Args:
        run: folder of `finetune.train`.
        out: folder to write.
        data: dataset folder whose item vectors are written; None: the dataset of the run.
        int8: whether to write a graph with int8 weights as well.

    Returns:
        The manifest.

    Raises:
        ValueError: the run is not finished, the ranker has no graph, or the graph differs from torch.
    """
    task, dataset, id_rows = open_ranker(run, data, start_processes())
    if task.vocabulary.trees is not None:
        raise ValueError(
            f"{run}: gbdt_lr has no graph: the trees are LightGBM's and read crosses of raw columns and content, which "
            "ONNX's tensors of this export do not carry, and without its leaves the rest scores wrongly. Serve it with "
            "Python, or export lr, ls_plm, embedding_mlp, din or dien"
        )
    content = task.config.embedder.content
    if task.config.compares or (not isinstance(content, ContentNone) and content.shown_in != "both"):
        raise ValueError(
            f"{run}: simtier, content_attention and shown_in: target or history have no graph: it reads one vector an "
            "item, while these compare contents or give an item another vector as a target. Serve it with Python"
        )
    if task.expert is not None:
        raise ValueError(
            f"{run}: a ranker with an expert (task.make) has no graph: it reads two vectors an item, its own and the "
            "expert's. Serve it with Python"
        )
    task.cpu().eval().requires_grad_(False)
    vectors, unknown = catalog_vectors(task, dataset)
    save_file({"vectors": vectors, "unknown": unknown}, out / "items.safetensors")
    table = {"item_id": dataset.catalog.item_ids, "id_row": pa.array(id_rows)}
    if "title" in dataset.catalog.table.column_names:
        table["title"] = as_text(dataset.catalog.table.column("title"))
    pyarrow.parquet.write_table(pa.table(table), out / "items.parquet")
    _write_vocabulary(task, run, out)

    graph = graph_of(task, vectors)
    checks = [
        draw(task, vectors, *sizes)
        for sizes in [(1, 0, 0), (1, 1, 1), (7, 2 * task.config.max_history + 3, 4), (32, 9, 2), (5, 0, 0)]
    ]
    entry = write_graph(graph, out, checks, relative)
    if int8:
        entry["int8"] = _int8(task, vectors, out / "ranker.onnx")
    return {
        "graphs": {"ranker.onnx": entry},
        "weights": RunFolder(run).weights_fingerprint(),
        "ranker": task.config.ranker.name,
        "max_history": task.config.max_history,
        "items": {
            "count": len(vectors),
            "dim": vectors.shape[1],
            "files": ["items.safetensors", "items.parquet"],
            "how": "row i of `vectors` is of row i of items.parquet; `unknown` is of an item that is not in it",
        },
        "vocabulary": "vocabulary/features.json: values by column; vocabulary/users.parquet: users",
        "crosses": {name: _cross_facts(config) for name, config in task.config.features.cross.items()},
    }


def graph_of(task: RankingTask, vectors: Tensor) -> Graph:
    """The graph of a ranker, with item vectors (N, D) for the example."""
    outputs = {
        "logit": Port([BATCH], "float32", "log odds of a click"),
        "probability": Port([BATCH], "float32", "of a click, not calibrated further"),
    }
    example, _ = draw(task, vectors, 3, 5, 4)  # no size is 0 or 1: torch takes these for constants
    return Graph("ranker", RankerGraph(task), example, ports_of(task, vectors.shape[1]), outputs)


@torch.no_grad()
def catalog_vectors(task: RankingTask, dataset: Dataset) -> tuple[Tensor, Tensor]:
    """The vectors (N, D) of the items of a catalog, and the vector (D,) of an unknown item without features.

    Args:
        task: the ranker, with content in the order of the catalog.
        dataset: the dataset with the catalog.
    """
    embedder, features = task.embedder, task.config.features.item
    table = dataset.catalog.table
    ids = torch.from_numpy(task.vocabulary.item_rows(dataset.catalog.item_ids))
    columns = encode_table(features, task.vocabulary.item, table, "items table")
    parts = []
    for begin in range(0, len(ids), CHUNK):
        rows = torch.arange(begin, min(begin + CHUNK, len(ids)))
        parts.append(embedder(ItemBatch(row=rows, features={"item_id": ids[rows], **columns.take(rows)})))
    nulls = pa.table({name: pa.nulls(1, table.schema.field(name).type) for name in features})
    columns = encode_table(features, task.vocabulary.item, nulls, "items table")
    content = (embedder.content_table, embedder.has_content) if embedder.adapter is not None else None
    if content is not None:  # a catalog of one item without content
        embedder.refresh(content[0][:1] * 0, torch.zeros(1, dtype=torch.bool))
    try:
        row = torch.zeros(1, dtype=torch.int64)
        unknown = embedder(ItemBatch(row=row, features={"item_id": row, **columns.take(row)}))[0]
    finally:
        if content is not None:
            embedder.refresh(*content)
    return torch.cat(parts).float().contiguous(), unknown.float().contiguous()


@torch.no_grad()
def draw(
    task: RankingTask, vectors: Tensor, batch: int, length: int, values: int, seed: int = 0
) -> tuple[Inputs, dict[str, Tensor]]:
    """Random impressions as inputs of the graph, and the outputs of the ranker in torch.

    Args:
        task: the ranker.
        vectors: (N, D) item vectors.
        batch: number of impressions B.
        length: length of the longest history; the second history is empty.
        values: number of values of the first multi-valued feature; each further one has one value more, unless 0.
        seed: seed of the random numbers.

    Returns:
        The inputs by name, and `logit` (B,) and `probability` (B,).
    """
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, length + 1, (batch,), generator=g)
    lengths[0] = length
    lengths[1:2] = 0
    target = torch.randint(0, len(vectors), (batch,), generator=g)
    history = torch.randint(0, len(vectors), (batch, length), generator=g)
    inputs: Inputs = {"target": vectors[target], "history": vectors[history], "history_length": lengths}
    features: dict[str, Any] = {}
    for name, config in context_features(task)[0].items():
        inputs[PREFIX + name], features[name] = _drawn_feature(task, name, config, (batch, values), g)
        if values and inputs[PREFIX + name].ndim == 2:
            values += 1
    user = torch.randint(0, len(task.vocabulary.user_ids) + 1, (batch,), generator=g)
    context = task.context(features, user)
    if task.users is not None:
        inputs["user"] = user
        context = torch.cat([task.users(user), context], dim=1)
    is_behaviour = torch.arange(length)[None] < lengths[:, None]
    output = task.ranker(
        RankerInput(
            items=vectors,
            target=target,
            history=history[is_behaviour],
            history_offsets=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
            context=context,
        )
    )
    ports = ports_of(task, vectors.shape[1])
    logit = output.logits.float()
    return {name: inputs[name] for name in ports}, {"logit": logit, "probability": torch.sigmoid(logit)}


def _drawn_feature(
    task: RankingTask, name: str, config: FeatureConfig | CrossFeature, shape: tuple[int, int], g: torch.Generator
) -> tuple[Tensor, Tensor | Jagged]:
    """Random values of a feature, as input of the graph and as in batches."""
    batch = shape[0]
    vocabulary = context_features(task)[1].get(name)
    if isinstance(config, NumericFeature):
        assert vocabulary is not None
        middle = float(np.median(vocabulary.values)) if vocabulary.values else vocabulary.mean
        numbers = middle + vocabulary.std * 3 * torch.randn(batch, generator=g, dtype=torch.float64)
        numbers = torch.where(
            torch.rand(batch, generator=g) < 0.2, torch.nan, numbers.expm1() if config.log else numbers
        )
        return numbers, encode_column(config, vocabulary, pa.chunked_array([pa.array(numbers.numpy())]))
    if isinstance(config, CrossFeature):
        rows = config.buckets + 1
    else:
        assert vocabulary is not None, "all features but crosses have a vocabulary"
        rows = len(vocabulary.values) + 1
    if not isinstance(config, CrossFeature | MultiValuedFeature):
        values = torch.randint(0, rows, (batch,), generator=g)
        return values, values
    values = torch.randint(0, rows, shape, generator=g)
    known = values > 0
    return values, Jagged(values[known], torch.nn.functional.pad(known.sum(1).cumsum(0), (1, 0)))


def relative(output: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the expected value where that is larger than 1."""
    return float((np.abs(output - expected) / np.maximum(np.abs(expected), 1)).max())


def _int8(task: RankingTask, vectors: Tensor, path: Path) -> dict[str, Any]:
    """Write a graph with int8 weights, and compare the probabilities; the entry of the manifest."""
    quantised = quantise(path)
    inputs, expected = draw(task, vectors, 512, min(task.config.max_history, 30), 3)
    change = np.abs(Session(quantised)(inputs)["probability"] - expected["probability"].numpy())
    largest, mean = float(change.max()), float(change.mean())
    differences = {"max_probability_difference": largest, "mean_probability_difference": mean}
    warning = f"int8 changes probabilities by up to {largest:.3f}; use fp32" if largest > INT8_PROBABILITY else ""
    return {**int8_entry(quantised, differences, warning), "measured_on": "512 drawn impressions of catalog items"}


def _write_vocabulary(task: RankingTask, run: Path, out: Path) -> None:
    """Write the users of the ID table in order, and the values of features by column."""
    (out / "vocabulary").mkdir()
    shutil.copyfile(run / "vocabulary" / "users.parquet", out / "vocabulary" / "users.parquet")
    groups = {"item": task.vocabulary.item, "user": task.vocabulary.user, "context": task.vocabulary.context}
    configs = {
        "item": task.config.features.item,
        "user": task.config.features.user,
        "context": task.config.features.context,
    }
    values = {
        group: {
            name: {"config": configs[group][name].model_dump(mode="json"), **vocabulary.to_json()}
            for name, vocabulary in vocabularies.items()
        }
        for group, vocabularies in groups.items()
    }
    write_json(out / "vocabulary" / "features.json", values)


def _cross_facts(config: CrossFeature) -> dict[str, Any]:
    """The entry of a cross in the manifest."""
    return {
        "of": config.of,
        "buckets": config.buckets,
        "how": "for each combination of known rows: key = 0; for each of these rows in order: key = splitmix64(key * "
        "golden + row) modulo 2^64; the row is 1 + key modulo buckets. Rows of item_id are `id_row` of items.parquet",
        "golden": int(GOLDEN),
    }
