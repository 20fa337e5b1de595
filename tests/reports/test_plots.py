from __future__ import annotations

import re

from mmctr.reports.page import DASHES, NUM_STYLES, document
from mmctr.reports.plots import Series, line_label, line_plot


def test_the_lines_of_many_methods_differ_with_and_without_colour():
    """A study has some twenty methods in one plot, and their labels say which line is whose."""
    count = NUM_STYLES * len(DASHES)
    series = [Series(str(i), i, [(0.0, 0.5, None), (1.0, 0.6, None)]) for i in range(count)]
    drawn = line_plot("p", "title", "told", series, [], (0.0, 1.0), "x")
    groups = re.findall(r"<g class='c(\d) d(\d)'>.*?<path class='mark' d='M[\d. ]+(.*?)'/>", drawn)
    assert len(groups) == count >= 24 and len(set(groups)) == count
    assert len({(dash, mark) for _, dash, mark in groups}) == count
    assert len({(colour, mark) for colour, _, mark in groups}) == count
    labels = [
        re.findall(r"key c(\d) d(\d)'.*class='mark' d='M13.0 7.0(.*?)'", line_label(i, "x"))[0] for i in range(count)
    ]
    assert labels == groups
    page = document("title", [drawn])
    assert all(f".d{index} .line {{ stroke-dasharray: {dash}; }}" in page for index, dash in enumerate(DASHES))
