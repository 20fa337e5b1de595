"""The folder of a saved task: `task.json` with kind and config of the task, `model.safetensors` with the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmctr.config import Config
from mmctr.files import replace_file
from mmctr.manifests import Manifest, read_manifest, require_types, write_manifest
from mmctr.run_folder import AGAIN, RunFolder

Kind = Literal["pretrain", "ranking"]


class HasWeights(Protocol):
    """A module, or another object with named weights."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors by name."""
        ...


def save_task(task: nn.Module, config: Config, kind: Kind, folder: Path) -> None:
    """Write the weights of a task, then `task.json` with kind and config of the task and digests of all files.

    The other files of the task must be written before.
    """
    replace_file(RunFolder(folder).weights, lambda path: save_weights(task, path))
    write_task({"kind": kind, "config": config.model_dump(mode="json")}, folder)


def write_task(values: dict[str, Any], folder: Path) -> None:
    """Write `task.json`, with digests of the files of the task that are in the folder.

    Args:
        values: {"kind", "config"}.
        folder: the folder of the task.
    """
    files = RunFolder(folder)
    single = (files.weights, files.content, files.catalog, files.config, files.place, files.item_tables)
    names = [path.name for path in single if path.is_file()]
    for part in (files.encoder, files.vocabulary, files.expert):
        names += [path.relative_to(folder).as_posix() for path in part.rglob("*") if path.is_file()]
    write_manifest(files.task, values, [name for name in names if not Path(name).name.startswith(".")])


def saved_task(folder: Path) -> Manifest:
    """`task.json` of a saved task, {"kind", "config"}, with the digests of the files.

    Raises:
        ValueError: the folder holds no saved task, or the file is damaged.
    """
    path = RunFolder(folder).task
    if not path.is_file():
        raise ValueError(f"{folder}: not the folder of a finished run (no task.json)")
    saved = read_manifest(path, AGAIN)
    require_types(saved.values, path, kind=str, config=dict)
    if saved.values["kind"] not in get_args(Kind):
        raise ValueError(f"{path}: kind is {saved.values['kind']!r}, but must be one of {', '.join(get_args(Kind))}")
    return saved


def task_kind(folder: Path) -> Kind:
    """The kind of a saved task, "pretrain" or "ranking".

    Raises:
        ValueError: the folder holds no saved task.
    """
    return saved_task(folder).values["kind"]


def task_config(folder: Path, kind: Kind) -> dict[str, Any]:
    """The config of a saved task, whose files are checked.

    Args:
        folder: the folder of a run.
        kind: the kind the task must have.

    Raises:
        ValueError: the folder holds no saved task, or a task of the other kind, or a file is missing or damaged.
    """
    manifest = saved_task(folder)
    saved = manifest.values
    if saved["kind"] != kind:
        recipe = {"pretrain": "pretrain.train", "ranking": "finetune.train"}
        raise ValueError(f"{folder}: a {saved['kind']} run; this needs a run of {recipe[kind]}")
    manifest.check()
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
        raise ValueError(f"{path}: cannot be read ({error}); {AGAIN}") from None


def load_weights(task: nn.Module, weights: dict[str, Tensor], source: Path) -> None:
    """Load weights into a task, strictly.

    Raises:
        ValueError: a weight is missing, unknown, or of another shape; the message names the file.
    """
    try:
        task.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{source}: the weights do not fit the config of the task ({reason[:300]}); {AGAIN}") from None


def save_weights(module: HasWeights, path: Path) -> None:
    """Write the state dict as one safetensors file, from copies: safetensors refuses tensors that share memory."""
    tensors = module.state_dict()
    save_file({name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}, path)
