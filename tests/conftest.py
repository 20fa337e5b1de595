from __future__ import annotations

import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: workers share the cores

from mmctr.cli.main import main
from mmctr.datasets.toy_world import ToyWorld, ToyWorldConfig
from tests.helpers.tiny import finetune_values, pretrain_values, start, write_config


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """Datasets prepared by tests go into a folder of this session, not into the user's cache."""
    before = os.environ.get("MMCTR_CACHE")
    os.environ["MMCTR_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield Path(os.environ["MMCTR_CACHE"])
    if before is None:
        del os.environ["MMCTR_CACHE"]
    else:
        os.environ["MMCTR_CACHE"] = before


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory) -> Path:
    """A ToyWorld of 120 items and 60 users, as a dataset folder; not to be written to."""
    config = ToyWorldConfig(num_items=120, num_users=60, impressions_per_user=30, image_size=32)
    return ToyWorld(config).write(tmp_path_factory.mktemp("toy") / "small")


@pytest.fixture(scope="session")
def runs(toy_folder, tmp_path_factory) -> Path:
    """A folder with the runs `pretrain`, `id`, `table`, `joint` and `trees`, `embeddings` and `index`; not to be
    written to."""
    folder = tmp_path_factory.mktemp("runs")
    values = pretrain_values(toy_folder)
    values["fit"]["epochs"] = 1
    start(folder, "pretrain.train", write_config(folder / "p.yaml", values), f"run_dir={folder / 'pretrain'}").ok()
    main(["embed", str(folder / "pretrain"), "--out", str(folder / "embeddings")])
    main(["index", str(folder / "embeddings"), "--out", str(folder / "index")])
    contents = {
        "id": None,
        "table": {"name": "table", "path": str(folder / "embeddings"), "dim": 8, "hidden": [8]},
        "joint": {"name": "encoder", "run": str(folder / "pretrain"), "max_encoded": 20, "dim": 8, "hidden": [8]},
    }
    contents["trees"] = contents["table"]
    for name, content in contents.items():
        values = finetune_values(toy_folder, content, epochs=1)
        if name == "trees":
            values["task"]["ranker"] = {"name": "gbdt_lr", "trees": {"num_trees": 8, "min_rows": 5}}
        config = write_config(folder / f"{name}.yaml", values)
        start(folder, "finetune.train", config, f"run_dir={folder / name}").ok()
    return folder
