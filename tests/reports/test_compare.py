"""Reports of synthetic runs: the numbers are there, the page is whole, hostile text stays text."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from mmctr.evaluation.metrics import gauc, paired_difference, ranking_report
from mmctr.reports import compare as report
from mmctr.reports.page import ItemCard, NeighbourRow
from mmctr.reports.run import PairedDifference, load_runs

PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)
HOSTILE = "</title><script>alert('x')</script>\"'&\ud800"


def make_run(folder: Path, skill: float, rows: int = 900, seed: int = 0, cold_skill: float | None = None) -> Path:
    """A finished run on impressions that depend on `seed` and `rows` alone; `skill` mixes the truth into the scores."""
    generator = np.random.default_rng(seed)
    users, clicks = generator.integers(0, 60, rows), generator.choice([0, 0, 3, 10, 50, 300], rows)
    labels, cold = (generator.random(rows) < 0.3).astype(int), clicks == 0
    strength = np.where(cold, skill if cold_skill is None else cold_skill, skill)
    scores = 0.5 * generator.random(rows) + 0.4 * strength * labels
    metrics = ranking_report(labels, scores, users, cold, clicks, num_bootstrap=20)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": {"path": "data/toy"}, "name": folder.name}))
    (folder / "metrics.json").write_text(json.dumps({"test": metrics, "validation": metrics, "seconds": 3}))
    log = [{"step": step, "epoch": step / 100, "loss": 0.7 - step / 1000, "click": 0.5} for step in range(0, 400, 10)]
    log += [{"step": step, "epoch": 1, "validation": {"gauc": 0.5 + step / 4000, "auc": 0.6}} for step in (100, 300)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    columns = {"user": users, "item": np.arange(rows), "label": labels, "score": scores, "cold": cold, "clicks": clicks}
    pq.write_table(pa.table(columns), folder / "predictions.parquet")
    return folder


@pytest.fixture
def folders(tmp_path):
    return [make_run(tmp_path / "din_id", 0.2, cold_skill=0.0), make_run(tmp_path / "din_table", 0.5)]


class Page(HTMLParser):
    """Fails on tags that do not nest; collects tags, attributes and the text."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.tags, self.text, self.attributes = [], [], "", []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def written(runs, path: Path, neighbours=None) -> tuple[str, Page]:
    report.write_report(runs, path, neighbours)
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


def edit_metrics(folder: Path, change) -> None:
    metrics = json.loads((folder / "metrics.json").read_text())
    change(metrics)
    (folder / "metrics.json").write_text(json.dumps(metrics))


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
    runs = load_runs([*folders, other, bare], num_bootstrap=30)
    assert [run.difference is None for run in runs] == [True, False, True, True]
    first, second = (pq.read_table(folder / "predictions.parquet").to_pydict() for folder in folders)
    cold = np.array(first["cold"])
    columns = [np.array(values)[cold] for values in (first["label"], first["score"], second["score"], first["user"])]
    assert runs[1].difference["cold"] == PairedDifference(**paired_difference(*columns, num_samples=30))
    value, interval = runs[2].difference_from(runs[0], "all", "gauc")  # other rows: a plain difference
    assert value == pytest.approx(runs[2].test["all"]["gauc"] - runs[0].test["all"]["gauc"]) and interval is None


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
    assert "different numbers of impressions (900, 300)" in words and "not of the same rows" in words


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


def test_equal_names_get_their_parents(tmp_path):
    paths = [make_run(tmp_path / place / "din", 0.3, rows=100) for place in ("a", "b")]
    names = [run.name for run in load_runs([*paths, paths[0]], num_bootstrap=2)]
    assert names == ["a/din", "b/din", "a/din (2)"]


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (lambda run: (run / "config.yaml").unlink(), "no config.yaml.*finetune.train"),
        (lambda run: (run / "config.yaml").write_text("a: [1"), "not valid YAML"),
        (lambda run: (run / "metrics.json").unlink(), "not finished.*no metrics.json.*mmctr evaluate"),
        (lambda run: (run / "metrics.json").write_text("{"), "not valid JSON"),
        (lambda run: (run / "metrics.json").write_text('{"R@1": 0.5}'), "no test.all.*pretraining.*finetune.train"),
        (lambda run: edit_metrics(run, lambda m: m["test"].pop("cold")), "no test.cold"),
        (lambda run: pq.write_table(pa.table({"user": [1]}), run / "predictions.parquet"), "cannot read.*evaluate"),
        (lambda run: (run / "predictions.parquet").write_bytes(b"no"), "cannot read.*evaluate"),
    ],
)
def test_folder_that_is_no_finished_run_is_named(folders, breaks, message):
    breaks(folders[1])
    with pytest.raises(ValueError, match=message) as caught:
        load_runs(folders)
    assert str(folders[1]) in str(caught.value)


def test_no_folder_and_no_runs_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        load_runs([tmp_path / "absent"])
    with pytest.raises(ValueError, match="no run folders"):
        load_runs([])
    with pytest.raises(ValueError, match="no runs"):
        report.write_report([], tmp_path / "report.html")
