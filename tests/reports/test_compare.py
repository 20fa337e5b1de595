"""Text table, JSON and sentences of a comparison of runs."""

from __future__ import annotations

import json
import re

import pyarrow.parquet as pq
import pytest

from mmctr.evaluation.metrics import gauc
from mmctr.reports import compare as report
from mmctr.reports.run import load_runs
from mmctr.run_folder import RunFolder
from tests.helpers.pages import edit_metrics, make_run


def test_result_sentences_say_what_the_intervals_allow(folders, tmp_path):
    words = " ".join(report.result_sentences(load_runs(folders, num_bootstrap=50)))
    assert "On cold items, din_table has the highest gAUC" in words and "does not contain zero" in words
    twin = make_run(tmp_path / "twin", 0.5001)
    words = " ".join(report.result_sentences(load_runs([folders[1], twin], num_bootstrap=50)))
    assert "do not tell the two apart" in words
    words = " ".join(report.result_sentences(load_runs(folders[::-1], num_bootstrap=50)))
    assert "No other run is above the first one here; the next is din_id" in words
    edit_metrics(folders[0], lambda metrics: metrics["test"]["cold"].update(gauc=0.51, gauc_ci=[0.47, 0.56]))
    words = " ".join(report.result_sentences(load_runs(folders[:1])))
    assert "contains 0.5: this is not told apart from a random order" in words
    small = make_run(tmp_path / "small", 0.5, rows=300)
    words = " ".join(report.result_sentences(load_runs([folders[0], small])))
    assert "small was tested on other rows than din_id: the two are not compared" in words
    assert "no difference is given" in words and "does not contain zero" not in words


def test_few_users_are_no_finding(tmp_path):
    """29 rows: the scores of one run are the labels, those of the other are noise."""
    folders = [make_run(tmp_path / name, skill, rows=29, users=9) for name, skill in (("noise", 0.0), ("truth", 1.2))]
    runs = load_runs(folders)
    words, table = " ".join(report.result_sentences(runs)), report.comparison_table(runs)
    assert "contain zero" not in words and "contains zero" not in words and "told apart" not in words
    assert "fewer than 10 users have both labels" in words and "no intervals from fewer than 10 users" in table
    assert f"users with both labels: all {runs[0].num_users('all')}, warm" in table and "[" not in table
    assert f"over {runs[0].num_users('warm')} users with both labels" in words


def test_runs_on_other_rows_are_said_to_be(folders, tmp_path):
    other = make_run(tmp_path / "later", 0.5, seed=3)
    bare = make_run(tmp_path / "bare", 0.5)
    (bare / "predictions.parquet").unlink()
    RunFolder(bare).write_metrics(RunFolder(bare).read_metrics())
    runs = load_runs([*folders, other, bare], num_bootstrap=20)
    notes = report.row_notes(runs)
    assert len(notes) == 2 and notes[0].startswith("later was tested on other rows than din_id")
    assert "bare or din_id has no predictions.parquet" in notes[1]
    table = report.comparison_table(runs)
    assert "later was tested on other rows" in " ".join(table.split()) and table.count("other rows") >= 4
    assert report.comparison_json(runs)["notes"] == notes
    assert [run["same_rows"] for run in report.comparison_json(runs)["runs"]] == [None, True, False, None]


def test_table_fits_100_columns_and_shows_markup_as_text(folders, tmp_path):
    long = make_run(tmp_path / ("[bold]a_very_long_name_of_a_run_" + "x" * 30), 0.4)
    table = report.comparison_table(load_runs([*folders, long], num_bootstrap=20))
    assert max(map(len, table.splitlines())) <= 100
    assert "[bold]" in table and "\x1b" not in table
    scores = pq.read_table(folders[1] / "predictions.parquet").to_pydict()
    line = next(line for line in table.splitlines() if "din_table" in line)
    assert f"{gauc(scores['label'], scores['score'], scores['user']):.4f}" in line
    assert re.search(r"\+\.\d{4} \[[+-]\.\d{4}, \+\.\d{4}\]", table)


def test_json_is_strict(folders):
    edit_metrics(folders[0], lambda metrics: metrics["test"]["cold"].update(gauc=float("nan")))
    found = report.comparison_json(load_runs(folders, num_bootstrap=10))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert [run["name"] for run in found["runs"]] == ["din_id", "din_table"]
    assert found["runs"][0]["test"]["cold"]["gauc"] is None and found["runs"][0]["difference"] is None
    assert set(found["runs"][1]["difference"]) == {"all", "warm", "cold"}


def test_a_report_takes_a_run(tmp_path):
    with pytest.raises(ValueError, match="no runs"):
        report.write_report([], tmp_path / "report.html")
