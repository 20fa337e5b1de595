"""Pretrain item embeddings: pictures, texts and behaviour of a catalog into one space.

    accelerate launch -m pretrain.train configs/pretrain/toy.yaml [key=value ...]

Every recipe knows `data.path=`, `run_dir=` and `seed=`. The run folder holds config.yaml, model.safetensors, encoder/,
metrics.json, log.jsonl and checkpoints/. Started again after a crash, the run goes on. Next: `mmctr embed RUN`.
"""

from __future__ import annotations

import logging
from typing import Any

from mmctr.evaluation.pretraining import evaluate_pretraining, reported
from mmctr.runs.config import PretrainConfig
from mmctr.runs.launch import end_run, run_recipe, start_run
from mmctr.runs.pretrain_data import open_pretrain_data
from mmctr.tasks import PretrainTask
from mmctr.training.fit import fit

# not __name__, which is "__main__" in a recipe that was started: `run_recipe` shows loggers below "mmctr"
logger = logging.getLogger("mmctr.pretrain")


def main(config: PretrainConfig) -> dict[str, Any]:
    run = start_run(config)
    accelerator = run.accelerator

    run.seed_torch("weights")
    task = PretrainTask(config.task)
    if config.init_from is not None:
        task.init_from(config.init_from)
    task.to(run.device)

    # data: items with content, a seeded part of them for validation; partners for the objectives that ask for them
    data = open_pretrain_data(config, task, run)
    logger.info(f"{config.data.path}: {data.summary()}")
    batches = data.batches(
        config.fit.batch_size, config.fit.num_workers, accelerator.process_index, accelerator.num_processes
    )
    task.start_training(data.num_keys, data.num_train_items)
    task.to(run.device)  # the queue of earlier features is new

    def evaluate() -> dict[str, float]:
        return evaluate_pretraining(task, data.validation, accelerator)

    result = fit(task, batches, config.fit, run, evaluate=evaluate, primary=config.primary_metric, evaluate_first=True)

    metrics, untrained = reported(task, evaluate()), reported(task, result.untrained)
    if run.is_main_process:
        task.save(run.folder.path)
        run.folder.write_metrics(
            {"validation": metrics, "untrained": untrained, "training": result.to_json(), **data.counts}
        )
        for name, value in metrics.items():
            logger.info(f"validation {name:28} {value:.4f}   untrained {untrained[name]:.4f}")
    end_run(run)
    return metrics


if __name__ == "__main__":
    run_recipe(main, PretrainConfig)
