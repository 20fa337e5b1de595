"""Opening of finished runs: a task with the dataset of the run or another dataset, and the data that the task reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from mmctr.data.embeddings import read_tables
from mmctr.data.interactions import Impressions, Interactions
from mmctr.data.prepare import Dataset
from mmctr.data.splits import Splits
from mmctr.embedders.item_embedder import ContentTable
from mmctr.evaluation.predict import embed_catalog
from mmctr.features.behavior_collator import BehaviorCollator
from mmctr.features.ranking_data import RankingData
from mmctr.run_folder import RunFolder
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
    """Open a ranking run with the catalog of the training or with another catalog.

    Args:
        run: folder of `finetune.train`.
        data: another dataset folder; None: the dataset of the run.
        accelerator: processes and device.
        item_tables: files to join to the items; None: the columns saved in the run folder.
        embeddings: folders with vectors of items that are new to the run (`bind_content`).

    Returns:
        The task, the dataset, and the (N,) rows of the items of the catalog in the ID table, 0 for cold items.

    Raises:
        ValueError: the run or the dataset cannot be read, or the embeddings do not fit the run.
    """
    task = RankingTask.load(run)
    config = data_config(run, data, item_tables)
    dataset = joined_dataset(config)
    item_ids = dataset.catalog.item_ids
    if data is not None or embeddings or (task.catalog_ids is not None and not task.catalog_ids.equals(item_ids)):
        bind_content(task, dataset, config, accelerator, embeddings, RunFolder(run).located)
    return task, dataset, task.vocabulary.item_rows(item_ids)


def bind_content(
    task: RankingTask,
    dataset: Dataset,
    config: DataConfig,
    accelerator: Accelerator,
    embeddings: Sequence[str] = (),
    located: Callable[[str], str] = str,
) -> None:
    """Give a ranker the content of another catalog, so that new items are scored as cold items.

    A content encoder encodes the catalog. A content table keeps the vectors of the training; vectors of new items are
    read from `embeddings`, or from the folders of the training where these still exist (`mmctr embed --append` adds new
    items to an embedding folder).

    Args:
        task: the ranker, which is changed.
        dataset: the dataset with the catalog.
        config: the section `data`.
        accelerator: processes and device.
        embeddings: folders with vectors.
        located: maps a path of the config of the run to a path that can be opened here (`RunFolder.located`).

    Raises:
        ValueError: the vectors of known items in `embeddings` differ from the vectors of the training, or the ranker
            has no content.
    """
    item_ids = dataset.catalog.item_ids
    task.bind(item_ids)
    if task.expert is not None:
        assert isinstance(task.expert.task, RankingTask)
        bind_content(task.expert.task, dataset, config, accelerator, embeddings, located)
    content = task.config.embedder.content
    if task.embedder.encoder is not None:
        pretrained = task.embedder.encoder
        assert isinstance(pretrained, PretrainTask)
        items = item_content(dataset, config, pretrained, accelerator)
        task.embedder.refresh(*embed_catalog(pretrained, items, len(item_ids), accelerator))
    elif isinstance(content, ContentTable):
        paths = list(embeddings or map(located, content.paths))
        if not embeddings and not all(Path(path).exists() for path in paths):
            return
        old_vectors, has_old = task.embedder.content_table.cpu(), task.embedder.has_content.cpu()
        vectors, has_vector = read_tables(paths, item_ids)
        both = has_old & has_vector
        if vectors.shape[1] != old_vectors.shape[1] or not torch.allclose(vectors[both], old_vectors[both], atol=1e-4):
            if not embeddings:
                return
            raise ValueError(
                f"{', '.join(paths)}: not the vectors this ranker was trained on (known items have others); give "
                f"the folders of content.path of the run, with the new items appended"
            )
        new = has_vector & ~has_old
        task.embedder.refresh(torch.where(new[:, None], vectors, old_vectors), has_old | new)
    elif embeddings and task.expert is None:
        raise ValueError("this ranker reads no content: leave the embeddings out")


def ranked_impressions(
    run: Path, task: RankingTask
) -> tuple[Dataset, Impressions, Callable[[Impressions], BehaviorCollator]]:
    """The dataset of a ranking run, the test impressions, and a function from impressions to a collator.

    Args:
        run: folder of `finetune.train`.
        task: the task of the run, whose content is put in the order of the catalog.
    """
    dataset = joined_dataset(data_config(run, None))
    task.bind(dataset.catalog.item_ids)
    return dataset, splits_of_run(run, dataset).test, ranking_data(task, dataset).collator


def ranking_data(task: RankingTask, dataset: Dataset) -> RankingData:
    """A dataset, encoded with the vocabulary of a ranker."""
    content = None
    if isinstance(task.config.embedder.content, ContentTable):
        content = task.embedder.content_table, task.embedder.has_content
    return RankingData(dataset, task.vocabulary, task.config.features, task.config.max_history, content)


def splits_of_run(run: Path, dataset: Dataset) -> Splits:
    """The training, validation and test impressions of a run, by the split of the config of the run."""
    return dataset.split(split_config(run))


def load_encoder(run: Path) -> PretrainTask:
    """The task of a pretraining run for inference, with the adapters merged into the weights.

    Raises:
        ValueError: the folder holds no finished pretraining run.
    """
    task = PretrainTask.load(run)
    task.encoder.merge_lora()
    return task


def all_impressions(log: Interactions) -> Impressions:
    """All rows of a log as impressions with histories."""
    values, start, end = log.histories(np.ones(len(log), bool))
    return Impressions(log.user, log.item, log.label, np.arange(len(log)), values, start, end)
