"""Sharing of finished tasks: folders with a model card, and the Hugging Face Hub, without pickle and machine paths."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path, PureWindowsPath
from typing import Any, Self

import yaml

from mmctr.files import read_json, replace_folder, write_json, write_text
from mmctr.manifests import require_replaceable
from mmctr.run_folder import RunFolder
from mmctr.tasks.folder import saved_task, write_task

PATTERNS = ["*.safetensors", "*.json", "*.yaml", "*.parquet", "*.txt"]
"""patterns of the files that are downloaded from the hub: none of these files is code"""
SAVED = (
    *("model.safetensors", "config.yaml", "metrics.json", "README.md", "content.safetensors", "catalog.parquet"),
    *("item_tables.parquet", "encoder", "vocabulary", "expert"),
)
"""names of the files and folders beside `task.json` in a folder of `save_pretrained`"""
TEMPLATE = Path(__file__).with_name("templates") / "model_card.md"
"""Jinja template of the model card"""


class Shareable:
    """Base class of tasks with the methods for sharing, which build on `save` and `load` of the task."""

    # Not huggingface_hub.ModelHubMixin: the hook `_save_pretrained` of that class does not get the run of the task;
    # `save_pretrained` writes a config.json of the plain constructor arguments and keeps the card of an earlier task;
    # `from_pretrained` asks the hub for a config.json before the hook can choose the files; and `push_to_hub` makes the
    # repository before it is known that the task can be saved.

    config: Any

    def save(self, folder: Path) -> None:
        """Write the task into a folder."""
        raise NotImplementedError

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Load a task from a folder written by `save`."""
        raise NotImplementedError

    def save_pretrained(self, folder: str | Path, run: str | Path | None = None, name: str | None = None) -> None:
        """Write the task and a model card, `README.md`, into a folder that `from_pretrained` reads.

        Args:
            folder: the folder to write, which is created where it is missing.
            run: the run folder of the task, whose config and metrics are added, without paths of the machine.
            name: title of the card; None: the name of the folder.

        Raises:
            ValueError: the folder is a run folder, or holds other files: it is replaced whole.
        """
        folder = Path(folder)
        files = RunFolder(folder)
        if files.log.exists() or files.checkpoints.exists():
            raise ValueError(f"{folder}: is a run folder itself; give another folder to save into")
        require_replaceable(folder, files.task.name, SAVED, "saved task")
        config, metrics = _of_run(run)
        card = model_card(self, name or folder.resolve().name, config, metrics)
        replace_folder(folder, lambda temporary: self._write(temporary, config, metrics, card))

    def _write(self, folder: Path, config: dict[str, Any] | None, metrics: dict[str, Any] | None, card: str) -> None:
        """Write the files of `save_pretrained` into an empty folder."""
        files = RunFolder(folder)
        self.save(folder)
        for path in (RunFolder(files.expert).task, files.encoder / "pretrain.json"):
            if path.is_file():
                write_json(path, without_paths(read_json(path)))
        for pattern in ("config.json", "tokenizer_config.json"):
            for path in files.encoder.rglob(pattern):
                values = read_json(path)
                cleaned = {key: value for key, value in values.items() if key not in ("_name_or_path", "name_or_path")}
                if cleaned != values:
                    write_json(path, cleaned)
        if config is not None:
            write_text(files.config, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        if metrics is not None:
            files.write_metrics(metrics)
        write_text(folder / "README.md", card)
        write_task(without_paths(saved_task(folder).values), folder)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> Self:
        """Load a task from a folder or from the Hugging Face Hub.

        Args:
            name: a folder of `save_pretrained`, a run folder, or a repository of the hub (`org/name`).
            revision: branch, tag or commit of the repository.
            token: access token of the hub.

        Raises:
            ValueError: neither a folder nor a repository of that name can be read, or the task is of another kind.
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
        """Upload the files of `save_pretrained` to the Hugging Face Hub; a missing repository is created.

        Args:
            repo_id: the repository, `org/name`.
            run: the run folder of the task, whose config and metrics are added.
            private: whether a new repository is private; None: the default of the organisation.
            token: access token of the hub.
            message: commit message.

        Returns:
            The URL of the repository.

        Raises:
            ValueError: the hub refuses the upload.
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
    """A copy of a config in which each absolute path is cut to the last part.

    Paths of the training machine tell user names and folders, and are useless elsewhere.
    """
    if isinstance(value, dict):
        return {key: without_paths(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_paths(part) for part in value]
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"((?:local-dir:|file:(?://)?)?)(.*)", value, re.DOTALL)
    assert match is not None, "the pattern matches every text"
    scheme, path = match.groups()
    last = PureWindowsPath(path).name if re.match(r"[A-Za-z]:[\\/]", path) else Path(path).name
    is_path = Path(path).is_absolute() or path.startswith("~") or re.match(r"[A-Za-z]:[\\/]", path)
    return scheme + last if is_path and last else value


def _of_run(run: str | Path | None) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The config without machine paths, and the metrics of a run folder; None for a file that the folder lacks."""
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
    """The model card as Markdown: kind, loading code, data, metrics and config.

    Args:
        task: the task.
        name: title of the card, and the name by which the loading code loads the task.
        config: the config of the run; None: the card has the config of the task.
        metrics: the metrics of the run; None: no metrics.
    """
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
    """Python code that loads a task by a name, for the model card."""
    kind = type(task).__name__
    return f"from mmctr.tasks import {kind}\n\ntask = {kind}.from_pretrained({json.dumps(name)})"


def _data(task: Shareable, config: dict[str, Any] | None) -> list[str]:
    """Lines on the training data of a task, from the config of the run and the vocabulary of the task."""
    lines = []
    config = config or {}
    data = config.get("data") or {}
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
    if config.get("split"):
        lines.append(f"split: {json.dumps(config['split'])}")
    return lines


def _flat(values: Any, key: str = "") -> list[tuple[str, Any]]:
    """The leaves of nested mappings, with joined keys; lists (intervals, buckets) are left out."""
    if isinstance(values, dict):
        return [leaf for name, part in values.items() for leaf in _flat(part, f"{key} {name}".strip())]
    return [] if isinstance(values, list) else [(key, values)]


def _first_line(error: Exception) -> str:
    """The first line of an error message, or the class of the error without a message."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
