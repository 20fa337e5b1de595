"""Boosted trees of GBDT+LR, grown once a run, before the linear ranker trains on the other rows."""

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
    """The vocabulary with trees, and the training impressions that the trees have not been fitted on.

    A ranker other than GBDT+LR gets the vocabulary and the impressions back as they are. The main process fits the
    trees; a run that is resumed reads them from the run folder.
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
