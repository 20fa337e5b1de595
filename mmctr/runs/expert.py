"""Loading of the expert of MAKE from a finished run, with checks that the new ranker has the same data and split."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from mmctr.config import Config
from mmctr.features.vocabulary import RankingVocabulary
from mmctr.run_folder import RunFolder
from mmctr.runs.config import DataConfig
from mmctr.tasks import RankingTask
from mmctr.tasks.ranking_config import MAKEConfig


def load_expert(
    config: MAKEConfig, data: DataConfig, split: Config, vocabulary: RankingVocabulary, item_ids: pa.Array
) -> RankingTask:
    """The expert of a new run, with content vectors in the order of the catalog.

    Args:
        config: the section `task.make` of the new run.
        data: the section `data` of the new run.
        split: the section `split` of the new run.
        vocabulary: the vocabulary of the new run.
        item_ids: (N,) raw ids of the catalog.

    Raises:
        ValueError: the run is missing, or was trained on another dataset or split: an expert that was trained on test
            rows has memorised the labels.
    """
    run, source = RunFolder(Path(config.run)), f"task.make.run: {config.run}"
    if not run.is_begun or not run.task.is_file():
        raise ValueError(f"{source} is not the folder of a finished run; make it with `python -m finetune.train` first")
    values = run.read_config()
    for key, old, new in (
        ("path", values["data"]["path"], data.path),
        ("items", values["data"].get("items"), data.items),
    ):
        if _resolved(None if old is None else run.located(old)) != _resolved(new):
            raise ValueError(f"{source} was trained on data.{key} {old!r}, this run on {new!r}; give both the same")
    new_split, old_split = split.model_dump(mode="json"), values["split"]
    differing = [key for key in {**old_split, **new_split} if new_split.get(key) != old_split.get(key)]
    if differing:
        key = differing[0]
        raise ValueError(
            f"{source} was trained on another split ({key}: {old_split.get(key)!r}, in this run "
            f"{new_split.get(key)!r}), possibly on test rows of this run; give both runs the same split"
        )
    task = RankingTask.load(run.path)
    known = task.vocabulary
    if not (
        known.item_ids.equals(vocabulary.item_ids)
        and known.user_ids.equals(vocabulary.user_ids)
        and (known.clicks == vocabulary.clicks).all()
    ):
        raise ValueError(f"{source} was trained on other rows: the dataset has changed since; train it again")
    task.bind(item_ids)
    return task


def _resolved(path: str | None) -> Path | None:
    """The absolute path of a path; None for None."""
    return None if path is None else Path(path).resolve()
