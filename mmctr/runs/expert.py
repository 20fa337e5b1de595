"""Loads the content expert of MAKE from a finished run, matched to the vocabulary of the new ranker."""

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
    """The expert of a new run, its content in the order of the catalog `item_ids`.

    Args:
        data: the section `data` of the new run's config.
        split: how the new run cuts the log.
        vocabulary: of the new run.

    Raises ValueError for a run on another dataset, or one that cut it in another way: an expert that was trained on
    the rows that are tested knows their answers.
    """
    run, source = RunFolder(Path(config.run)), f"task.make.run: {config.run}"
    if not run.is_begun or not run.task.is_file():
        raise ValueError(f"{source} is not the folder of a finished run; make it with `python -m finetune.train` first")
    theirs = run.read_config()
    for key, old, new in (
        ("path", theirs["data"]["path"], data.path),
        ("items", theirs["data"].get("items"), data.items),
    ):
        if _place(old) != _place(new):
            raise ValueError(f"{source} was trained on data.{key} {old!r}, this run on {new!r}; give both the same")
    cut, before = split.model_dump(mode="json"), theirs["split"]
    differing = [key for key in {**before, **cut} if cut.get(key) != before.get(key)]
    if differing:
        key = differing[0]
        raise ValueError(
            f"{source} was trained on another split ({key}: {before.get(key)!r} there, {cut.get(key)!r} here): it may "
            f"have seen the rows that are tested; give both runs the same split"
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


def _place(path: str | None) -> Path | None:
    return None if path is None else Path(path).resolve()
