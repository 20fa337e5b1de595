"""The folder of a saved task: `task.json` with kind and config of the task, `model.safetensors` with the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmctr.config import Config
from mmctr.files import read_json, replace_file, write_json
from mmctr.run_folder import RunFolder

Kind = Literal["pretrain", "ranking"]


class HasWeights(Protocol):
    """A module, or another object with named weights."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors by name."""
        ...


def save_task(task: nn.Module, config: Config, kind: Kind, folder: Path) -> None:
    """Write `task.json` with the kind and the config of a task, and `model.safetensors` with the weights."""
    replace_file(RunFolder(folder).weights, lambda path: save_weights(task, path))
    write_json(RunFolder(folder).task, {"kind": kind, "config": config.model_dump(mode="json")})


def _saved(folder: Path) -> dict[str, Any]:
    """The content of `task.json`, {"kind", "config"}; ValueError when the folder holds no saved task."""
    path = RunFolder(folder).task
    if not path.is_file():
        raise ValueError(f"{folder}: not the folder of a finished run (no task.json)")
    return read_json(path)


def task_kind(folder: Path) -> Kind:
    """The kind of a saved task, "pretrain" or "ranking".

    Raises:
        ValueError: the folder holds no saved task.
    """
    return _saved(folder)["kind"]


def task_config(folder: Path, kind: Kind) -> dict[str, Any]:
    """The config of a saved task.

    Args:
        folder: the folder of a run.
        kind: the kind the task must have.

    Raises:
        ValueError: the folder holds no saved task, or a task of the other kind.
    """
    saved = _saved(folder)
    if saved["kind"] != kind:
        recipe = {"pretrain": "pretrain.train", "ranking": "finetune.train"}
        raise ValueError(f"{folder}: a {saved['kind']} run; this needs a run of {recipe[kind]}")
    return saved["config"]


def task_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a saved task, by name.

    Raises:
        ValueError: the file of the weights cannot be read.
    """
    path = RunFolder(folder).weights
    try:
        return load_file(path)
    except Exception as error:
        raise ValueError(f"{path}: cannot be read ({error}); train the run again") from None


def save_weights(module: HasWeights, path: Path) -> None:
    """Write the state dict as one safetensors file, from copies: safetensors refuses tensors that share memory."""
    tensors = module.state_dict()
    save_file({name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}, path)
