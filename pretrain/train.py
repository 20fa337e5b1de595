"""Pretrain item embeddings: pictures and texts of a catalog into one space.

    accelerate launch -m pretrain.train configs/pretrain/toy.yaml [key=value ...]

Every recipe knows `data.path=`, `run_dir=` and `seed=`. The run folder holds config.yaml, model.safetensors, encoder/,
metrics.json, log.jsonl and checkpoints/. Started again after a crash it goes on. Next: `mmctr embed RUN`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import Field

from mmctr.config import Config
from mmctr.data.loaders import BatchPlan, PairCollator, TrainBatches
from mmctr.data.tables import as_text, require_columns
from mmctr.evaluation import embed_rows, neighbour_agreement, retrieval
from mmctr.files import write_json
from mmctr.runs import DataConfig, begin_run, item_content, make_accelerator, open_data, pair_rows, run_recipe
from mmctr.tasks import PretrainTask, PretrainTaskConfig
from mmctr.training import FitConfig, fit


class PretrainConfig(Config):
    data: DataConfig
    task: PretrainTaskConfig
    fit: FitConfig = FitConfig()
    validation: float = Field(default=0.1, gt=0, lt=1)
    """fraction of the items with picture and text held out for retrieval"""
    attributes: list[str] = []
    """columns of the items table: how often held-out neighbours share them is reported"""
    run_dir: str
    seed: int = Field(default=0, ge=0)


def main(config: PretrainConfig) -> dict:
    run_dir = Path(config.run_dir)
    accelerator = make_accelerator(config.fit, run_dir)
    identity = begin_run(config, run_dir, accelerator)

    # data: items that have both a picture and a text; a seeded part is held out
    torch.manual_seed(config.seed)
    task = PretrainTask(config.task).to(accelerator.device)
    dataset = open_data(config.data, accelerator)
    require_columns(dataset.catalog.table, config.attributes, "items table")
    content = item_content(dataset, config.data, task, accelerator)
    train_rows, validation = pair_rows(content, config.validation, config.data.path)
    skipped = len(dataset.catalog) - len(train_rows) - len(validation)
    accelerator.print(
        f"{config.data.path}: {len(train_rows)} items to train on, {len(validation)} held out, "
        f"{skipped} lack picture or text"
    )
    assert content.pictures is not None
    for reason, entry in content.pictures.report["rejected"].items():
        accelerator.print(f"pictures rejected as {reason}: {entry['count']}, for example items {entry['examples']}")

    plan = BatchPlan(
        len(train_rows), config.fit.batch_size, config.seed, accelerator.process_index, accelerator.num_processes
    )

    def evaluate() -> dict[str, float]:
        if not task.shares_space:
            return {"mean_recall": 0.0}  # two spaces: nothing can be compared
        numbers = retrieval(task, content, validation, accelerator)
        if config.attributes:
            vectors, _ = embed_rows(task, content, validation, accelerator)
            for name in config.attributes:
                values = as_text(dataset.catalog.table.column(name)).take(validation).to_pylist()
                numbers[f"neighbours_share_{name}"] = neighbour_agreement(vectors, values)
        return numbers

    result = fit(
        task,
        TrainBatches(plan, PairCollator(content, train_rows), config.fit.num_workers),
        config.fit,
        run_dir=run_dir,
        accelerator=accelerator,
        evaluate=evaluate,
        primary="mean_recall",
        seed=config.seed,
        identity=identity,
        evaluate_first=True,
    )

    numbers = evaluate()
    if accelerator.is_main_process:
        task.save(run_dir)
        counts = {"train_items": len(train_rows), "validation_items": len(validation), "without_pair": skipped}
        write_json(
            run_dir / "metrics.json",
            {"validation": numbers, "untrained": result["untrained"], "training": result, **counts},
        )
        for name, value in numbers.items():
            print(f"held-out {name:28} {value:.4f}   untrained {result['untrained'][name]:.4f}")
    accelerator.end_training()
    return numbers


if __name__ == "__main__":
    run_recipe(main, PretrainConfig)
