"""The page of a comparison: the numbers are there, the page is whole, hostile text stays text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from mmctr.reports import compare as report
from mmctr.reports.page import ItemCard, NeighbourRow
from mmctr.reports.run import load_runs
from tests.helpers.pages import PNG, Page, edit_metrics, make_run

HOSTILE = "</title><script>alert('x')</script>\"'&\ud800"


def written(runs, path: Path, neighbours=None) -> tuple[str, Page]:
    report.write_report(runs, path, neighbours)
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


def test_page_holds_the_numbers_and_needs_nothing_else(folders, tmp_path):
    runs = load_runs(folders, num_bootstrap=20)
    cards = [ItemCard(7, "Red shoe", PNG, 0.5), ItemCard("b", "Blue shoe", b"\xff\xd8\xff\xe0", 0.25)]
    rows = [NeighbourRow(ItemCard(1, "Query", None), cards)]
    html, page = written(runs, tmp_path / "out" / "report.html", rows)
    for run in runs:
        assert run.name in page.text
        for split in ("all", "warm", "cold"):
            for metric in ("auc", "gauc", "log_loss"):
                assert f"{run.test[split][metric]:.4f}" in page.text
            assert f"{run.test[split]['num_impressions']:,}" in page.text
            low, high = run.test[split]["gauc_ci"]
            assert f"[{low:.4f}, {high:.4f}]" in page.text
    assert f"{runs[1].difference['cold'].gauc:+.4f}" in page.text
    assert not re.search(r"https?://|@import|url\(", html)
    assert "script" not in page.tags and "link" not in page.tags
    sources = [value for name, value in page.attributes if name in ("src", "href")]
    assert [source.split(",")[0] for source in sources] == ["data:image/png;base64", "data:image/jpeg;base64"]
    assert page.text.count("no picture") == 1
    identifiers = [value for name, value in page.attributes if name == "id"]
    labelled = [value.split() for name, value in page.attributes if name == "aria-labelledby"]
    assert len(labelled) == 6 and sorted(identifiers) == sorted(part for parts in labelled for part in parts)
    assert page.tags.count("th") == sum(name == "scope" for name, _ in page.attributes)
    assert "path: data/toy" in page.text and page.tags.count("details") == 3
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / "report.html"]  # no temporary file is left


def test_hostile_text_is_escaped(folders, tmp_path):
    bad = folders[0].rename(tmp_path / "<script>alert(1)<")
    (bad / "config.yaml").write_text(yaml.safe_dump({"note": "</pre><script>alert(2)</script>"}))
    edit_metrics(bad, lambda metrics: metrics["test"]["buckets"][0].update(clicks="<b onload='x'>"))
    card = ItemCard(HOSTILE, HOSTILE, b"<svg onload=alert(3)>")
    rows = [NeighbourRow(card, [ItemCard(HOSTILE, HOSTILE, PNG, float("nan"))])]
    html, page = written(load_runs([bad, folders[1]], 20), tmp_path / "report.html", rows)
    assert "<script" not in html and "<b onload" not in html and "<svg onload" not in html
    assert "script" not in page.tags and not any(name.startswith("on") for name, _ in page.attributes)
    assert "<script>alert(1)<" in page.text and page.text.count("no picture") == 1


def test_one_run_and_missing_metrics_work(folders, tmp_path):
    def empty(metrics):
        metrics["test"]["cold"] = {key: 0 if key.startswith("num") else None for key in metrics["test"]["cold"]}
        metrics["test"]["buckets"][1] = {"clicks": "1-5", "auc": None, "auc_ci": [None, None]}
        del metrics["validation"]

    edit_metrics(folders[0], empty)
    (folders[0] / "log.jsonl").unlink()
    runs = load_runs(folders[:1])
    _, page = written(runs, tmp_path / "report.html")
    assert "No log of the training" in page.text and "–" in page.text
    assert "One run, din_id" in page.text and "On cold items gAUC is not defined" in page.text
    assert "None" not in page.text and "nan" not in page.text
    table = report.comparison_table(runs)
    assert "–" in table and "minus" not in table


def test_runs_without_any_number_work(folders, tmp_path):
    edit_metrics(folders[0], lambda m: m.update(test={"all": {}, "warm": {}, "cold": {}, "buckets": []}))
    runs = load_runs(folders)
    _, page = written(runs[:1], tmp_path / "report.html")
    assert "no metrics by clicks" in page.text
    empty = [{"clicks": "0", "auc": None, "gauc": None, "num_impressions": 0}]
    edit_metrics(folders[0], lambda metrics: metrics["test"].update(buckets=empty))
    _, page = written(load_runs(folders[:1]), tmp_path / "report.html")
    assert "Nothing to draw" in page.text
    assert "din_table" in report.comparison_table(runs)


def test_many_runs_are_told_apart_by_mark_and_dash(tmp_path):
    runs = load_runs([make_run(tmp_path / f"run{i}", 0.1 * i, rows=200) for i in range(8)], num_bootstrap=5)
    html, _ = written(runs, tmp_path / "report.html")
    keys = re.findall(r"<svg class='key ([^']+)'.*?class='mark' d='([^']+)'", html)
    assert len(set(keys)) == 8


def test_long_logs_are_binned(folders, tmp_path):
    lines = [{"step": step, "epoch": 0, "loss": 0.5 + 0.1 * (step % 2)} for step in range(5000)]
    (folders[0] / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    html, _ = written(load_runs(folders[:1]), tmp_path / "report.html")
    drawn = re.search(r"Training loss of din_id.*?class='line' d='([^']+)'", html, re.DOTALL)
    assert drawn and drawn.group(1).count("L") == 199
