"""The page of `mmctr concepts`: one file, in which hostile names, titles and identifiers stay text."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa

from mmctr.concepts.page import render_concepts, write_page
from mmctr.concepts.report_types import ClickReason, RankerEffects, RunScore, UserReasons
from tests.concepts.test_naming import N
from tests.concepts.test_report import described
from tests.helpers.pages import Page

HOSTILE = "</title><script>alert('x')</script>\"' onload='y"


def catalog_of(titles: list[str], folder: Path) -> Any:
    ids = pa.array([f"item {row}" for row in range(N)])
    rows = {item_id: row for row, item_id in enumerate(ids.to_pylist())}
    return SimpleNamespace(
        item_ids=ids,
        folder=folder,
        table=pa.table({"item_id": ids, "title": titles}),
        rows=lambda item_ids: np.array([rows[item_id] for item_id in item_ids]),
    )


def test_hostile_text_is_escaped(tmp_path):
    report = described()
    first, *others = report.description.dimensions
    assert first.name is not None and report.description.scores is not None
    named = replace(first, name=replace(first.name, column=None, low=[HOSTILE], high=["bright"]))
    scores = replace(report.description.scores, columns=[HOSTILE, "shape"])
    reasons = [
        ClickReason(0, "low", [HOSTILE], 0.1, ["item 3"]),
        ClickReason(2, "high", None, -0.1, []),
    ]
    report = replace(
        report,
        description=replace(report.description, dimensions=[named, *others], scores=scores),
        runs=[RunScore(HOSTILE, 0.5, {HOSTILE: 0.25})],
        ranker=RankerEffects("r", 17),
        user=UserReasons(HOSTILE, reasons),
    )
    html = render_concepts(report, catalog_of([HOSTILE] * N, tmp_path))
    page = Page(html)
    assert "<script" not in html and "script" not in page.tags and "src=" not in html
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert not re.search(r"https?://|@import|url\(", html)
    # name 2, column 2, run 2, user 1, what the user likes 1; titles of an item of the history and of 3 x 10
    assert page.text.count(HOSTILE) == 8 + 1 + 3 * 10
    assert "the high end of dimension 2, which has no name" in page.text and "over 17 test impressions" in page.text


def test_a_page_without_names_scores_or_users(tmp_path):
    report = described(np.full((N, 2), 0.5))
    write_page(report, catalog_of(["shoe"] * N, tmp_path), tmp_path / "concepts.html")
    page = Page((tmp_path / "concepts.html").read_text(encoding="utf-8"))
    assert "posterior collapse" in page.text and page.text.count("does not vary") == 2
    assert "0 vary over items" in page.text and "Scores" not in page.text and "None" not in page.text
    assert page.tags.count("section") == 2
