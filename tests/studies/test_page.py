"""The page and the table of a study hold its numbers, and hostile text stays text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mmctr.studies.page import render_study, write_study_page
from mmctr.studies.result_types import FailedCell, ProtocolResults, StudyResults
from mmctr.studies.results import study_results
from mmctr.studies.runner import Outcome, study_cells
from mmctr.studies.table import study_table
from tests.helpers.pages import Page
from tests.helpers.studies import method_results, study_config


@pytest.mark.slow
def test_page_and_table_hold_the_numbers(finished_study, tmp_path):
    results = finished_study[2]
    cell = FailedCell("held_out", "ids", 0, Path("a.log"), "<b onload='x'>")
    study = results.study.model_copy(update={"data": "<script>alert(1)</script>"})
    write_study_page(replace(results, study=study, failed=[cell]), tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    page, table, written = Page(html), study_table(results), results.to_json()
    assert "<script" not in html and "<b onload" not in html and "src=" not in html
    assert max(map(len, table.splitlines())) <= 100
    for found in written["protocols"]["held_out"]["methods"].values():
        for split in ("all", "warm", "cold"):
            assert f"{found['test'][split]['gauc']['mean']:.4f}" in page.text
            assert f"{found['test'][split]['gauc']['mean']:.4f}" in table
    difference = written["protocols"]["held_out"]["methods"]["content"]["difference"]["cold"]
    for one in (difference, *difference["seeds"]):
        assert f"{one['gauc']:+.4f}" in page.text and "[{:+.4f}, {:+.4f}]".format(*one["gauc_ci"]) in page.text
    assert "50 resamples" in page.text and "50 resamples" in " ".join(table.split())
    assert page.tags.count("svg") == 4 + 2 + 2 + 1 + 2  # four plots; marks in the legend and in three tables
    assert json.loads(json.dumps(written, allow_nan=False)) == written


@pytest.mark.slow
def test_a_study_of_which_nothing_is_finished_is_reported(finished_study, tmp_path):
    study, folder, _, _ = finished_study
    outcomes = [Outcome(cell, "failed", "why") for cell in study_cells(study, folder / "out")]
    results = study_results(study, outcomes)
    assert len(results.failed) == 4 and not results.protocols["held_out"].methods
    assert "no run is finished" in study_table(results) and study_table(results).count("FAILED") == 4
    write_study_page(results, tmp_path / "report.html")
    assert "No run is finished" in Page((tmp_path / "report.html").read_text(encoding="utf-8")).text


def test_hostile_names_are_text_on_the_page_of_a_study():
    hostile = "<script>alert(1)</script>\"' onload='x"
    rows, users = {"all": 9, "warm": 6, "cold": 3}, {"all": 3, "warm": 2, "cold": 1}
    protocol = ProtocolResults(rows, users, {hostile: method_results(), "true": method_results()})
    failed = FailedCell(hostile, hostile, 4, Path(hostile), hostile)
    study = study_config().model_copy(update={"data": hostile, "baseline": hostile, "oracle": "true"})
    results = StudyResults(study, [failed], {hostile: protocol})
    html = render_study(results)
    page = Page(html)
    assert "<script" not in html and "script" not in page.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert page.text.count(hostile) > 20 and "12k" not in page.text
    assert "0.6000" in page.text and "[0.5000, 0.7000]" in page.text and "40%" in page.text
    assert "FAILED" in study_table(results)
