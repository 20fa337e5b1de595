"""How fast an image tower embeds pictures in each precision of `mmctr embed`: random weights, by turns in one process.

    python benchmarks/embed.py [--model ViT-B-32] [--batch 32] [--rounds 5]

Prints JSON: items a second (median and best of the rounds), the ratio to fp32 (of medians), and the lowest cosine of
the vectors to those of fp32. Weights are drawn from the model's config, nothing is fetched. Compare numbers of one run
only.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time

import torch
from stopwatch import _cpu_seconds, _own_seconds

from mmctr.data.batches import ItemBatch
from mmctr.runs.precision import lower
from mmctr.tasks import PretrainTask, PretrainTaskConfig

PRECISIONS = ("fp32", "bf16", "int8")


def make_task(model: str) -> PretrainTask:
    torch.manual_seed(0)
    return PretrainTask(PretrainTaskConfig.parse({"encoder": {"name": "openclip", "model": model}})).eval()


def pictures(count: int, size: int) -> ItemBatch:
    """Smooth colours with some noise."""
    g = torch.Generator().manual_seed(0)
    coarse = torch.nn.functional.interpolate(torch.rand(count, 3, 7, 7, generator=g), (size, size), mode="bicubic")
    pixels = (coarse + 0.1 * torch.randn(coarse.shape, generator=g)).clamp(0, 1) * 255
    there = torch.ones(count, dtype=torch.bool)
    return ItemBatch(row=torch.arange(count), image=pixels.to(torch.uint8), has_image=there)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    exact = make_task(arguments.model)
    tasks = {name: copy.deepcopy(exact) for name in PRECISIONS}
    for name, task in tasks.items():
        lower(task, name)
    batch = pictures(arguments.batch, exact.encoder.image_size)
    vectors = {name: task.image_features(batch) for name, task in tasks.items()}  # the first pass is not timed
    seconds: dict[str, list[float]] = {name: [] for name in PRECISIONS}
    foreign, started = _cpu_seconds() - _own_seconds(), time.perf_counter()
    for _ in range(arguments.rounds):
        for name, task in tasks.items():
            began = time.perf_counter()
            task.image_features(batch)
            seconds[name].append(time.perf_counter() - began)
    elsewhere = (_cpu_seconds() - _own_seconds() - foreign) / (time.perf_counter() - started)
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    report = {
        "model": arguments.model,
        "batch": arguments.batch,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "items_per_s": {name: round(arguments.batch / middle[name], 1) for name in PRECISIONS},
        "best_items_per_s": {name: round(arguments.batch / min(seconds[name]), 1) for name in PRECISIONS},
        "times_fp32": {name: round(middle["fp32"] / middle[name], 2) for name in PRECISIONS},
        "min_cosine": {name: round(float((vectors[name] * vectors["fp32"]).sum(1).min()), 5) for name in PRECISIONS},
        "busy_elsewhere": round(max(0.0, elsewhere), 2),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
