"""The folder of a saved task: `task.json` says what it is, `model.safetensors` holds its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmctr.config import Config
from mmctr.files import read_json, replace_file, write_json

Kind = Literal["pretrain", "ranking"]


def save_task(task: nn.Module, kind: Kind, folder: Path) -> None:
    """`task.json` with the kind and the config of the task, and `model.safetensors`."""
    config: Config = task.config  # type: ignore[assignment]
    replace_file(folder / "model.safetensors", lambda path: save_weights(task, path))
    write_json(folder / "task.json", {"kind": kind, "config": config.model_dump(mode="json")})


def _saved(folder: Path) -> dict[str, Any]:
    """{"kind", "config"}. Raises ValueError when the folder holds no saved task."""
    if not (folder / "task.json").is_file():
        raise ValueError(f"{folder}: not the folder of a finished run (no task.json)")
    return read_json(folder / "task.json")


def task_kind(folder: Path) -> Kind:
    """Raises ValueError when the folder holds no saved task."""
    return _saved(folder)["kind"]


def task_config(folder: Path, kind: Kind) -> dict[str, Any]:
    """The config of a saved task. Raises ValueError when the folder holds none, or one of the other kind."""
    saved = _saved(folder)
    if saved["kind"] != kind:
        recipe = {"pretrain": "pretrain.train", "ranking": "finetune.train"}
        raise ValueError(f"{folder}: a {saved['kind']} run; this needs a run of {recipe[kind]}")
    return saved["config"]


def task_weights(folder: Path) -> dict[str, Tensor]:
    """Raises ValueError when the file cannot be read."""
    try:
        return load_file(folder / "model.safetensors")
    except Exception as error:
        raise ValueError(f"{folder / 'model.safetensors'}: cannot be read ({error}); train the run again") from None


def save_weights(module: nn.Module, path: Path) -> None:
    """The state dict as one safetensors file; it refuses views and tensors that share memory, hence the copies."""
    tensors = module.state_dict()
    save_file({name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}, path)
