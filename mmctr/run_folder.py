"""RunFolder: the files of a training run. No other module spells the name of one of the files."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmctr.files import fingerprint, read_json, read_yaml, write_json
from mmctr.manifests import Manifest, read_manifest, write_manifest

AGAIN = "run the recipe again: a finished run writes the files of the task anew"
"""what to do about a damaged file of a run, for messages"""


@dataclass(frozen=True)
class RunFolder:
    """A folder that `pretrain.train` or `finetune.train` writes, and that later commands read.

    Example:
        ```python
        from pathlib import Path

        run = mmctr.RunFolder(Path("demo/din_table"))
        print(run.read_config()["seed"], run.read_metrics()["test"]["cold"]["gauc"])
        ```
    """

    path: Path
    """the folder, whether or not it exists"""

    # written at the start of the run
    @property
    def config(self) -> Path:
        """The resolved config, which loads back equal."""
        return self.path / "config.yaml"

    @property
    def place(self) -> Path:
        """The folder that relative paths of the config start from: where the recipe was started."""
        return self.path / "place.json"

    @property
    def item_tables(self) -> Path:
        """The columns joined to the items, of runs with `data.item_tables`."""
        return self.path / "item_tables.parquet"

    # written in training
    @property
    def log(self) -> Path:
        """One JSON object a line: loss terms of a step, or validation metrics."""
        return self.path / "log.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The newest state to resume from, and the weights of the best evaluation."""
        return self.path / "checkpoints"

    @property
    def tracker(self) -> Path:
        """Files of an Accelerate tracker such as TensorBoard."""
        return self.path / "tracker"

    # the saved task
    @property
    def task(self) -> Path:
        """Kind and config of the task, from which the model of the folder is built."""
        return self.path / "task.json"

    @property
    def weights(self) -> Path:
        """The weights of the best evaluation."""
        return self.path / "model.safetensors"

    @property
    def encoder(self) -> Path:
        """Architecture and tokenizer of the encoder: pretraining runs, and rankers with a live encoder."""
        return self.path / "encoder"

    @property
    def vocabulary(self) -> Path:
        """Items, users and feature values seen in training: rankers."""
        return self.path / "vocabulary"

    @property
    def content(self) -> Path:
        """The frozen vectors of a ranker with a content table."""
        return self.path / "content.safetensors"

    @property
    def catalog(self) -> Path:
        """Raw item ids in the order of the content vectors: rankers with content."""
        return self.path / "catalog.parquet"

    @property
    def expert(self) -> Path:
        """The content expert of a ranker with `task.make`."""
        return self.path / "expert"

    # results
    @property
    def metrics(self) -> Path:
        """Validation metrics; of rankers also test metrics: all, warm, cold, by clicks."""
        return self.path / "metrics.json"

    @property
    def predictions(self) -> Path:
        """Every test row of a ranker with the predicted score."""
        return self.path / "predictions.parquet"

    @property
    def stages(self) -> Path:
        """Every test row of a `staged` split with the predicted score after each stage."""
        return self.path / "stages.parquet"

    @property
    def concepts(self) -> Path:
        """Names of latent dimensions, written by `mmctr concepts`."""
        return self.path / "concepts.json"

    @property
    def is_begun(self) -> bool:
        """Whether a recipe has started in this folder."""
        return self.config.is_file()

    @property
    def is_trained(self) -> bool:
        """Whether the folder holds anything that took time to train."""
        return any(path.exists() for path in (self.log, self.checkpoints, self.weights, self.metrics))

    @property
    def is_finished(self) -> bool:
        """Whether a recipe has ended in this folder: metrics are written last."""
        return self.is_begun and self.metrics.is_file()

    def read_config(self) -> dict[str, Any]:
        """The resolved config of the run as a mapping.

        Raises:
            ValueError: the folder holds no run, or the config file is damaged.

        Example:
            ```python
            from pathlib import Path

            config = mmctr.RunFolder(Path("demo/din_id")).read_config()
            print(config["task"]["ranker"]["name"], config["fit"]["batch_size"])
            ```
        """
        if not self.is_begun:
            raise ValueError(f"{self.path}: not a run folder (no {self.config.name})")
        if self.task.is_file():
            saved = read_manifest(self.task, AGAIN)
            if self.config.name in saved.digests:
                saved.check(self.config.name)
        try:
            values = read_yaml(self.config)
        except ValueError as error:
            raise ValueError(f"{error}; train again") from None
        if not isinstance(values, dict):
            raise ValueError(f"{self.config}: holds no config; train again")
        return values

    def keep_place(self) -> None:
        """Write the folder that relative paths of the config start from, as a path from the run folder: nothing of it
        tells where on the machine both are."""
        try:
            start = os.path.relpath(os.getcwd(), self.path.resolve())
        except (ValueError, OSError):  # another drive; a working folder that was deleted
            return
        write_json(self.place, {"relative paths start from": Path(start).as_posix()})

    def located(self, path: str) -> str:
        """A path of the config as a path that can be opened from the working folder of this process.

        Args:
            path: an absolute path, or a path that starts from the folder in which the recipe was started; a glob, or a
                name of the Hub, is left as it is where no such file is in that folder.

        Returns:
            The path itself, or an absolute path.
        """
        if os.path.isabs(path) or not self.place.is_file():
            return path
        start = read_json(self.place)
        start = start.get("relative paths start from") if isinstance(start, dict) else None
        if not isinstance(start, str):
            raise ValueError(
                f"{self.place}: holds no path; delete the file, and start commands where the run was started"
            )
        there = os.path.normpath(self.path.resolve() / start / path)
        return there if os.path.exists(there) or glob.glob(there, recursive=True) else path

    def read_metrics(self) -> dict[str, Any]:
        """The metrics of the run as a mapping.

        Raises:
            ValueError: the run has not finished, or the file is damaged.

        Example:
            ```python
            from pathlib import Path

            test = mmctr.RunFolder(Path("demo/din_table")).read_metrics()["test"]
            print(f"AUC {test['all']['auc']}, of cold items {test['cold']['auc']}")
            ```
        """
        if not self.metrics.is_file():
            raise ValueError(f"{self.path}: not a finished run (no {self.metrics.name}); run the recipe again")
        return self._measured().values

    def write_metrics(self, values: dict[str, Any]) -> None:
        """Write the metrics of the run, which marks the run as finished, with digests of the predictions."""
        write_manifest(self.metrics, values, [path.name for path in (self.predictions, self.stages) if path.is_file()])

    def has_results(self, path: Path) -> bool:
        """Whether the run has written `predictions` or `stages`, which are then checked.

        Raises:
            ValueError: the file was changed or is missing, or the run has not finished.
        """
        measured = self._measured()
        if path.name not in measured.digests:
            return False
        measured.check(path.name)
        return True

    def _measured(self) -> Manifest:
        return read_manifest(self.metrics, AGAIN)

    def weights_fingerprint(self) -> str:
        """16 hexadecimal digits that identify the weights; other weights have another fingerprint."""
        return fingerprint(self.weights.read_bytes())
