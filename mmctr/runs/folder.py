"""The run folder: begun by one config, read again by later commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from mmctr.config import Config
from mmctr.data.item_tables import KEPT
from mmctr.files import fingerprint
from mmctr.runs.config import DataConfig


def begin_run(config: Config, run_dir: Path, accelerator: Accelerator) -> str:
    """Create the run folder with its `config.yaml`, or check that the one there is of the same config.

    Returns the identity of the run, for its checkpoints. Raises ValueError naming the first key that differs.
    """
    values = config.model_dump(mode="json")
    if accelerator.is_main_process:
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "config.yaml"
        if path.is_file():
            old = type(config).load(path).model_dump(mode="json")
            differing = first_difference(old, values)
            if differing:
                key, before, now = differing
                raise ValueError(
                    f"{run_dir}: holds a run of another config ({key}: {before!r} there, {now!r} now); "
                    f"choose another run_dir=, or delete the folder"
                )
        else:
            config.save(path)
    accelerator.wait_for_everyone()
    return fingerprint({key: value for key, value in values.items() if key != "run_dir"})


def first_difference(old: Any, new: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """(key, old value, new value) of the first difference between two dumped configs, None when they agree.

    `run_dir` does not count.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(n for n in new if n not in old)]:
            if key == "" and name == "run_dir":
                continue  # the folder may have been moved
            found = first_difference(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))
            if found:
                return found
        return None
    return None if old == new else (key, old, new)


def run_config(run: Path) -> dict[str, Any]:
    """The resolved config of a run folder. Raises ValueError when there is none."""
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run}: not a run folder (no config.yaml)")
    return yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))


def weights_key(run: Path) -> str:
    """What says that vectors, and names of their dimensions, are of the same weights."""
    return fingerprint((run / "model.safetensors").read_bytes())


def data_config(folder: Path, data: str | None, item_tables: list[str] | None = None) -> DataConfig:
    """The data section of a run, or that with another dataset folder. The columns of item tables are those that the run
    has kept, or those of the given files."""
    values = run_config(folder)["data"]
    if data:
        values |= {"path": data, "items": None, "stream": None}
    if item_tables is not None:
        values |= {"item_tables": item_tables}
    elif (folder / KEPT).is_file():
        values |= {"item_tables": [str(folder / KEPT)]}
    return DataConfig.parse(values, str(folder / "config.yaml"))
