"""What the commands do with finished runs: embed a catalog, embed a query, evaluate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from pydantic import TypeAdapter

from mmctr.data.batches import ItemBatch
from mmctr.data.content import ItemContent
from mmctr.data.images import PictureError, decode_picture
from mmctr.data.interactions import Impressions, Interactions, SplitConfig, Splits, split_interactions
from mmctr.data.loaders import BehaviorCollator
from mmctr.data.prepare import Dataset, open_dataset
from mmctr.data.ranking import RankingData
from mmctr.data.tables import as_text
from mmctr.embeddings import begun_identity, write_embeddings
from mmctr.evaluation import Modality, embed_batch, embed_catalog, embed_items, embed_rows, full_report, predict
from mmctr.files import fingerprint, read_json
from mmctr.fusion import ContentTable
from mmctr.held_out import evaluate_pretraining
from mmctr.precision import Precision, choose, lower
from mmctr.pretraining import PretrainData, StreamData, stream_content
from mmctr.probes import retrieval_both_ways
from mmctr.runs import DataConfig, item_content, keep_heap, open_data, pair_rows
from mmctr.tasks import PretrainTask, RankingTask

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
) -> None:
    """Write the vectors of a catalog into `out`; every process of a launch writes some of the shards.

    Args:
        precision: of the towers; "auto": the one the folder was begun with, else the fastest that keeps the vectors
            (see `mmctr.precision.choose`), measured on items of this catalog by one process for all.
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

    write_embeddings(
        Path(out),
        item_ids,
        titles,
        encode,
        identity,
        facts=facts,
        shard_size=shard_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        wait=accelerator.wait_for_everyone,
    )
    if accelerator.is_main_process:
        manifest = read_json(Path(out) / "manifest.json")
        print(f"{out}: {manifest['vectors']} vectors, {manifest['without content']} items without content")


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


@torch.inference_mode()
def query_vector(run: str, text: str | None, image: str | None) -> np.ndarray:
    """The (D,) unit vector of a text or of a picture file, in the space of a pretraining run."""
    task = load_encoder(Path(run))
    row = torch.zeros(1, dtype=torch.int64)
    if text is not None:
        if not text.strip():
            raise ValueError("--text is empty: give at least one word")
        there = torch.ones(1, dtype=torch.bool)
        items = ItemBatch(row=row, input_ids=task.encoder.tokenize([text]).long(), has_text=there)
    else:
        path = Path(str(image))
        try:
            resize = data_config(Path(run), None).image_resize
            picture = decode_picture(path.read_bytes(), task.encoder.image_size, resize)
        except FileNotFoundError:
            raise ValueError(f"--image {path}: no such file") from None
        except PictureError as error:
            raise ValueError(f"--image {path}: {error}") from None
        items = ItemBatch(row=row, image=picture[None], has_image=torch.ones(1, dtype=torch.bool))
    return task.embed(items)[0][0].numpy()


def evaluate_run(run: str, data: str | None) -> dict[str, Any]:
    """The numbers of `metrics.json`, computed again from the run folder; or of a ranker on all rows of another log."""
    folder, accelerator = Path(run), Accelerator()
    keep_heap()
    if read_json(folder / "task.json")["kind"] == "pretrain":
        return {"validation": _evaluate_pretraining(folder, data, accelerator)}
    task, dataset, _ = open_ranker(folder, data, accelerator)
    own = data is None
    ranking = _ranking_data(task, dataset)
    task.to(accelerator.device)
    if own:
        splits = _splits(folder, dataset)
        parts = {"validation": splits.validation, "test": splits.test}
    else:
        parts = {"test": _all_impressions(dataset.interactions)}
    result = {}
    for name, part in parts.items():
        scores = predict(task, ranking.collator(part), accelerator)
        result[name] = full_report(part, scores, ranking.id_rows[part.item] == 0, ranking.clicks[part.item])
    return result


def open_ranker(run: Path, data: str | None, accelerator: Accelerator) -> tuple[RankingTask, Dataset, np.ndarray]:
    """The task of a ranker's run with the catalog it was trained on or another one, which a live encoder embeds anew;
    and the (N,) rows of its items in the ID table, 0 for cold ones."""
    task = RankingTask.load(run)
    config = data_config(run, data)
    dataset = open_dataset(config.path, config.items)
    task.bind(dataset.catalog.item_ids)
    if data is not None and task.embedder.encoder is not None:
        pretrained: PretrainTask = task.embedder.encoder  # type: ignore[assignment]
        live = item_content(dataset, config, pretrained, accelerator)
        task.embedder.refresh(*embed_catalog(pretrained, live, len(dataset.catalog), accelerator))
    return task, dataset, task.vocabulary.item_rows(dataset.catalog.item_ids)


def ranked_impressions(
    run: Path, task: RankingTask
) -> tuple[Dataset, Impressions, Callable[[Impressions], BehaviorCollator]]:
    """The dataset of a ranker's run, its test impressions, and what makes batches of some of them."""
    config = data_config(run, None)
    dataset = open_dataset(config.path, config.items)
    task.bind(dataset.catalog.item_ids)
    return dataset, _splits(run, dataset).test, _ranking_data(task, dataset).collator


def _ranking_data(task: RankingTask, dataset: Dataset) -> RankingData:
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


def _all_impressions(log: Interactions) -> Impressions:
    values, start, end = log.histories(np.ones(len(log), bool))
    return Impressions(log.user, log.item, log.label, np.arange(len(log)), values, start, end)


def data_config(folder: Path, data: str | None) -> DataConfig:
    """The data section of a run, or that with another dataset folder."""
    values = run_config(folder)["data"]
    return DataConfig.parse(
        values | ({"path": data, "items": None, "stream": None} if data else {}), str(folder / "config.yaml")
    )
