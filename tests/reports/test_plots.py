from __future__ import annotations

import re

from mmctr.reports.plots import NUM_COLOURS, NUM_DASHES, Series, line_key, line_plot, plot_css, standalone


def test_the_lines_of_many_methods_differ_with_and_without_colour():
    """A study has some twenty methods in one plot, and their labels say which line is whose."""
    count = NUM_COLOURS * NUM_DASHES
    series = [Series(str(i), i, [(0.0, 0.5, None), (1.0, 0.6, None)]) for i in range(count)]
    drawn = line_plot("p", "title", "told", series, [], (0.0, 1.0), "x")
    assert drawn is not None
    groups = re.findall(r"<g class='c(\d) d(\d)'>.*?<path class='mark' d='M[\d. ]+(.*?)'/>", drawn)
    assert len(groups) == count >= 24 and len(set(groups)) == count
    assert len({(dash, mark) for _, dash, mark in groups}) == count
    assert len({(colour, mark) for colour, _, mark in groups}) == count
    labels = [re.findall(r"key c(\d) d(\d)'.*class='mark' d='M13.0 7.0(.*?)'", line_key(i))[0] for i in range(count)]
    assert labels == groups


def test_each_style_of_lines_has_a_rule_of_its_own():
    css = plot_css()
    dashes = re.findall(r"\.d(\d) \.line \{ stroke-dasharray: ([^;]+); \}", css)
    assert [int(index) for index, _ in dashes] == list(range(NUM_DASHES))
    assert len({dash for _, dash in dashes}) == NUM_DASHES
    colours = re.findall(r"\.c(\d) \{ --c: var\(--p(\d)\); \}", css)
    assert colours == [(str(index), str(index)) for index in range(NUM_COLOURS)]
    for index in range(NUM_COLOURS):
        assert len(re.findall(rf"--p{index}: #", css)) == 2  # of the light and of the dark scheme


def test_text_of_plots_is_escaped():
    hostile = "</text><script>alert('x')</script>\"&"
    series, ticks = [Series(hostile, 0, [(0.0, 0.5, None)])], [(0.0, hostile, hostile)]
    drawn = line_plot("p", hostile, hostile, series, ticks, (0, 1), hostile)
    assert drawn is not None
    for svg in (str(drawn), standalone(drawn, [hostile])):
        assert "<script" not in svg and "&lt;script&gt;alert(&#39;x&#39;)" in svg


def test_a_plot_without_values_is_none():
    assert line_plot("p", "title", "told", [Series("a", 0, [(0.0, None, None)])], [], (0.0, 1.0), "x") is None
