"""`mmctr evaluate`: computes the metrics of a finished run again, on the same data or on another dataset."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from mmctr.data.prepare import Dataset
from mmctr.distributed import start_processes
from mmctr.evaluation.predict import embed_rows, full_report, predict
from mmctr.evaluation.pretraining import evaluate_pretraining, reported
from mmctr.evaluation.probes import retrieval_both_ways
from mmctr.run_folder import RunFolder
from mmctr.runs.content import item_content, open_data, pair_rows
from mmctr.runs.finished import all_impressions, load_encoder, open_ranker, ranking_data, splits_of_run
from mmctr.runs.folder import data_config, split_config
from mmctr.runs.launch import keep_heap
from mmctr.runs.pretrain_data import PretrainData, StreamData
from mmctr.tasks.folder import task_kind


def evaluate_run(
    run: str, data: str | None, item_tables: list[str] | None = None, embeddings: Sequence[str] = ()
) -> dict[str, Any]:
    """The metrics of metrics.json, computed again from the run folder, or the metrics on all rows of another dataset.

    Args:
        run: folder of a finished run.
        data: another dataset folder; None: the dataset of the run.
        item_tables: files to join to the items, in place of the columns saved in the run folder; for rankers.
        embeddings: folders with vectors of items of `data` that are new to the run (`bind_content`).

    Raises:
        ValueError: the run or the dataset cannot be read, or an argument does not fit the kind of the run.
    """
    folder, accelerator = Path(run), start_processes()
    keep_heap()
    if task_kind(folder) == "pretrain":
        if item_tables is not None:
            raise ValueError(f"{run}: --item-tables is for rankers, this is a run of pretrain.train")
        return {"validation": _evaluate_pretraining(folder, data, accelerator)}
    task, dataset, _ = open_ranker(folder, data, accelerator, item_tables, embeddings)
    ranking = ranking_data(task, dataset)
    task.to(accelerator.device)
    if data is None:
        splits = splits_of_run(folder, dataset)
        parts = {"validation": splits.validation, "test": splits.test}
    else:
        parts = {"test": all_impressions(dataset.interactions)}
    result = {}
    for name, part in parts.items():
        scores = predict(task, ranking.collator(part), accelerator)
        result[name] = full_report(part, scores, ranking.id_rows[part.item] == 0, ranking.clicks[part.item])
    return result


def _evaluate_pretraining(folder: Path, data: str | None, accelerator: Accelerator) -> dict[str, float]:
    """The validation metrics of a pretraining run, or retrieval on all items of another dataset."""
    task = load_encoder(folder).to(accelerator.device)
    if data is not None and not task.shares_space:
        raise ValueError(
            f"{folder}: pictures and texts of this encoder are not in one space, and cannot be compared; leave --data "
            f"out for the metrics of the run"
        )
    config = data_config(folder, data)
    values = RunFolder(folder).read_config()
    given = {"validation": values["validation"], "attributes": values["attributes"], "seed": values["seed"]}
    if config.stream is not None and data is None:
        validation = StreamData.make(config, task, **given).validation
        return reported(task, evaluate_pretraining(task, validation, accelerator))
    dataset: Dataset = open_data(config, accelerator)
    content = item_content(dataset, config, task, accelerator)
    if data is not None:
        _, rows = pair_rows(content, 1.0, config.path)
        images, texts = (embed_rows(task, content, rows, accelerator, modality)[0] for modality in ("image", "text"))
        return retrieval_both_ways(images, texts)
    validation = PretrainData.make(
        dataset, content, task, split_config(folder), same=[], source=config.path, **given
    ).validation
    return reported(task, evaluate_pretraining(task, validation, accelerator))
