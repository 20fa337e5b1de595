"""Pretrain item embeddings: pictures, texts and behaviour of a catalog into one space.

    accelerate launch -m pretrain.train configs/pretrain/toy.yaml [key=value ...]

Every recipe knows `data.path=`, `run_dir=` and `seed=`. The run folder holds config.yaml, model.safetensors, encoder/,
metrics.json, log.jsonl and checkpoints/. Started again after a crash it goes on. Next: `mmctr embed RUN`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import Field

from mmctr.config import Config
from mmctr.data.splits import ColdItemsSplit, SplitConfig
from mmctr.evaluation.pretraining import evaluate_pretraining
from mmctr.files import write_json
from mmctr.runs.config import DataConfig
from mmctr.runs.content import item_content, open_run_data
from mmctr.runs.folder import begin_run
from mmctr.runs.launch import end_run, make_accelerator, run_recipe
from mmctr.runs.pretrain_data import PretrainData, StreamData
from mmctr.tasks import PretrainTask, PretrainTaskConfig
from mmctr.training.fit import FitConfig, fit


class PretrainConfig(Config):
    data: DataConfig
    split: SplitConfig = ColdItemsSplit()
    """objectives on behaviour see the training part of this split alone: give the one the ranker has"""
    task: PretrainTaskConfig
    init_from: str | None = None
    """a run folder: its encoder and projections are what this run starts from. With both towers frozen a head or an
    objective on behaviour is then trained behind them, on features made once"""
    fit: FitConfig = FitConfig()
    validation: float = Field(default=0.1, gt=0, lt=1)
    """fraction of the items with picture and text held out for retrieval"""
    same: list[str] = ["text", "image"]
    """items that share one of these are no negatives of each other: `text` and `image` mean equal ones, other names are
    columns of the items table"""
    attributes: list[str] = []
    """columns of the items table: how often held-out neighbours share them is reported"""
    primary: str | None = None
    """the held-out number that chooses the best weights; None: `coclick_recall` with an objective on behaviour, else
    `mean_recall`; with `group` alone how often neighbours share its column, where that is one of `attributes`; where a
    head alone is trained its `head_elbo`"""
    run_dir: str
    seed: int = Field(default=0, ge=0)


def main(config: PretrainConfig) -> dict:
    run_dir = Path(config.run_dir)
    accelerator = make_accelerator(config.fit, run_dir)
    identity = begin_run(config, run_dir, accelerator)

    # data: items with content, a seeded part of them held out; partners for the objectives that ask for them
    torch.manual_seed(config.seed)
    task = PretrainTask(config.task)
    if config.init_from is not None:
        task.init_from(config.init_from)
    task.to(accelerator.device)
    given: dict = {"validation": config.validation, "attributes": config.attributes, "seed": config.seed}
    if config.data.stream is not None:
        data = StreamData.make(config.data, task, **given)
    else:
        dataset = open_run_data(config.data, run_dir, accelerator)
        content = item_content(dataset, config.data, task, accelerator)
        data = PretrainData.make(
            dataset, content, task, config.split, same=config.same, source=config.data.path, **given
        )
    accelerator.print(f"{config.data.path}: {data.summary()}")
    train = data.batches(
        config.fit.batch_size, config.fit.num_workers, accelerator.process_index, accelerator.num_processes
    )
    task.start_training(data.num_keys, data.num_train_items)
    task.to(accelerator.device)  # a bank is new

    def evaluate() -> dict[str, float]:
        return evaluate_pretraining(task, data.held_out, accelerator)

    result = fit(
        task,
        train,
        config.fit,
        run_dir=run_dir,
        accelerator=accelerator,
        evaluate=evaluate,
        primary=config.primary or default_primary(config),
        seed=config.seed,
        identity=identity,
        evaluate_first=True,
    )

    numbers = evaluate()
    if accelerator.is_main_process:
        task.save(run_dir)
        write_json(
            run_dir / "metrics.json",
            {"validation": numbers, "untrained": result["untrained"], "training": result, **data.counts},
        )
        for name, value in numbers.items():
            print(f"held-out {name:28} {value:.4f}   untrained {result['untrained'][name]:.4f}")
    end_run(accelerator)
    return numbers


def default_primary(config: PretrainConfig) -> str:
    objectives = config.task.objectives
    if not objectives.given:
        return "head_elbo"
    if objectives.read_behavior:
        return "coclick_recall"
    if objectives.group is not None and len(objectives.given) == 1 and objectives.group.column in config.attributes:
        return f"neighbours_share_{objectives.group.column}"  # pictures and texts are never compared
    return "mean_recall"


if __name__ == "__main__":
    run_recipe(main, PretrainConfig)
