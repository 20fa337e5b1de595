"""What pretraining on behaviour has read is remembered, and a ranker refuses to be tested on it."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np
import pytest

from mmctr.data.embedding_identity import EmbeddingIdentity
from mmctr.data.prepare import open_dataset, prepare
from mmctr.data.splits import ColdItemsSplit, StagedSplit, TemporalSplit, split_interactions
from mmctr.manifests import write_manifest
from mmctr.run_folder import RunFolder
from mmctr.runs.behavior_splits import (
    behavior_splits,
    behavior_splits_of_run,
    behavior_splits_of_table,
    check_content,
)
from mmctr.runs.config import PretrainConfig
from tests.helpers.tiny import finetune_values, pretrain_values, start, write_config


def pretrain_config(folder: Path, **values) -> PretrainConfig:
    task = values.pop("task", {"objectives": {"behavior": {}}})
    return PretrainConfig.parse(pretrain_values(folder, **task) | values)


def a_run(folder: Path, splits) -> str:
    folder.mkdir()
    RunFolder(folder).write_metrics({"validation": {}, "behavior_splits": splits})
    return str(folder)


def a_table(folder: Path, splits) -> str:
    folder.mkdir()
    identity = EmbeddingIdentity(run="x", behavior_splits=splits).to_json()
    write_manifest(folder / "manifest.json", {"identity": identity}, [])
    return str(folder)


def test_a_run_remembers_its_split_and_those_of_the_runs_it_begins_from(toy_folder, tmp_path):
    own = behavior_splits(pretrain_config(toy_folder), str(toy_folder))
    assert own == [{"data": str(toy_folder.resolve()), "split": ColdItemsSplit().model_dump(mode="json")}]
    assert behavior_splits(pretrain_config(toy_folder, task={"objectives": {"clip": {}}}), str(toy_folder)) == []
    earlier = [{"data": "/elsewhere", "split": TemporalSplit().model_dump(mode="json")}]
    run, table = a_run(tmp_path / "run", earlier), a_table(tmp_path / "table", earlier)
    assert behavior_splits_of_run(run) == behavior_splits_of_table(table) == earlier
    further = pretrain_config(toy_folder, init_from=run)
    assert behavior_splits(further, str(toy_folder)) == own + earlier
    taught = pretrain_config(toy_folder, task={"objectives": {"distillation": {"path": table}}})
    assert behavior_splits(taught, str(toy_folder)) == earlier
    assert behavior_splits_of_table(tmp_path / "vectors.npz") == []


@pytest.mark.parametrize(
    ("split", "refused"),
    [
        (ColdItemsSplit(cold=0.2), False),
        (ColdItemsSplit(cold=0.2, seed=1), True),
        (TemporalSplit(), True),
        (StagedSplit(new=0.3, rows=2, test_rows=2), True),
    ],
    ids=["the same", "another seed", "temporal", "staged"],
)
def test_a_ranker_is_not_tested_on_what_its_content_was_trained_on(toy_folder, tmp_path, caplog, split, refused):
    known = behavior_splits(pretrain_config(toy_folder, split={"name": "cold_items", "cold": 0.2}), str(toy_folder))
    dataset = open_dataset(toy_folder)
    splits = split_interactions(dataset.interactions, len(dataset.catalog), split)
    contents = [
        ([a_table(tmp_path / "table", known)], None, "content.path"),
        ([], a_run(tmp_path / "run", known), "content.run"),
    ]
    for paths, run, key in contents:
        if not refused:
            with caplog.at_level(logging.WARNING):
                check_content(paths, run, dataset, splits)
            assert not caplog.records
            continue
        with pytest.raises(ValueError, match=rf"{re.escape(key)}.*cold: 0.2.*; give both runs the same") as error:
            check_content(paths, run, dataset, splits)
        read = split_interactions(dataset.interactions, len(dataset.catalog), ColdItemsSplit(cold=0.2)).train
        rows = np.concatenate([part.source for part in (splits.test, *splits.stages.values())])
        items = dataset.interactions.item[rows]
        cold = np.isin(read.item, items[splits.seen[items] == 0]).sum()
        count = np.isin(rows, read.source).sum()
        assert f"hold {count:,} test rows and {cold:,} rows of cold test items of this run" in str(error.value)
        assert (count > 0) == (split.name != "cold_items") and (cold > 0) == (split.name != "temporal")


def test_validation_rows_and_other_datasets_are_warned_of(toy_folder, tmp_path, caplog):
    dataset = prepare(toy_folder, tmp_path / "prepared")  # made of the same log
    splits = split_interactions(dataset.interactions, len(dataset.catalog), ColdItemsSplit(validation=0.3))
    known = behavior_splits(pretrain_config(toy_folder), str(toy_folder))
    with caplog.at_level(logging.WARNING):
        check_content([a_table(tmp_path / "a", known)], None, dataset, splits)
        check_content([a_table(tmp_path / "b", [known[0] | {"data": "/elsewhere"}])], None, dataset, splits)
    assert len(caplog.messages) == 2
    assert "validation rows and 0 rows of cold validation items of this run" in caplog.messages[0]
    assert "behaviour of another dataset, /elsewhere" in caplog.messages[1]


def test_vectors_of_a_run_carry_its_split_to_the_ranker(toy_folder, tmp_path):
    values = pretrain_values(toy_folder, objectives={"behavior": {}})
    values["fit"]["epochs"] = 1
    start(tmp_path, "pretrain.train", write_config(tmp_path / "p.yaml", values), f"run_dir={tmp_path / 'run'}").ok()
    start(tmp_path, "mmctr", "embed", tmp_path / "run", "--out", tmp_path / "vectors").ok()
    expected = [{"data": str(toy_folder.resolve()), "split": ColdItemsSplit().model_dump(mode="json")}]
    assert behavior_splits_of_run(tmp_path / "run") == behavior_splits_of_table(tmp_path / "vectors") == expected
    content = {"name": "table", "path": str(tmp_path / "vectors"), "dim": 8, "hidden": [8]}
    config = write_config(tmp_path / "f.yaml", finetune_values(toy_folder, content, epochs=1))
    run = start(tmp_path, "finetune.train", config, f"run_dir={tmp_path / 'din'}", "split={name: temporal}")
    assert run.wait() == 1 and "was pretrained on behaviour under the split" in run.errors[0]
