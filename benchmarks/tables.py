"""How the time of a training step depends on the number of items: DIN on random behaviours, two vocabularies by turns.

    python benchmarks/tables.py [--items 100000 10000000] [--rows adam] [--steps 20]

Prints JSON: milliseconds a step (median) for each number of items, with tables trained by rows and, where they fit,
densely, and the ratio to the first. Compare ratios of one run only; other load on the machine moves all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np
import pyarrow as pa
import torch

from mmctr.data.batches import BehaviorBatch, ItemBatch
from mmctr.features.vocabulary import RankingVocabulary
from mmctr.tasks import RankingTask, RankingTaskConfig
from mmctr.training.optimizers import OptimizerConfig, make_optimizer

BATCH, MEAN_HISTORY, NUM_USERS = 2048, 20, 50_000


def make_task(num_items: int) -> RankingTask:
    values = {
        "embedder": {"id_dim": 64},
        "ranker": {"name": "din", "attention": [80, 40], "mlp": [200, 80], "activation": "relu"},
        "user_dim": 64,
    }
    vocabulary = RankingVocabulary(
        item_ids=pa.array(np.arange(num_items)),
        clicks=np.zeros(num_items, np.int64),
        user_ids=pa.array(np.arange(NUM_USERS)),
    )
    return RankingTask(RankingTaskConfig.parse(values), vocabulary)


def make_batch(num_items: int, rng: np.random.Generator) -> BehaviorBatch:
    """Item of rank r is drawn in proportion to 1 / r, and the ranks lie scattered over the table."""
    lengths = rng.poisson(MEAN_HISTORY, BATCH)
    rank = (num_items ** rng.random(BATCH + lengths.sum())).astype(np.int64)
    ids = rank * 7_368_787 % num_items + 1
    distinct, position = np.unique(ids, return_inverse=True)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rows = torch.from_numpy(distinct)
    return BehaviorBatch(
        items=ItemBatch(row=rows - 1, features={"item_id": rows}),
        target=torch.from_numpy(position[:BATCH]),
        history=torch.from_numpy(position[BATCH:]),
        history_offsets=torch.from_numpy(offsets),
        user=torch.from_numpy(rng.integers(1, NUM_USERS + 1, BATCH)),
        context={},
        label=torch.from_numpy(rng.integers(0, 2, BATCH)).float(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[100_000, 10_000_000])
    parser.add_argument("--rows", choices=["adam", "adagrad"], default="adam")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dense-up-to", type=int, default=1_000_000, help="more items are trained by rows alone")
    arguments = parser.parse_args()

    runs = {}
    for num_items in arguments.items:
        for by_rows in (True, False):
            if by_rows or num_items <= arguments.dense_up_to:
                task = make_task(num_items).train()
                config = OptimizerConfig(rows=arguments.rows, rows_from=0 if by_rows else num_items + NUM_USERS)
                name = f"{num_items} items, {'by rows' if by_rows else 'dense'}"
                runs[name] = (num_items, task, make_optimizer(task, config, 5.0), [])
    rng = np.random.default_rng(0)
    for step in range(arguments.steps + 3):  # the first ones touch memory for the first time
        for num_items, task, optimizer, seconds in runs.values():
            batch = make_batch(num_items, rng)
            started = time.perf_counter()
            task(batch)["log_loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            if step >= 3:
                seconds.append(time.perf_counter() - started)
    milliseconds = {name: round(1000 * statistics.median(seconds), 1) for name, (*_, seconds) in runs.items()}
    first = next(iter(milliseconds.values()))
    ratios = {name: round(value / first, 2) for name, value in milliseconds.items()}
    print(json.dumps({"threads": torch.get_num_threads(), "ms_per_step": milliseconds, "ratio": ratios}, indent=2))


if __name__ == "__main__":
    main()
