"""What the commands do with finished runs: embed a catalog, embed a query, evaluate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from mmctr.data.embeddings import read_tables
from mmctr.data.interactions import Impressions, Interactions
from mmctr.data.prepare import Dataset
from mmctr.data.splits import Splits, split_interactions
from mmctr.embedders.item_embedder import ContentTable
from mmctr.evaluation.predict import embed_catalog
from mmctr.features.behavior_collator import BehaviorCollator
from mmctr.features.ranking_data import RankingData
from mmctr.runs.config import DataConfig
from mmctr.runs.content import item_content, joined_dataset
from mmctr.runs.folder import data_config, split_config
from mmctr.tasks import PretrainTask, RankingTask


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
        assert isinstance(task.expert.task, RankingTask)
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
    return dataset, splits_of_run(run, dataset).test, ranking_data(task, dataset).collator


def ranking_data(task: RankingTask, dataset: Dataset) -> RankingData:
    content = None
    if isinstance(task.config.embedder.content, ContentTable):
        content = task.embedder.content_table, task.embedder.has_content
    return RankingData(dataset, task.vocabulary, task.config.features, task.config.max_history, content)


def splits_of_run(run: Path, dataset: Dataset) -> Splits:
    """The training, validation and test impressions of a run, cut again as its config says."""
    return split_interactions(dataset.interactions, len(dataset.catalog), split_config(run))


def load_encoder(run: Path) -> PretrainTask:
    """The task of a pretraining run, its adapters folded into the weights: it is read, not trained."""
    task = PretrainTask.load(run)
    task.encoder.merge_lora()
    return task


def all_impressions(log: Interactions) -> Impressions:
    values, start, end = log.histories(np.ones(len(log), bool))
    return Impressions(log.user, log.item, log.label, np.arange(len(log)), values, start, end)
