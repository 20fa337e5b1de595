"""Finished runs are read with names, logs and paired differences; other folders are refused with a remedy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmctr.evaluation.metrics import paired_difference
from mmctr.reports.run import PairedDifference, load_runs
from mmctr.run_folder import RunFolder
from tests.helpers.damage import rewrite
from tests.helpers.pages import edit_metrics, make_run


def test_resumed_log_counts_the_later_line_and_skips_half_a_line(folders):
    lines = [
        '{"step": 10, "loss": 0.9}',
        '{"step": 20, "lo',
        '{"step": 10, "loss": 0.8}',
        "7",
        '{"step": 5, "loss": 1}',
    ]
    (folders[0] / "log.jsonl").write_text("\n".join(lines))
    (run,) = load_runs(folders[:1])
    assert [(point.step, point.loss) for point in run.training] == [(5, 1), (10, 0.8)]


def test_differences_are_paired_where_rows_match(folders, tmp_path):
    other = make_run(tmp_path / "other_rows", 0.9, rows=900, seed=5)
    bare = make_run(tmp_path / "bare", 0.9)
    (bare / "predictions.parquet").unlink()
    RunFolder(bare).write_metrics(RunFolder(bare).read_metrics())
    runs = load_runs([*folders, other, bare], num_bootstrap=30)
    assert [run.difference is None for run in runs] == [True, False, True, True]
    first, second = (pq.read_table(folder / "predictions.parquet").to_pydict() for folder in folders)
    cold = np.array(first["cold"])
    columns = [np.array(values)[cold] for values in (first["label"], first["score"], second["score"], first["user"])]
    assert runs[1].difference["cold"] == PairedDifference(**paired_difference(*columns, num_samples=30))
    assert [run.same_rows for run in runs] == [None, True, False, None]
    assert runs[2].difference_from(runs[0], "all", "gauc") == (None, None)  # other rows
    value, interval = runs[3].difference_from(runs[0], "all", "gauc")  # unknown rows: a plain difference
    assert value == pytest.approx(runs[3].test["all"]["gauc"] - runs[0].test["all"]["gauc"]) and interval is None


def test_fewer_than_ten_users_get_no_interval(tmp_path):
    for users, has in ((9, False), (10, True)):
        folders = [make_run(tmp_path / f"{users}-{skill}", skill, rows=300, users=users) for skill in (0.0, 0.9)]
        first, run = load_runs(folders)
        assert run.num_users("all") == users and run.difference is not None
        assert run.difference["all"].num_users == users and run.difference["all"].gauc_ci[0] > 0
        for found in (run.estimate("all", "gauc"), run.difference_from(first, "all", "gauc")):
            assert found.value is not None and (found.interval is not None) == has


def test_equal_names_get_their_parents(tmp_path):
    paths = [make_run(tmp_path / place / "din", 0.3, rows=100) for place in ("a", "b")]
    names = [run.name for run in load_runs([*paths, paths[0]], num_bootstrap=2)]
    assert names == ["a/din", "b/din", "a/din (2)"]


def strange_predictions(run: Path) -> None:
    pq.write_table(pa.table({"user": [1]}), run / "predictions.parquet")
    rewrite(run / "metrics.json", {})


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (lambda run: (run / "config.yaml").unlink(), "no config.yaml.*finetune.train"),
        (lambda run: (run / "config.yaml").write_text("a: [1"), "not valid YAML"),
        (lambda run: (run / "metrics.json").unlink(), "not finished.*no metrics.json.*mmctr evaluate"),
        (lambda run: (run / "metrics.json").write_text("{"), "not valid JSON"),
        (lambda run: RunFolder(run).write_metrics({"R@1": 0.5}), "no test.all.*pretraining.*finetune.train"),
        (lambda run: edit_metrics(run, lambda m: m["test"].pop("cold")), "no test.cold"),
        (lambda run: (run / "predictions.parquet").write_bytes(b"no"), "predictions.parquet: damaged.*run the recipe"),
        (lambda run: strange_predictions(run), "cannot read the columns.*run the recipe again"),
    ],
)
def test_folder_that_is_no_finished_run_is_named(folders, breaks, message):
    breaks(folders[1])
    with pytest.raises(ValueError, match=message) as caught:
        load_runs(folders)
    assert str(folders[1]) in str(caught.value)


def test_a_missing_folder_and_no_folders_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        load_runs([tmp_path / "absent"])
    with pytest.raises(ValueError, match="no run folders"):
        load_runs([])
