"""Boosted trees of GBDT+LR, which are fitted once per run, before the linear ranker trains on the other rows."""

from __future__ import annotations

from dataclasses import replace

from mmctr.data.interactions import Impressions
from mmctr.data.prepare import Dataset
from mmctr.features.ranking_data import RankingData
from mmctr.features.trees import Trees, disjoint_rows
from mmctr.features.vocabulary import RankingVocabulary
from mmctr.rankers import GBDTLRConfig
from mmctr.runs.config import FinetuneConfig
from mmctr.runs.content import RankingContent
from mmctr.training.context import RunContext


def grow_trees(
    config: FinetuneConfig,
    dataset: Dataset,
    train: Impressions,
    vocabulary: RankingVocabulary,
    content: RankingContent,
    context: RunContext,
) -> tuple[RankingVocabulary, Impressions]:
    """Fit the trees of GBDT+LR on a part of the training impressions.

    The main process fits the trees; a resumed run reads the trees from the run folder.

    Args:
        config: the config of the run.
        dataset: the dataset.
        train: the training impressions.
        vocabulary: the vocabulary without trees.
        content: the content of the ranker.
        context: run folder and processes.

    Returns:
        The vocabulary with trees, and the training impressions on which the trees were not fitted; for a ranker other
        than GBDT+LR the unchanged arguments.
    """
    ranker = config.task.ranker
    if not isinstance(ranker, GBDTLRConfig):
        return vocabulary, train
    tree_rows, linear_rows = disjoint_rows(len(train), ranker.trees.share, config.seed)
    folder = context.folder.path
    if context.is_main_process and not Trees.are_saved(folder):
        data = RankingData(dataset, vocabulary, config.task.features, config.task.max_history, content.frozen_table)
        id_dropout = config.task.embedder.id_dropout
        data.fit_trees(ranker.trees, train.take(tree_rows), id_dropout, config.seed).save(folder)
    context.accelerator.wait_for_everyone()
    return replace(vocabulary, trees=Trees.load(folder)), train.take(linear_rows)
