"""FuxiCTR's DIN beside ours on the same rows of a real dataset: user and item IDs, histories, one split, one test.

    python benchmarks/same_rows.py DATASET [--seeds 0 1 2] [--l2 0 1e-6 1e-5 1e-4]

Ours is `configs/finetune/ml1m_din_id.yaml`; FuxiCTR's has the same sizes, dropout, batch and learning rate, stops early
on the same validation rows, and gets the embedding penalty that does best there with the first seed. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from ctr_log import Columns
from rankers import HERE, install, run

from mmctr.data.interactions import Impressions
from mmctr.data.prepare import Dataset, open_dataset
from mmctr.data.splits import Splits
from mmctr.evaluation.predict import full_report
from mmctr.features.behavior_collator import behaviors_read
from mmctr.features.ranking_data import RankingData
from mmctr.features.vocabulary import RankingVocabulary
from mmctr.runs.config import FinetuneConfig

CONFIG = HERE.parent / "configs" / "finetune" / "ml1m_din_id.yaml"


def log_of(part: Impressions, data: RankingData) -> Columns:
    """A split in the columns of `ctr_log`. Unknown IDs are one past the known ones; 0 is padding."""
    item_row = np.where(data.id_rows > 0, data.id_rows, data.id_rows.max() + 1)
    user_row = data.user_rows.numpy()
    user_row = np.where(user_row > 0, user_row, user_row.max() + 1)
    index, offsets = (x.numpy() for x in behaviors_read(part, slice(None), data.max_history))
    sizes = np.array([user_row.max(), item_row.max(), 1, data.max_history])
    return {
        "user": user_row[part.user].astype(np.int64),
        "item": item_row[part.item].astype(np.int64),
        "label": part.label.astype(np.float32),
        "offsets": offsets,
        "history": item_row[part.history[index]].astype(np.int64),
        "category": np.ones(item_row.max() + 1, np.int64),  # all of one: says nothing
        "sizes": sizes,
    }


def prepare(config: FinetuneConfig, folder: Path) -> Splits:
    dataset: Dataset = open_dataset(config.data.path, config.data.items)
    splits = dataset.split(config.split)
    vocabulary = RankingVocabulary.learn(dataset, splits, config.task.features)
    data = RankingData(dataset, vocabulary, config.task.features, config.task.max_history)
    for name, part in (("train", splits.train), ("validation", splits.validation), ("eval", splits.test)):
        np.savez(folder / f"{name}.npz", **log_of(part, data))
    return splits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--l2", type=float, nargs="+", default=[0.0, 1e-6, 1e-5, 1e-4])
    parser.add_argument("--peers", type=Path, default=HERE / ".peers", help="FuxiCTR's environment")
    options = parser.parse_args()
    python = options.peers / "bin" / "python"
    install(python)
    config = FinetuneConfig.load(CONFIG, [f"data.path={options.dataset}"])
    ranker = config.task.ranker
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        splits = prepare(config, folder)

        def fuxictr(seed: int, l2: float) -> tuple[dict[str, Any], dict[str, Any]]:
            command = [str(python), str(HERE / "peers.py"), "fuxictr", "din", str(folder), "--epochs", "20"]
            command += ["--activation", ranker.activation, "--dropout", str(ranker.dropout)]  # type: ignore[union-attr]
            command += ["--dim", str(config.task.embedder.id_dim), "--batch-size", str(config.fit.batch_size)]
            command += ["--l2", str(l2), "--seed", str(seed), "--predictions", str(folder / "p.npy")]
            said = run(command)
            cold = splits.seen[splits.test.item] == 0
            scores = np.load(folder / "p.npy").astype(np.float64)
            return said, full_report(splits.test, scores, cold, splits.clicks[splits.test.item])

        tried = {l2: fuxictr(options.seeds[0], l2) for l2 in options.l2}
        for l2, (said, _) in tried.items():
            print(json.dumps({"l2": l2, **said}), flush=True)
        best = max(tried, key=lambda l2: tried[l2][0]["validation_auc"])
        for seed in options.seeds:
            report = tried[best][1] if seed == options.seeds[0] else fuxictr(seed, best)[1]
            print(json.dumps(line("fuxictr", seed, report) | {"l2": best}), flush=True)
        for seed in options.seeds:
            command = [sys.executable, "-m", "finetune.train", str(CONFIG), f"data.path={options.dataset}"]
            command += [f"seed={seed}", f"run_dir={folder / str(seed)}"]
            subprocess.run(command, check=True, cwd=HERE.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            report = json.loads((folder / str(seed) / "metrics.json").read_text())["test"]
            print(json.dumps(line("mmctr", seed, report)), flush=True)


def line(library: str, seed: int, report: dict[str, Any]) -> dict[str, Any]:
    numbers = {part: {m: report[part][m] for m in ("auc", "gauc", "log_loss")} for part in ("all", "warm", "cold")}
    return {"library": library, "seed": seed, **numbers}


if __name__ == "__main__":
    main()
