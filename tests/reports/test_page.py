from __future__ import annotations

import math

import pytest
from jinja2 import StrictUndefined, UndefinedError
from markupsafe import Markup

from mmctr.reports.page import ItemCard, NeighbourRow, number_text, render_page, template_environment
from tests.helpers.pages import PNG, Page

HOSTILE = "</title><script>alert('x')</script>\"' onload='y"


def macro(name: str, *arguments) -> str:
    return str(getattr(template_environment().get_template("macros.html").module, name)(*arguments))


def test_all_values_but_svg_are_escaped():
    environment = template_environment()
    assert environment.undefined is StrictUndefined
    assert environment.from_string("<a title='{{ t }}'>{{ t }}</a>").render(t="'\"<&") == (
        "<a title='&#39;&#34;&lt;&amp;'>&#39;&#34;&lt;&amp;</a>"
    )
    assert environment.from_string("{{ t }}").render(t=Markup("<svg/>")) == "<svg/>"
    with pytest.raises(UndefinedError, match="missing"):
        environment.from_string("{{ missing }}").render()


def test_macros_escape_text_and_attributes():
    row = NeighbourRow(ItemCard(HOSTILE, HOSTILE, PNG), [ItemCard(HOSTILE, HOSTILE, b"<svg onload=alert(3)>", 0.25)])
    for html in (macro("neighbour_row", row), macro("line_label", 3, HOSTILE), macro("legend", [HOSTILE])):
        page = Page(html)
        assert "<script" not in html and "<svg onload" not in html and HOSTILE in page.text
        assert not any(name.startswith("on") for name, _ in page.attributes)


def test_pictures_are_inside_the_page():
    assert (ItemCard(1, "a", PNG).image_url or "").startswith("data:image/png;base64,iVBOR")
    assert (ItemCard(1, "a", b"\xff\xd8\xff\xe0").image_url or "").startswith("data:image/jpeg;base64,")
    assert ItemCard(1, "a", b"GIF89a").image_url is None and ItemCard(1, "a").image_url is None


def test_numbers_that_are_missing_are_dashes():
    assert number_text(0.25) == "0.2500" and number_text(1234, ",.0f") == "1,234"
    assert [number_text(value) for value in (None, math.nan, math.inf)] == ["–"] * 3


def test_lone_surrogates_become_question_marks():
    html = render_page(
        "compare.html", runs=[], sentences=["a\ud800b"], metrics_tables=[], bucket_names=[], bucket_metrics=[],
        training_plots=[], neighbours=[], configs=[],
    )  # fmt: skip
    assert "a?b" in html and html.encode("utf-8")


def test_a_template_of_another_package_extends_the_base_of_reports():
    names = template_environment("mmctr.studies").list_templates()
    assert {"base.html", "macros.html", "page.css", "plots.css", "study.html"} <= set(names)
    assert "study.html" not in template_environment().list_templates()
