"""The page of `mmctr concepts`: one file, in which hostile names, titles and identifiers stay text."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pyarrow as pa

from mmctr.concepts.page import render_concepts, write_page
from mmctr.concepts.report import describe_latents
from tests.concepts.test_naming import MU, N
from tests.concepts.test_report import described, latents
from tests.reports.test_compare import Page

HOSTILE = "</title><script>alert('x')</script>\"' onload='y"


def catalog_of(titles: list[str], folder) -> SimpleNamespace:
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
    report["dimensions"][0]["name"]["text"] = HOSTILE
    report["warning"] = HOSTILE
    report["dependency"]["columns"][0] = HOSTILE
    report["runs"] = [{"run": HOSTILE, "score": 0.5, HOSTILE: 0.25}]
    report["ranker"] = {"run": "r", "impressions": 17}
    reason = {"dimension": 0, "end": "low", "likes": [HOSTILE], "click_effect": 0.1, "because_of": ["item 3"]}
    unnamed = {"dimension": 2, "end": "high", "likes": None, "click_effect": -0.1, "because_of": []}
    report["user"] = {"user_id": HOSTILE, "reasons": [reason, unnamed]}
    html = render_concepts(report, catalog_of([HOSTILE] * N, tmp_path))  # type: ignore[arg-type]
    page = Page(html)
    assert "<script" not in html and "script" not in page.tags and "src=" not in html
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert not re.search(r"https?://|@import|url\(", html)
    # name 2, warning 1, column 2, run 2, user 1, what the user likes 1; titles of an item of the history and of 3 x 10
    assert page.text.count(HOSTILE) == 9 + 1 + 3 * 10
    assert "the high end of dimension 2, which has no name" in page.text and "over 17 test impressions" in page.text


def test_a_page_without_names_scores_or_users(tmp_path):
    catalog = catalog_of(["shoe"] * N, tmp_path)
    report = describe_latents(latents(np.full((N, 2), 0.5)), catalog, [None, None], [])  # type: ignore[arg-type]
    write_page(report, catalog, tmp_path / "concepts.html")  # type: ignore[arg-type]
    page = Page((tmp_path / "concepts.html").read_text(encoding="utf-8"))
    assert "posterior collapse" in page.text and page.text.count("does not vary") == 2
    assert "0 vary over items" in page.text and "Scores" not in page.text and "None" not in page.text
    assert MU.shape[1] == 4 and page.tags.count("section") == 2
