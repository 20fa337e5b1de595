"""Train a click-through-rate ranker on IDs, side features and content, and measure it on warm and cold items.

    accelerate launch -m finetune.train configs/finetune/toy_din_table.yaml [key=value ...]

Every recipe knows `data.path=`, `run_dir=` and `seed=`. The run folder holds config.yaml, model.safetensors,
metrics.json, log.jsonl, predictions.parquet and checkpoints/, of `task.embedder.cold_ids` also cold_ids/, of a `staged`
split also stages.parquet. Started again after a crash it goes on.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet
import torch
from pydantic import Field, model_validator

from mmctr.config import Config
from mmctr.data.embeddings import read_tables
from mmctr.data.loaders import BatchPlan, TrainBatches
from mmctr.data.splits import ColdItemsSplit, SplitConfig, StagedSplit, split_interactions
from mmctr.data.tables import one_array
from mmctr.embedders.item_embedder import ContentEncoder, ContentTable
from mmctr.evaluation.predict import embed_catalog, full_report, predict, predictions_table, quick_metrics
from mmctr.features.behavior_collator import NegativeSampler
from mmctr.features.ranking_data import RankingData
from mmctr.features.trees import Trees, disjoint_rows
from mmctr.features.vocabulary import RankingVocabulary
from mmctr.files import replace_file, write_json
from mmctr.rankers import GBDTLRConfig
from mmctr.runs.config import DataConfig
from mmctr.runs.content import item_content, open_run_data
from mmctr.runs.expert import load_expert
from mmctr.runs.folder import begin_run
from mmctr.runs.launch import end_run, make_accelerator, run_recipe
from mmctr.tasks import PretrainTask, RankingTask, RankingTaskConfig
from mmctr.training.fit import FitConfig, fit
from mmctr.training.generator_tasks import train_cold_ids
from mmctr.training.stages import StagesConfig, check_stages, save_stages, warm_up


class FinetuneConfig(Config):
    data: DataConfig
    split: SplitConfig = ColdItemsSplit()
    task: RankingTaskConfig = RankingTaskConfig()
    fit: FitConfig = FitConfig()
    primary: Literal["gauc", "auc", "gauc_warm", "gauc_cold"] = "gauc"
    """what early stopping looks at, on the validation rows"""
    cold_fit: FitConfig = FitConfig()
    """how `task.embedder.cold_ids` are learned, after `fit`"""
    stages: StagesConfig = StagesConfig()
    """how new items of a `staged` split are warmed up, after that"""
    run_dir: str
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one_accelerator(self) -> FinetuneConfig:
        for name in ("tracker", "mixed_precision"):
            value = getattr(self.cold_fit, name)
            if value not in (None, getattr(self.fit, name)):
                raise ValueError(f"cold_fit.{name}: {value!r}, but it is that of the whole run; set fit.{name} instead")
        return self

    @model_validator(mode="after")
    def _new_items_can_be_warmed_up(self) -> FinetuneConfig:
        if isinstance(self.split, StagedSplit):
            check_stages(self.task, self.stages)
        return self


def main(config: FinetuneConfig) -> dict:
    run_dir = Path(config.run_dir)
    accelerator = make_accelerator(config.fit, run_dir)
    identity = begin_run(config, run_dir, accelerator)

    # data: the log is cut first; vocabularies then see training rows alone
    dataset = open_run_data(config.data, run_dir, accelerator)
    log, catalog = dataset.interactions, dataset.catalog
    splits = split_interactions(log, len(catalog), config.split)
    if len(np.unique(splits.train.label)) < 2:
        raise ValueError(
            f"{config.data.path}: all training labels are {splits.train.label[0]}; a ranker needs clicks and "
            f"impressions without a click"
        )
    vocabulary = RankingVocabulary.learn(dataset, splits, config.task.features)
    accelerator.print(f"{config.data.path}: {splits.report}")

    # content: nothing, a frozen table, or an encoder with the vectors it has now
    content_config, table, encoder, content = config.task.embedder.content, None, None, None
    if isinstance(content_config, ContentTable):
        table = read_tables(content_config.path, catalog.item_ids)
    if isinstance(content_config, ContentEncoder):
        encoder = PretrainTask.load(content_config.run).to(accelerator.device)
        content = item_content(dataset, config.data, encoder, accelerator)
        table = embed_catalog(encoder, content, len(catalog), accelerator)
    if table is not None:
        accelerator.print(f"content: {int(table[1].sum())} of {len(catalog)} items, {table[0].shape[1]} dimensions")

    frozen = table if isinstance(content_config, ContentTable) else None

    def see(known: RankingVocabulary) -> RankingData:
        return RankingData(dataset, known, config.task.features, config.task.max_history, frozen)

    # GBDT+LR: trees learn on some training rows, all else on the others
    ranker, train_rows = config.task.ranker, splits.train
    if isinstance(ranker, GBDTLRConfig):
        tree_rows, linear_rows = disjoint_rows(len(splits.train), ranker.trees.share, config.seed)
        train_rows = splits.train.take(linear_rows)
        if not (run_dir / "trees.json").is_file() and accelerator.is_main_process:
            part = splits.train.take(tree_rows)
            see(vocabulary).fit_trees(ranker.trees, part, config.task.embedder.id_dropout, config.seed).save(run_dir)
        accelerator.wait_for_everyone()
        vocabulary = replace(vocabulary, trees=Trees.load(run_dir))
    data = see(vocabulary)

    # MAKE: a ranker on content, trained before on these rows, hands over what it knows
    expert, make = None, config.task.make
    if make is not None:
        expert = load_expert(make, config.data.path, config.data.items, config.split, vocabulary, catalog.item_ids)

    torch.manual_seed(config.seed)
    task = RankingTask(config.task, vocabulary, table, encoder, catalog.item_ids, expert)
    if config.task.mini_batch_l2:
        task.count_samples(*data.samples(train_rows))
    task.to(accelerator.device)

    # the encoder runs on training batches only while it learns; else its table says the same
    encodes = isinstance(content_config, ContentEncoder) and not content_config.frozen
    train_collator = data.collator(
        train_rows,
        content=content if encodes else None,
        encode_history=encodes and content_config.encodes_history,  # type: ignore[union-attr]
        max_encoded=content_config.max_encoded if encodes else None,  # type: ignore[union-attr]
        negatives=NegativeSampler(splits.train, config.seed) if ranker.needs_negatives else None,
        id_dropout=config.task.embedder.id_dropout,
        user_dropout=config.task.user_dropout,
        seed=config.seed,
    )
    plan = BatchPlan(
        len(train_rows), config.fit.batch_size, config.seed, accelerator.process_index, accelerator.num_processes
    )
    train = TrainBatches(plan, train_collator, config.fit.num_workers)
    validation_collator, test_collator = data.collator(splits.validation), data.collator(splits.test)
    cold = {"validation": splits.seen[splits.validation.item] == 0, "test": splits.seen[splits.test.item] == 0}

    def evaluate() -> dict[str, float]:
        stale: dict[str, float] = {}
        if encodes:
            assert encoder is not None and content is not None
            stale = task.embedder.refresh(*embed_catalog(encoder.eval(), content, len(catalog), accelerator))
        scores = predict(task, validation_collator, accelerator)
        return quick_metrics(splits.validation, scores, cold["validation"]) | stale

    common: dict[str, Any] = {
        "run_dir": run_dir,
        "accelerator": accelerator,
        "seed": config.seed,
        "identity": identity,
    }
    result = fit(task, train, config.fit, evaluate=evaluate, primary=config.primary, **common)

    # cold IDs: the ranker is frozen, and what items without an ID of their own read is learned on the others
    if task.embedder.generator is not None:
        result["cold_ids"] = train_cold_ids(
            task,
            data,
            train_rows,
            splits.validation,
            config.cold_fit,
            primary=config.primary,
            steps_before=result["steps"],
            **common,
        )

    # the test rows are touched once, with the weights of the best validation
    parts = {"validation": (splits.validation, validation_collator), "test": (splits.test, test_collator)}
    scores = {name: predict(task, collator, accelerator) for name, (_, collator) in parts.items()}

    # stages: a few rows of new items at a time train their own IDs, and the same test rows are scored again
    stages: dict[str, np.ndarray] = {}
    if splits.stages:
        warmed = warm_up(task, see, splits, config.stages, catalog.item_ids, run_dir, accelerator, config.seed)
        stages = {"cold": scores["test"], **warmed}
    if accelerator.is_main_process:
        task.save(run_dir)
        clicks = {name: splits.clicks[part.item] for name, (part, _) in parts.items()}
        metrics = {name: full_report(part, scores[name], cold[name], clicks[name]) for name, (part, _) in parts.items()}
        predictions = predictions_table(
            splits.test,
            scores["test"],
            cold["test"],
            clicks["test"],
            one_array(dataset.users["user_id"]),
            catalog.item_ids,
        )
        replace_file(run_dir / "predictions.parquet", lambda path: pyarrow.parquet.write_table(predictions, path))
        if stages:
            metrics["stages"] = save_stages(run_dir, splits.test, predictions, stages)
        tables = {"tables": task.sparsity()} if ranker.weight_dim else {}
        write_json(run_dir / "metrics.json", {**metrics, "training": result, "split": splits.report, **tables})
        for name, count in tables.get("tables", {}).items():
            print(f"{name}: {count['rows'] - count['nonzero']} of {count['rows']} features dropped")
        shown = {f"test {name:4}": metrics["test"][name] for name in ("all", "warm", "cold")}
        for name, m in (shown | metrics.get("stages", {})).items():
            if m["auc"] is not None:
                gauc = m["gauc"] or float("nan")
                print(f"{name:9}  AUC {m['auc']:.4f}  gAUC {gauc:.4f}  log loss {m['log_loss']:.4f}")
    end_run(accelerator)
    return result


if __name__ == "__main__":
    run_recipe(main, FinetuneConfig)
