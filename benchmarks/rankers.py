"""DIN and DIEN beside FuxiCTR, DeepCTR-Torch and torch-rechub: speed, memory and AUC on one synthetic log.

    python benchmarks/rankers.py [--models din dien] [--rounds 3] [--train-rows 49152] [--activation dice]

The other libraries are installed from PyPI into an environment of their own (`--peers`, made when missing: 5 GB). Each
run is a process of its own; rounds go through all contestants by turns. Prints one line of JSON a run, then the medians
with ratios to FuxiCTR, both as it is and with `malloc` told to keep large blocks (which mmctr does by itself). Ratios
mean something where `busy_elsewhere` is near 0. AUC after 24 steps is no result: take `--train-rows 400000 --rounds 1`.

Ours are what `finetune.train` runs: the same task, collator, `fit` and `predict`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ctr_log import MAX_HISTORY, NUM_CATEGORIES, NUM_ITEMS, NUM_USERS, read_log, write_logs

HERE = Path(__file__).resolve().parent
# glibc then reuses blocks of up to a gigabyte instead of returning them to the system at every operation
KEEP_HEAP = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 31),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
VARIANTS: dict[str, dict[str, Any]] = {"mmctr": {}, "mmctr bf16": {"mixed_precision": "bf16"}}


def run_ours(options: argparse.Namespace) -> None:
    import numpy as np
    import pyarrow as pa
    import torch
    from stopwatch import Stopwatch

    from mmctr.data.interactions import Impressions
    from mmctr.data.loaders import BatchPlan, TrainBatches
    from mmctr.evaluation import predict
    from mmctr.evaluation.metrics import auc
    from mmctr.features.behavior_collator import BehaviorCollator, NegativeSampler
    from mmctr.features.columns import FeatureColumns, Vocabulary
    from mmctr.features.vocabulary import RankingVocabulary
    from mmctr.runs.launch import keep_heap, make_accelerator
    from mmctr.tasks import RankingTask, RankingTaskConfig
    from mmctr.training.fit import FitConfig, fit

    keep_heap()
    torch.manual_seed(0)
    ranker: dict[str, Any] = {"name": options.ours, "mlp": [200, 80], "activation": options.activation}
    if options.ours == "din":
        ranker["attention"] = [80, 40]
    config = RankingTaskConfig.parse(
        {
            "embedder": {"id_dim": 64, "id_dropout": 0.0, "init_std": 1e-4},
            "features": {"item": {"category": {"name": "categorical", "dim": 64}}},
            "ranker": ranker,
            "user_dim": 64,
            "max_history": MAX_HISTORY,
        }
    )
    log, held_out = (read_log(options.log, name) for name in ("train", "eval"))
    categories = [str(i) for i in range(1, NUM_CATEGORIES + 1)]
    vocabulary = RankingVocabulary(
        item_ids=pa.array(np.arange(1, NUM_ITEMS + 1)),
        clicks=np.zeros(NUM_ITEMS, np.int64),
        user_ids=pa.array(np.arange(1, NUM_USERS + 1)),
        item={"category": Vocabulary(categories)},
    )

    def collator(columns: dict[str, np.ndarray], negatives: bool) -> BehaviorCollator:
        item, offsets = columns["item"].astype(np.int32), columns["offsets"]
        part = Impressions(
            user=columns["user"].astype(np.int32),
            item=item,
            label=columns["label"].astype(np.uint8),
            source=np.arange(len(item)),
            history=columns["history"].astype(np.int32),
            history_start=offsets[:-1],
            history_end=offsets[1:],
        )
        return BehaviorCollator(
            part,
            items=FeatureColumns(
                {"item_id": torch.arange(NUM_ITEMS + 1), "category": torch.from_numpy(columns["category"])}
            ),
            user_rows=torch.arange(NUM_USERS + 1),
            users=FeatureColumns({}),
            context=FeatureColumns({}),
            max_history=MAX_HISTORY,
            negatives=NegativeSampler(part, seed=0) if negatives else None,
        )

    fit_config = FitConfig.parse(
        {
            "epochs": options.epochs,
            "batch_size": options.batch_size,
            "warmup": 0,
            "decay": "constant",
            "optimizer": {"lr": 1e-3},
            "evaluations": 0.01,
            "checkpoint_every": 1_000_000,
            **VARIANTS[options.variant],
        }
    )
    folder = Path(tempfile.mkdtemp())
    accelerator = make_accelerator(fit_config, folder)
    task = RankingTask(config, vocabulary).to(accelerator.device)
    train = TrainBatches(
        BatchPlan(len(log["label"]), options.batch_size, seed=0), collator(log, config.ranker.needs_negatives)
    )
    clock = Stopwatch(options.batch_size)
    fit(
        task,
        train,
        fit_config,
        run_dir=folder,
        accelerator=accelerator,
        evaluate=lambda: {"auc": 0.5},
        primary="auc",
        seed=0,
        identity="",
    )
    impressions = collator(held_out, negatives=False)
    clock.report(
        len(held_out["label"]),
        lambda: auc(held_out["label"], predict(task, impressions, accelerator)) or float("nan"),
        library=options.variant,
        model=options.ours,
        activation=options.activation,
    )


def install(python: Path) -> None:
    """Make the environment of the other libraries, unless it is there."""
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(python.parents[1])], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "torch", "fuxictr", "torch-rechub"], check=True)
        subprocess.run([*pip, "--no-deps", "deepctr-torch"], check=True)  # its pins are older than its code works with


def run(command: list[str], environment: dict[str, str] | None = None) -> dict[str, Any]:
    done = subprocess.run(command, env={**os.environ, **(environment or {})}, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return json.loads(lines[-1])


def contestants(options: argparse.Namespace, model: str, log: Path, python: Path) -> dict[str, Any]:
    """Name -> function that makes one run."""
    common = ["--activation", options.activation, "--batch-size", str(options.batch_size)]
    common += ["--epochs", str(options.epochs)]
    result = {}
    for variant in VARIANTS:
        command = [sys.executable, __file__, "--ours", model, "--log", str(log), "--variant", variant, *common]
        result[variant] = lambda command=command: run(command)
    for library in options.libraries:
        command = [str(python), str(HERE / "peers.py"), library, model, str(log), *common]
        result[library] = lambda command=command: run(command)
        if library == "fuxictr":
            result["fuxictr, heap kept"] = lambda command=command: run(command, KEEP_HEAP)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["din", "dien"], default=["din", "dien"])
    parser.add_argument("--libraries", nargs="*", default=["fuxictr", "deepctr", "rechub"])
    parser.add_argument("--peers", type=Path, default=HERE / ".peers", help="their environment")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train-rows", type=int, default=49_152)
    parser.add_argument("--eval-rows", type=int, default=20_480)
    parser.add_argument("--activation", choices=["dice", "relu"], default="dice")
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--only", nargs="*", help="names of contestants")
    parser.add_argument("--ours", choices=["din", "dien"], help=argparse.SUPPRESS)
    parser.add_argument("--variant", default="mmctr", help=argparse.SUPPRESS)
    parser.add_argument("--log", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ours:
        return run_ours(options)
    python = options.peers / "bin" / "python"
    if options.libraries:
        install(python)
    medians: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_logs(Path(folder), options.train_rows, options.eval_rows)
        for model in options.models:
            every = contestants(options, model, Path(folder), python)
            chosen = {name: make for name, make in every.items() if not options.only or name in options.only}
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
            for _ in range(options.rounds):
                for name, make in chosen.items():
                    runs[name].append(make())
                    print(json.dumps({"contestant": name, **runs[name][-1]}), flush=True)
            medians[model] = summary(runs)
    print(json.dumps(medians, indent=2))


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of each contestant, and its ratios to both FuxiCTR runs."""
    names = ("train_rows_per_s", "eval_rows_per_s", "auc", "peak_memory_mb", "busy_elsewhere")
    result: dict[str, Any] = {
        name: {key: statistics.median(run[key] for run in some) for key in names} for name, some in runs.items()
    }
    for base in ("fuxictr", "fuxictr, heap kept"):
        if base in result:
            for numbers in result.values():
                numbers[f"ratios to {base}"] = {
                    key: round(numbers[key] / result[base][key], 2)
                    for key in ("train_rows_per_s", "eval_rows_per_s", "peak_memory_mb")
                }
    return result


if __name__ == "__main__":
    main()
