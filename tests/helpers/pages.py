"""HTML pages as tests read them, and finished ranker runs for the pages to show."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from mmctr.evaluation.metrics import ranking_report
from mmctr.run_folder import RunFolder

PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)


def make_run(
    folder: Path, skill: float, rows: int = 900, seed: int = 0, cold_skill: float | None = None, users: int = 60
) -> Path:
    """A finished run on impressions that depend on `seed`, `rows` and `users` alone; `skill` mixes the truth into the
    scores."""
    generator = np.random.default_rng(seed)
    user, clicks = generator.integers(0, users, rows), generator.choice([0, 0, 3, 10, 50, 300], rows)
    labels, cold = (generator.random(rows) < 0.3).astype(int), clicks == 0
    strength = np.where(cold, skill if cold_skill is None else cold_skill, skill)
    scores = 0.5 * generator.random(rows) + 0.4 * strength * labels
    metrics = ranking_report(labels, scores, user, cold, clicks, num_bootstrap=20)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": {"path": "data/toy"}, "name": folder.name}))
    log = [{"step": step, "epoch": step / 100, "loss": 0.7 - step / 1000, "click": 0.5} for step in range(0, 400, 10)]
    log += [{"step": step, "epoch": 1, "validation": {"gauc": 0.5 + step / 4000, "auc": 0.6}} for step in (100, 300)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    columns = {"user": user, "item": np.arange(rows), "label": labels, "score": scores, "cold": cold, "clicks": clicks}
    pq.write_table(pa.table(columns), folder / "predictions.parquet")
    RunFolder(folder).write_metrics({"test": metrics, "validation": metrics, "seconds": 3})
    return folder


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


def edit_metrics(folder: Path, change) -> None:
    metrics = RunFolder(folder).read_metrics()
    change(metrics)
    RunFolder(folder).write_metrics(metrics)
