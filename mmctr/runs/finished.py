"""What the commands do with finished runs: embed a catalog, embed a query, evaluate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from pydantic import TypeAdapter

from mmctr.data.content import ItemContent
from mmctr.data.embeddings import EmbeddingTable, begun_identity, read_tables, write_embeddings
from mmctr.data.interactions import Impressions, Interactions, SplitConfig, Splits, split_interactions
from mmctr.data.item_tables import KEPT
from mmctr.data.loaders import BehaviorCollator
from mmctr.data.prepare import Dataset
from mmctr.data.tables import as_text
from mmctr.embedders.item_embedder import ContentTable
from mmctr.evaluation.predict import Modality, embed_batch, embed_catalog, embed_items, embed_rows, full_report, predict
from mmctr.evaluation.pretraining import evaluate_pretraining
from mmctr.evaluation.probes import retrieval_both_ways
from mmctr.features.ranking_data import RankingData
from mmctr.files import fingerprint, read_json
from mmctr.runs.launch import DataConfig, item_content, joined_dataset, keep_heap, open_data, pair_rows
from mmctr.runs.precision import Precision, choose, lower
from mmctr.runs.pretrain_data import PretrainData, StreamData, stream_content
from mmctr.tasks import PretrainTask, RankingTask
from mmctr.tasks.folder import task_kind

MEASURED = 32
"""items of a batch that precisions are compared on"""


def run_config(run: Path) -> dict[str, Any]:
    """The resolved config of a run folder. Raises ValueError when there is none."""
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run}: not a run folder (no config.yaml)")
    return yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))


def weights_key(run: Path) -> str:
    """What says that vectors, and names of their dimensions, are of the same weights."""
    return fingerprint((run / "model.safetensors").read_bytes())


def embed_run(
    run: str,
    out: str,
    data: str | None,
    modality: Modality,
    shard_size: int,
    precision: Precision | Literal["auto"] = "fp32",
    append: bool = False,
) -> EmbeddingTable | None:
    """Write the vectors of a catalog into `out`; every process of a launch writes some of the shards.

    Args:
        precision: of the towers; "auto": the one the folder was begun with, else the fastest that keeps the vectors
            (see `mmctr.runs.precision.choose`), measured on items of this catalog by one process for all.
        append: `out` holds vectors of an earlier state of the catalog: encode the items it lacks alone.

    Returns:
        With `append`, on the main process, the table of the items that are new.
    """
    accelerator = Accelerator()
    keep_heap()
    folder = Path(run)
    task = load_encoder(folder).to(accelerator.device)
    if precision != "fp32":  # features that a frozen tower has kept are in fp32
        task.encoder.modes = dict.fromkeys(task.encoder.modes, "full")
    config = data_config(folder, data)
    titles = None
    if config.stream is not None:
        content = stream_content(config, task)
        item_ids = content.items.item_ids()
    else:
        dataset = open_data(config, accelerator)
        content, item_ids = item_content(dataset, config, task, accelerator), dataset.catalog.item_ids
        if "title" in dataset.catalog.table.column_names:
            titles = as_text(dataset.catalog.table.column("title")).to_pylist()
    identity = {
        "run": str(folder.resolve()),
        "data": str(Path(config.path).resolve()),
        "weights": weights_key(folder),
        "catalog": fingerprint(item_ids.to_pylist()),
        "modality": modality,
        "item_vector": task.config.item_vector,
        "shard_size": shard_size,
    }

    facts = None
    if precision == "auto":
        precision, facts = _chosen_precision(task, content, len(item_ids), modality, Path(out), accelerator)
    lower(task, precision)
    if precision != "fp32":
        identity["precision"] = precision

    named = np.asarray(item_ids.is_valid())  # a row of a shard may lack its id

    def encode(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        accelerator.print(f"items {rows[0]}-{rows[-1]} of {len(item_ids)}", flush=True)
        vectors, has = embed_items(task, content, rows, accelerator.device, modality)
        return vectors, has & named[rows]

    new = write_embeddings(
        Path(out),
        item_ids,
        titles,
        encode,
        identity,
        append=append,
        facts=facts,
        shard_size=shard_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        wait=accelerator.wait_for_everyone,
    )
    if accelerator.is_main_process:
        manifest = read_json(Path(out) / "manifest.json")
        print(f"{out}: {manifest['vectors']} vectors, {manifest['without content']} items without content")
    return new


@torch.inference_mode()
def _chosen_precision(
    task: PretrainTask, content: Any, num_items: int, modality: Modality, out: Path, accelerator: Accelerator
) -> tuple[Precision, dict[str, Any] | None]:
    """What `auto` means for a folder, the same in every process, and what was measured, unless the folder knows."""
    result: list[Any] = [None, None]
    if accelerator.is_main_process:
        begun, _ = begun_identity(out)
        if begun is not None:
            result[0] = begun.get("precision", "fp32")
            print(f"precision {result[0]}: as {out} was begun")
        else:
            # all over a catalog in memory; of a stream the first ones, which are in one group
            last = num_items - 1 if isinstance(content, ItemContent) else min(num_items, 2 * MEASURED) - 1
            rows = torch.from_numpy(np.unique(np.linspace(0, last, 2 * MEASURED).astype(np.int64)))
            batches = [content.batch(part).to(accelerator.device) for part in rows.split(MEASURED)]
            measured = choose(task, batches, lambda some, items: embed_batch(some, items, modality))
            print(measured, flush=True)
            result = [measured.precision, measured.facts()]
    if accelerator.num_processes > 1:
        broadcast_object_list(result)
    return result[0], result[1]


def evaluate_run(
    run: str, data: str | None, item_tables: list[str] | None = None, embeddings: Sequence[str] = ()
) -> dict[str, Any]:
    """The numbers of `metrics.json`, computed again from the run folder; or of a ranker on all rows of another log.

    Args:
        item_tables: files to join to the items instead of the columns the run has kept, for items it did not know.
        embeddings: where items of `data` that are new to the run have their vectors; see `bind_content`.
    """
    folder, accelerator = Path(run), Accelerator()
    keep_heap()
    if task_kind(folder) == "pretrain":
        if item_tables is not None:
            raise ValueError(f"{run}: --item-tables is for rankers, this is a run of pretrain.train")
        return {"validation": _evaluate_pretraining(folder, data, accelerator)}
    task, dataset, _ = open_ranker(folder, data, accelerator, item_tables, embeddings)
    own = data is None
    ranking = ranking_data(task, dataset)
    task.to(accelerator.device)
    if own:
        splits = _splits(folder, dataset)
        parts = {"validation": splits.validation, "test": splits.test}
    else:
        parts = {"test": all_impressions(dataset.interactions)}
    result = {}
    for name, part in parts.items():
        scores = predict(task, ranking.collator(part), accelerator)
        result[name] = full_report(part, scores, ranking.id_rows[part.item] == 0, ranking.clicks[part.item])
    return result


def open_ranker(
    run: Path,
    data: str | None,
    accelerator: Accelerator,
    item_tables: list[str] | None = None,
    embeddings: Sequence[str] = (),
) -> tuple[RankingTask, Dataset, np.ndarray]:
    """The task of a ranker's run with the catalog it was trained on or another one, whose content is bound to it (see
    `bind_content`); and the (N,) rows of its items in the ID table, 0 for cold ones."""
    task = RankingTask.load(run)
    config = data_config(run, data, item_tables)
    dataset = joined_dataset(config)
    item_ids = dataset.catalog.item_ids
    if data is not None or embeddings or (task.catalog_ids is not None and not task.catalog_ids.equals(item_ids)):
        bind_content(task, dataset, config, accelerator, embeddings)
    return task, dataset, task.vocabulary.item_rows(item_ids)


def bind_content(
    task: RankingTask, dataset: Dataset, config: DataConfig, accelerator: Accelerator, embeddings: Sequence[str] = ()
) -> None:
    """Give a ranker the content of another catalog, so that items that are new to it are scored as cold items.

    A live encoder encodes the catalog. A table keeps the vectors it was trained on; items it lacks take theirs from
    `embeddings`, or from the folders the table was read from where those are still there (`mmctr embed --append` adds
    new items to them).

    Raises ValueError when embeddings named are of another run: known items then have other vectors than the ranker saw.
    """
    item_ids = dataset.catalog.item_ids
    task.bind(item_ids)
    if task.expert is not None:
        bind_content(task.expert.task, dataset, config, accelerator, embeddings)
    content = task.config.embedder.content
    if task.embedder.encoder is not None:
        pretrained: PretrainTask = task.embedder.encoder  # type: ignore[assignment]
        live = item_content(dataset, config, pretrained, accelerator)
        task.embedder.refresh(*embed_catalog(pretrained, live, len(item_ids), accelerator))
    elif isinstance(content, ContentTable):
        paths = list(embeddings or content.paths)
        if not embeddings and not all(Path(path).exists() for path in paths):
            return
        kept, has = task.embedder.content_table.cpu(), task.embedder.has_content.cpu()
        vectors, there = read_tables(paths, item_ids)
        both = has & there
        if vectors.shape[1] != kept.shape[1] or not torch.allclose(vectors[both], kept[both], atol=1e-4):
            if not embeddings:
                return
            raise ValueError(
                f"{', '.join(paths)}: not the vectors this ranker was trained on (items it knows have others); give "
                f"the folders of its content.path, with the new items appended"
            )
        new = there & ~has
        task.embedder.refresh(torch.where(new[:, None], vectors, kept), has | new)
    elif embeddings and task.expert is None:
        raise ValueError("this ranker reads no content: it has no use for embeddings")


def ranked_impressions(
    run: Path, task: RankingTask
) -> tuple[Dataset, Impressions, Callable[[Impressions], BehaviorCollator]]:
    """The dataset of a ranker's run, its test impressions, and what makes batches of some of them."""
    dataset = joined_dataset(data_config(run, None))
    task.bind(dataset.catalog.item_ids)
    return dataset, _splits(run, dataset).test, ranking_data(task, dataset).collator


def ranking_data(task: RankingTask, dataset: Dataset) -> RankingData:
    content = None
    if isinstance(task.config.embedder.content, ContentTable):
        content = task.embedder.content_table, task.embedder.has_content
    return RankingData(dataset, task.vocabulary, task.config.features, task.config.max_history, content)


def _splits(run: Path, dataset: Dataset) -> Splits:
    split: Any = TypeAdapter(SplitConfig).validate_python(run_config(run)["split"])
    return split_interactions(dataset.interactions, len(dataset.catalog), split)


def _evaluate_pretraining(folder: Path, data: str | None, accelerator: Accelerator) -> dict[str, float]:
    task = load_encoder(folder).to(accelerator.device)
    config = data_config(folder, data)
    values = run_config(folder)
    given = {"validation": values["validation"], "attributes": values["attributes"], "seed": values["seed"]}
    if config.stream is not None and data is None:
        return evaluate_pretraining(task, StreamData.make(config, task, **given).held_out, accelerator)
    dataset: Dataset = open_data(config, accelerator)
    content = item_content(dataset, config, task, accelerator)
    if data is not None:
        _, rows = pair_rows(content, 1.0, config.path)
        images, texts = (embed_rows(task, content, rows, accelerator, modality)[0] for modality in ("image", "text"))
        return retrieval_both_ways(images, texts)
    split: Any = TypeAdapter(SplitConfig).validate_python(values["split"])
    held_out = PretrainData.make(dataset, content, task, split, same=[], source=config.path, **given).held_out
    return evaluate_pretraining(task, held_out, accelerator)


def load_encoder(run: Path) -> PretrainTask:
    """The task of a pretraining run, its adapters folded into the weights: it is read, not trained."""
    task = PretrainTask.load(run)
    task.encoder.merge_lora()
    return task


def all_impressions(log: Interactions) -> Impressions:
    values, start, end = log.histories(np.ones(len(log), bool))
    return Impressions(log.user, log.item, log.label, np.arange(len(log)), values, start, end)


def data_config(folder: Path, data: str | None, item_tables: list[str] | None = None) -> DataConfig:
    """The data section of a run, or that with another dataset folder. The columns of item tables are those that the run
    has kept, or those of the given files."""
    values = run_config(folder)["data"]
    if data:
        values |= {"path": data, "items": None, "stream": None}
    if item_tables is not None:
        values |= {"item_tables": item_tables}
    elif (folder / KEPT).is_file():
        values |= {"item_tables": [str(folder / KEPT)]}
    return DataConfig.parse(values, str(folder / "config.yaml"))
