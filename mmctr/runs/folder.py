"""Begin a run folder with a config, and read sections of the config of a run folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from pydantic import TypeAdapter

from mmctr.config import Config
from mmctr.data.splits import SplitConfig
from mmctr.features.trees import Trees
from mmctr.files import fingerprint
from mmctr.run_folder import RunFolder
from mmctr.runs.config import DataConfig

logger = logging.getLogger(__name__)


def begin_folder(config: Config, folder: RunFolder, accelerator: Accelerator) -> str:
    """Create a run folder with `config.yaml`, or check that the folder holds a run of the same config. A run that ended
    before any training, for example because of a typo in the config, is replaced.

    Args:
        config: the config of the run.
        folder: the run folder.
        accelerator: processes; the main process writes.

    Returns:
        The identity of the run, which checkpoints contain: a fingerprint of the config without `run_dir`.

    Raises:
        ValueError: the folder holds a trained run of another config; the message names the first key that differs.
    """
    values = config.model_dump(mode="json")
    if accelerator.is_main_process:
        folder.path.mkdir(parents=True, exist_ok=True)
        if folder.is_begun:
            old = type(config).load(folder.config).model_dump(mode="json")
            differing = first_difference(old, values)
            if differing and not (folder.is_trained or Trees.are_saved(folder.path)):
                logger.info(
                    "%s: a run of another config ended here before it trained (%s: %r); this config replaces that one",
                    folder.path,
                    *differing[:2],
                )
                folder.item_tables.unlink(missing_ok=True)
                _write_config(config, folder)
            elif differing:
                key, before, now = differing
                raise ValueError(
                    f"{folder.path}: holds a run of another config ({key}: {before!r} in the folder, {now!r} now); "
                    f"choose another run_dir=, or delete the folder"
                )
        else:
            _write_config(config, folder)
    accelerator.wait_for_everyone()
    return fingerprint({key: value for key, value in values.items() if key != "run_dir"})


def _write_config(config: Config, folder: RunFolder) -> None:
    config.save(folder.config)
    folder.keep_place()


def first_difference(old: Any, new: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first difference between two dumped configs, `run_dir` aside, because a run folder may be moved.

    Args:
        old: the first config, or a part.
        new: the second config, or a part.
        key: the dotted key of the part.

    Returns:
        (key, old value, new value); None when the configs agree.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(n for n in new if n not in old)]:
            if key == "" and name == "run_dir":
                continue
            difference = first_difference(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))
            if difference:
                return difference
        return None
    return None if old == new else (key, old, new)


def data_config(
    run: str | Path, data: str | None, item_tables: list[str] | None = None, is_read: bool = True
) -> DataConfig:
    """The section `data` of the config of a run, or the same section for another dataset folder.

    Args:
        run: the run folder.
        data: another dataset folder; None: the dataset of the run.
        item_tables: files to join to the items; None: the columns saved in the run folder.
        is_read: whether the dataset will be read, so that the dataset must exist.

    Raises:
        ValueError: the folder holds no run, or the dataset of the run is not where it was.
    """
    folder = RunFolder(Path(run))
    values = folder.read_config()["data"]
    if data:
        values |= {"path": data, "items": None, "stream": None}
    else:
        values |= {name: folder.located(values[name]) for name in ("path", "items") if values.get(name)}
        values["item_tables"] = [folder.located(path) for path in values.get("item_tables", [])]
        if is_read and not (values.get("items") or values.get("stream") or Path(values["path"]).exists()):
            where = (
                ""
                if Path(values["path"]).is_absolute()
                else " from the folder where the run was started, nor from this"
            )
            raise ValueError(
                f"{folder.config}: data.path {values['path']!r} does not exist{where}; put the dataset there again, or "
                f"start the command in the folder that the path starts from"
            )
    if item_tables is not None:
        values |= {"item_tables": item_tables}
    elif folder.item_tables.is_file():
        values |= {"item_tables": [str(folder.item_tables)]}
    return DataConfig.parse(values, str(folder.config))


def split_config(run: str | Path) -> Any:
    """The section `split` of the config of a run, a member of `SplitConfig`.

    Raises:
        ValueError: the folder holds no run.
    """
    return TypeAdapter(SplitConfig).validate_python(RunFolder(Path(run)).read_config()["split"])
