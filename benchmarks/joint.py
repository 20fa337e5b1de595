"""What a budget of encoded items saves when an encoder is trained inside a ranker: rows a second and memory.

    python benchmarks/joint.py configs/finetune/toy_din_joint.yaml [key=value ...] \
        [--budgets none 128 32] [--steps 12] [--rounds 2]

Each measurement is the recipe itself in a process of its own, by turns; `none` encodes every distinct item of a step.
Prints JSON: of each budget the rows a second (median of the rounds), the peak memory in MB, and how many times the rows
a second of `none` that is. What budgets do to ranking, a study says: `mmctr coldstart configs/studies/toy_joint.yaml`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

CLONE = Path(__file__).parent.parent


def measure(config_path: str, overrides: list[str], steps: int) -> None:
    """In a process of its own: prints the line of JSON of `Stopwatch`."""
    from stopwatch import Stopwatch

    from finetune.train import main
    from mmctr.runs.config import FinetuneConfig

    with tempfile.TemporaryDirectory() as folder:
        config = FinetuneConfig.load(config_path, [*overrides, f"run_dir={folder}/run"])
        # one epoch without an evaluation in it, cut off after the steps
        watch = Stopwatch(config.fit.batch_size, skipped=2)
        fit = config.fit.model_copy(update={"epochs": 1.0, "evaluations": 1e-3, "patience": None})
        stop_after(steps)
        with contextlib.suppress(StopIteration):
            main(config.model_copy(update={"fit": fit}))
        watch.report(1, lambda: 0.0, budget=config.task.embedder.content.model_dump().get("max_encoded"))


def stop_after(steps: int) -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    taken = 0

    def count(*_: object) -> None:
        nonlocal taken
        taken += 1
        if taken == steps:
            raise StopIteration

    register_optimizer_step_post_hook(count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--budgets", nargs="+", default=["none", "128", "32"])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_intermixed_args()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(CLONE), str(Path(__file__).parent)])}
    found: dict[str, list[dict]] = {budget: [] for budget in arguments.budgets}
    for _ in range(arguments.rounds):
        for budget, lines in found.items():
            value = "null" if budget == "none" else budget
            overrides = [*arguments.overrides, f"task.embedder.content.max_encoded={value}"]
            code = f"import joint; joint.measure({arguments.config!r}, {overrides!r}, {arguments.steps})"
            run = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
            if run.returncode:
                sys.exit(run.returncode)
            lines.append(json.loads(run.stdout.splitlines()[-1]))
    speed = {budget: statistics.median(line["train_rows_per_s"] for line in lines) for budget, lines in found.items()}
    report = {
        budget: {
            "rows_per_s": speed[budget],
            "times_none": round(speed[budget] / speed["none"], 2) if "none" in speed else None,
            "peak_memory_mb": max(line["peak_memory_mb"] for line in lines),
            "busy_elsewhere": max(line["busy_elsewhere"] for line in lines),
        }
        for budget, lines in found.items()
    }
    print(json.dumps({"config": arguments.config, "threads": found[arguments.budgets[0]][0]["threads"], **report}))


if __name__ == "__main__":
    main()
