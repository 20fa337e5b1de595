"""`mmctr demo`: pretraining, embedding, search and three rankers on ToyWorld, each step a command of the user."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from mmctr.datasets.toy_world import ToyWorld, ToyWorldConfig
from mmctr.files import replace_folder
from mmctr.shipped import find_config, recipe_environment, recipe_module

RANKERS = ("id", "table", "joint")
"""rankers of the demo, by the content they read: none, a frozen table, a trained encoder"""


def run_demo(out: Path, seed: int) -> None:
    """Run the demo: ToyWorld, pretrain, embed, index, search, three rankers, comparison and report.html.

    The demo uses the shipped recipes and configs, in a clone and in an installation. Started again after a stop, the
    demo continues with the unfinished step.

    Args:
        out: folder of the demo.
        seed: seed of the data and of all runs.

    Raises:
        ValueError: a step fails.
    """
    started = time.perf_counter()
    out = out.resolve()
    data, pretrain, embeddings = out / "data", out / "pretrain", out / "embeddings"
    if not (data / "items.parquet").is_file():
        if data.exists() and (not data.is_dir() or any(data.iterdir())):
            raise ValueError(f"{data}: exists and holds no data of the demo; choose another --out")
        print("ToyWorld: drawing a catalog with known factors, users with known taste, and their clicks", flush=True)
        replace_folder(data, lambda folder: ToyWorld(demo_world(seed)).write(folder))

    def step(arguments: list[str]) -> None:
        shown = [
            "accelerate launch" if part == "LAUNCH" else "mmctr" if part == "MMCTR" else shlex.quote(part)
            for part in arguments
        ]
        print(f"\n$ {' '.join(shown)}", flush=True)
        threads = os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count() or 1)  # without a number the launcher warns
        launch = ["-m", "accelerate.commands.launch", "--num_cpu_threads_per_process", threads]
        launch += ["--config_file", str(find_config("configs/accelerate/cpu.yaml"))]
        command = [sys.executable]
        for part in arguments:
            command += launch if part == "LAUNCH" else ["-m", "mmctr"] if part == "MMCTR" else [part]
        if subprocess.run(command, env=recipe_environment(), check=False).returncode:
            raise ValueError(f"the step above failed; fix the cause and run `mmctr demo --out {out}` again to continue")

    step(
        [
            "LAUNCH",
            "-m",
            recipe_module("pretrain"),
            "configs/pretrain/toy.yaml",
            f"data.path={data}",
            f"run_dir={pretrain}",
            f"seed={seed}",
        ]
    )
    step(["MMCTR", "embed", str(pretrain), "--out", str(embeddings)])
    step(["MMCTR", "index", str(embeddings), "--out", str(out / "index")])
    step(["MMCTR", "search", str(out / "index"), "--text", "red striped circle", "-k", "5"])
    content = {
        "id": [],
        "table": [f"task.embedder.content.path={embeddings}"],
        "joint": [f"task.embedder.content.run={pretrain}"],
    }
    for name in RANKERS:
        config = f"configs/finetune/toy_din_{name}.yaml"
        folders = [f"data.path={data}", f"run_dir={out / f'din_{name}'}", f"seed={seed}"]
        step(["LAUNCH", "-m", recipe_module("finetune"), config, *folders, *content[name]])
    step(["MMCTR", "compare", *[str(out / f"din_{name}") for name in RANKERS], "--html", str(out / "report.html")])
    print(f"\n{time.perf_counter() - started:.0f} seconds in all. Open {out / 'report.html'}")


def demo_world(seed: int) -> ToyWorldConfig:
    """The config of the data of the demo, small enough for a laptop and large enough for significant differences."""
    return ToyWorldConfig(
        num_items=2000,
        num_users=1200,
        impressions_per_user=120,
        image_size=64,
        taste_strength=14.0,
        drift=0.2,
        seed=seed,
    )
