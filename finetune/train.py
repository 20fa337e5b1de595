"""Train a click-through-rate ranker on IDs, side features and content, and measure it on warm and cold items.

    accelerate launch -m finetune.train configs/finetune/toy_din_table.yaml [key=value ...]

Every recipe knows `data.path=`, `run_dir=` and `seed=`. The run folder holds config.yaml, model.safetensors,
metrics.json, log.jsonl, predictions.parquet and checkpoints/, of `task.embedder.cold_ids` also cold_ids/, of a `staged`
split also stages.parquet. Started again after a crash, the run goes on.
"""

from __future__ import annotations

import logging
from typing import Any

from mmctr.data.loaders import TrainBatches
from mmctr.data.split_checks import check_labels
from mmctr.evaluation.predict import predict, quick_metrics
from mmctr.features.behavior_collator import NegativeSampler
from mmctr.features.ranking_data import RankingData
from mmctr.features.vocabulary import RankingVocabulary
from mmctr.runs.config import FinetuneConfig
from mmctr.runs.content import open_content, open_run_data
from mmctr.runs.expert import load_expert
from mmctr.runs.grown_trees import grow_trees
from mmctr.runs.launch import end_run, run_recipe, start_run
from mmctr.runs.ranking_results import RankingScores, write_ranking_results
from mmctr.tasks import RankingTask
from mmctr.training.fit import fit
from mmctr.training.generator_tasks import train_cold_ids
from mmctr.training.stages import train_stages

# not __name__, which is "__main__" in a recipe that was started: `run_recipe` shows loggers below "mmctr"
logger = logging.getLogger("mmctr.finetune")


def main(config: FinetuneConfig) -> dict[str, Any]:
    run = start_run(config)
    accelerator, task_config = run.accelerator, config.task

    # data: the log is split first; vocabularies then hold what training rows hold
    dataset = open_run_data(config.data, run)
    item_ids = dataset.catalog.item_ids
    splits = dataset.split(config.split)
    check_labels(splits, config.data.path)
    vocabulary = RankingVocabulary.learn(dataset, splits, task_config.features)
    logger.info(f"{config.data.path}: {splits.report}")

    # content: nothing, a frozen table, or an encoder; trees of GBDT+LR; the expert of MAKE
    content = open_content(task_config.embedder.content, dataset, config.data, splits, run)
    vocabulary, train_rows = grow_trees(config, dataset, splits.train, vocabulary, content, run)

    def data_of(known: RankingVocabulary) -> RankingData:
        return RankingData(dataset, known, task_config.features, task_config.max_history, content.frozen_table)

    data = data_of(vocabulary)
    expert = None
    if task_config.make is not None:
        expert = load_expert(task_config.make, config.data, config.split, vocabulary, item_ids)

    run.seed_torch("weights")
    task = RankingTask(task_config, vocabulary, content.table, content.encoder, item_ids, expert)
    if task_config.mini_batch_l2:
        task.count_samples(*data.samples(train_rows))
    task.to(run.device)

    collator = data.collator(
        train_rows,
        content=content.items,
        encode_history=content.encodes_history,
        max_encoded=content.max_encoded,
        negatives=NegativeSampler(splits.train, config.seed) if task_config.ranker.needs_negatives else None,
        id_dropout=task_config.embedder.id_dropout,
        user_dropout=task_config.user_dropout,
        seed=config.seed,
    )
    batches = TrainBatches(run.plan(len(train_rows), config.fit.batch_size), collator, config.fit.num_workers)
    validation, test = data.collator(splits.validation), data.collator(splits.test)

    def evaluate() -> dict[str, float]:
        staleness = content.refresh(task, accelerator)
        scores = predict(task, validation, accelerator)
        return quick_metrics(splits.validation, scores, splits.is_cold(splits.validation)) | staleness

    result = fit(task, batches, config.fit, run, evaluate=evaluate, primary=config.primary)
    training = result.to_json()

    # ID vectors for items without one: the ranker is frozen, and a generator learns on items that have one
    if task.embedder.generator is not None:
        training["cold_ids"] = train_cold_ids(
            task, data, train_rows, splits.validation, config.cold_fit, run, config.primary, result.steps
        )

    # the test rows are scored once, with the weights of the best validation; then after each stage of new items
    scores = RankingScores(predict(task, validation, accelerator), predict(task, test, accelerator))
    if splits.stages:
        scores = scores.with_stages(train_stages(task, data_of, splits, config.stages, item_ids, run))
    write_ranking_results(run, task, dataset, splits, scores, training)
    end_run(run)
    return training


if __name__ == "__main__":
    run_recipe(main, FinetuneConfig)
