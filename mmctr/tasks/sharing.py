"""Sharing finished tasks: folders with a model card, and the Hugging Face Hub. No pickle, and no paths of a machine."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path, PureWindowsPath
from typing import Any, Self

import yaml

from mmctr.files import read_json, write_json, write_text
from mmctr.run_folder import RunFolder

PATTERNS = ["*.safetensors", "*.json", "*.yaml", "*.parquet", "*.txt"]
"""all that is ever fetched: none of it is code"""
TEMPLATE = Path(__file__).with_name("templates") / "model_card.md"


class Shareable:
    """What tasks have for sharing, on top of `save` and `load`."""

    # Not huggingface_hub.ModelHubMixin: its hook `_save_pretrained` is not told which run the task is of, its
    # `save_pretrained` writes a config.json of the constructor's plain arguments and keeps the card of an earlier task,
    # its `from_pretrained` asks the hub for a config.json before its hook may say which files are wanted, and its
    # `push_to_hub` makes the repository before it is known that the task can be saved.

    config: Any

    def save(self, folder: Path) -> None:
        raise NotImplementedError

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        raise NotImplementedError

    def save_pretrained(self, folder: str | Path, run: str | Path | None = None, name: str | None = None) -> None:
        """Write the task and a model card, `README.md`, into a folder that `from_pretrained` reads.

        Args:
            run: the run folder the task is of: its config and its numbers go along, paths of the machine left out.
            name: title of the card (default: the name of the folder).

        Raises ValueError for the folder of a run, whose own files this would overwrite.
        """
        folder = Path(folder)
        files = RunFolder(folder)
        if files.log.exists() or files.checkpoints.exists():
            raise ValueError(f"{folder}: is a run folder itself; give another folder to save into")
        folder.mkdir(parents=True, exist_ok=True)
        self.save(folder)
        for path in (files.task, RunFolder(files.expert).task, files.encoder / "pretrain.json"):
            if path.is_file():
                write_json(path, without_paths(read_json(path)))
        for pattern in ("config.json", "tokenizer_config.json"):
            for path in files.encoder.rglob(pattern):
                values = read_json(path)
                kept = {key: value for key, value in values.items() if key not in ("_name_or_path", "name_or_path")}
                if kept != values:
                    write_json(path, kept)
        config, metrics = _of_run(run)
        if config is not None:
            write_text(files.config, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        if metrics is not None:
            files.write_metrics(metrics)
        write_text(folder / "README.md", model_card(self, name or folder.resolve().name, config, metrics))

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> Self:
        """From a folder of `save_pretrained`, a run folder, or a repository of the hub (`org/name`).

        Raises ValueError when there is no such folder and the hub does not give one, or when it holds another kind of
        task.
        """
        if Path(name).is_dir():
            return cls.load(name)
        from huggingface_hub import snapshot_download

        try:
            folder = snapshot_download(str(name), revision=revision, token=token, allow_patterns=PATTERNS)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{name}: no such folder here, and the hub did not give it ({_first_line(error)}); check the name, the "
                "network, and `hf auth login` for a private one"
            ) from error
        return cls.load(folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        run: str | Path | None = None,
        private: bool | None = None,
        token: str | None = None,
        message: str = "Upload a model of mmctr",
    ) -> str:
        """Save as `save_pretrained` does and upload that; the repository is made when there is none. Returns its URL.

        Raises ValueError when the hub refuses.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, run, name=repo_id)
            try:
                url = api.create_repo(repo_id, private=private, repo_type="model", exist_ok=True)
                api.upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    repo_type="model",
                    commit_message=message,
                    allow_patterns=[*PATTERNS, "README.md"],
                )
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"{repo_id}: the hub did not take it ({_first_line(error)}); check the name, the network, and "
                    "`hf auth login`"
                ) from error
        return str(url)


def without_paths(value: Any) -> Any:
    """A config in which of absolute paths the last part is left: they say who trained where, and help nobody else."""
    if isinstance(value, dict):
        return {key: without_paths(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_paths(part) for part in value]
    if not isinstance(value, str):
        return value
    scheme, path = re.fullmatch(r"((?:local-dir:|file:(?://)?)?)(.*)", value, re.DOTALL).groups()  # type: ignore[union-attr]
    last = PureWindowsPath(path).name if re.match(r"[A-Za-z]:[\\/]", path) else Path(path).name
    is_path = Path(path).is_absolute() or path.startswith("~") or re.match(r"[A-Za-z]:[\\/]", path)
    return scheme + last if is_path and last else value


def _of_run(run: str | Path | None) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Config without paths, and numbers, of a run folder, where it has them."""
    if run is None:
        return None, None
    config = metrics = None
    files = RunFolder(Path(run))
    if files.is_begun:
        config = without_paths(files.read_config())
        config.pop("run_dir", None)
    if files.metrics.is_file():
        metrics = files.read_metrics()
    return config, metrics


def model_card(task: Shareable, name: str, config: dict[str, Any] | None, metrics: dict[str, Any] | None) -> str:
    """Markdown: what the model is, how to load it, its data, numbers and config."""
    from huggingface_hub import ModelCard, ModelCardData

    values = without_paths(task.config.model_dump(mode="json"))
    is_encoder = type(task).__name__ == "PretrainTask"
    tags = ["item-embeddings", "multimodal"] if is_encoder else ["ctr-prediction", "recommender-systems"]
    card = ModelCard.from_template(
        ModelCardData(library_name="mmctr", tags=["mmctr", *tags]),
        template_path=str(TEMPLATE),
        name=name,
        is_encoder=is_encoder,
        task=values,
        objectives=[key for key, given in values["objectives"].items() if given is not None] if is_encoder else [],
        embedding_dim=getattr(task, "embedding_dim", None),
        code=loading_code(task, name),
        data=_data(task, config),
        metrics=[(key, value) for key, value in _flat(metrics or {}) if isinstance(value, int | float)],
        config=yaml.safe_dump(config or {"task": values}, sort_keys=False, allow_unicode=True),
    )
    return str(card) + "\n"


def loading_code(task: Shareable, name: str) -> str:
    kind = type(task).__name__
    return f"from mmctr.tasks import {kind}\n\ntask = {kind}.from_pretrained({json.dumps(name)})"


def _data(task: Shareable, config: dict[str, Any] | None) -> list[str]:
    """What the task was trained on, as far as it knows, a line each."""
    lines = []
    data = (config or {}).get("data") or {}
    if data.get("path"):
        lines.append(f"dataset: {Path(data['path']).name}")
    if data.get("text"):
        lines.append(f"text of an item: {', '.join(data['text'])}")
    if data.get("images"):
        lines.append(f"pictures: {', '.join(data['images'])}, resized by `{data.get('image_resize', 'shortest')}`")
    vocabulary = getattr(task, "vocabulary", None)
    if vocabulary is not None:
        lines.append(f"items and users seen in training: {len(vocabulary.item_ids)} and {len(vocabulary.user_ids)}")
        lines.append("the files hold the raw ids of these items and users")
        features = task.config.features
        for group in ("item", "user", "context", "cross"):
            if getattr(features, group):
                lines.append(f"{group} features: {', '.join(getattr(features, group))}")
    if (config or {}).get("split"):
        lines.append(f"split: {json.dumps(config['split'])}")  # type: ignore[index]
    return lines


def _flat(values: Any, key: str = "") -> list[tuple[str, Any]]:
    """Leaves of nested mappings with their keys joined; lists (intervals, buckets) are left out."""
    if isinstance(values, dict):
        return [leaf for name, part in values.items() for leaf in _flat(part, f"{key} {name}".strip())]
    return [] if isinstance(values, list) else [(key, values)]


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
