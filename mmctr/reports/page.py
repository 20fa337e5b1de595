"""What the HTML pages are made of: one file each, no script, no resource from elsewhere.

Words from outside (titles, run names, configs) go through `text`, the only way into a page.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, TypeGuard

NUM_STYLES = 6
DASHES = ("none", "6 3", "2 3", "9 3 2 3")  # of the lines beyond as many, in turn


@dataclass(frozen=True)
class ItemCard:
    """An item as shown to a reader. Text may be anything, it is escaped; image holds the bytes of a PNG or JPEG."""

    item_id: int | str
    title: str
    image: bytes | None = None
    score: float | None = None


@dataclass(frozen=True)
class NeighbourRow:
    """An item and the items nearest to it, nearest first."""

    query: ItemCard
    neighbours: list[ItemCard]


def document(title: str, sections: Sequence[str]) -> str:
    """A page of sections, each of them HTML."""
    body = "".join(f"<section>{section}</section>\n" for section in sections)
    return (
        "<!DOCTYPE html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        "<meta name='color-scheme' content='light dark'>\n"
        # a second lock beside the escaping: nothing may run or load, pictures are inside the file
        "<meta http-equiv='Content-Security-Policy' "
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{text(title)}</title>\n<style>{PLOT_CSS}{_CSS}</style>\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n"
        "</html>\n"
    )


def text(value: Any) -> str:
    # lone surrogates, as in the names of folders in another encoding, cannot be written as UTF-8
    return escape(str(value).encode("utf-8", "replace").decode("utf-8"), quote=True)


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, spec: str = ".4f") -> str:
    return format(value, spec) if is_number(value) else "–"


def short(value: float) -> str:
    """1234567 as 1.2M, 12345 as 12k: for axes and counts."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:g}"


def spread(interval: tuple[float, float] | None, spec: str = ".4f") -> str:
    return f"<small>[{interval[0]:{spec}}, {interval[1]:{spec}}]</small>" if interval else ""


def scrolling(label: str, content: str) -> str:
    return f"<div class='scroll' role='region' aria-label='{text(label)}' tabindex='0'>{content}</div>\n"


def neighbour_row(row: NeighbourRow) -> str:
    cards = card(row.query, "query") + "".join(card(item) for item in row.neighbours)
    return scrolling(f"Neighbours of {row.query.title}", f"<div class='cards'>{cards}</div>")


def card(item: ItemCard, kind: str = "") -> str:
    """A picture with its title and id."""
    formats = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg"}
    found = next((name for magic, name in formats.items() if item.image and item.image.startswith(magic)), None)
    if item.image and found:
        data = base64.b64encode(item.image).decode("ascii")
        picture = f"<img src='data:image/{found};base64,{data}' alt='{text(item.title)}' loading='lazy'>"
    else:
        picture = "<div class='absent'>no picture</div>"
    score = f" · {item.score:.3f}" if is_number(item.score) else ""
    return (
        f"<figure class='card {kind}'>{picture}<figcaption><span class='name' title='{text(item.title)}'>"
        f"{text(item.title)}</span><small>{text(item.item_id)}{score}</small></figcaption></figure>"
    )


PLOT_CSS = """
:root { --page: #fff; --ink: #1c2126; --muted: #5a646e; --rule: #dfe3e7; --soft: #f4f6f8;
  --p0: #0072b2; --p1: #c44e00; --p2: #007a5a; --p3: #a23e80; --p4: #7a6200; --p5: #444; }
@media (prefers-color-scheme: dark) { :root { --page: #15181b; --ink: #e6e9ec; --muted: #a3adb6; --rule: #343b42;
  --soft: #1f2429; --p0: #5bb4ee; --p1: #ff9554; --p2: #35cfa0; --p3: #efa3d0; --p4: #e3c93a; --p5: #d8d8d8; } }
svg text { fill: var(--ink); font-size: 12px; text-anchor: middle; } svg text.end { text-anchor: end; }
svg text.minor { fill: var(--muted); font-size: 11px; } .grid { stroke: var(--rule); }
.reference { stroke: var(--muted); stroke-dasharray: 5 4; } .line, .whisker { fill: none; stroke: var(--c); }
.line { stroke-width: 1.8; stroke-linejoin: round; }
.whisker { stroke-width: 1.3; opacity: .8; } .mark { fill: var(--c); stroke: var(--page); }
""" + " ".join(
    [f".c{index} {{ --c: var(--p{index}); }}" for index in range(NUM_STYLES)]
    + [f".d{index} .line {{ stroke-dasharray: {dash}; }}" for index, dash in enumerate(DASHES)]
)
"""of the SVG of plots, colours and styles of lines included; the page has it too"""

_CSS = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 1.7rem; margin: 0 0 .5rem; } h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; } h1, h3, li, th[scope=row] { overflow-wrap: anywhere; }
.lead { max-width: 75ch; overflow-wrap: anywhere; } .note, figcaption { color: var(--muted); font-size: .87rem; }
.note { max-width: 90ch; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .4rem .6rem; text-align: right; border-bottom: 1px solid var(--rule); vertical-align: top; }
thead th { white-space: nowrap; vertical-align: bottom; } td { white-space: nowrap; }
tr > th:first-child { text-align: left; position: sticky; left: 0; background: var(--page); min-width: 9.8rem; }
th[scope=row] { font-weight: 500; } td small { display: block; color: var(--muted); }
tr.split > th:first-child { background: var(--soft); padding-top: .5rem; }
tr.split span { position: sticky; left: .6rem; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; padding: 0; margin: 0 0 .4rem; }
.run { display: flex; } .key { flex: none; width: 26px; height: 14px; margin: .3em .45rem 0 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); gap: 1rem 2rem; }
.pair figure { margin: 0; max-width: 620px; } .pair svg { display: block; width: 100%; height: auto; }
.empty { color: var(--muted); }
.cards { display: flex; gap: .8rem; padding: .3rem .2rem 1rem; } .card { margin: 0; flex: 0 0 116px; width: 116px; }
.card img, .absent { width: 116px; height: 116px; object-fit: contain; background: #fff; border-radius: 6px;
  border: 1px solid var(--rule); display: block; }
.absent { background: var(--soft); color: var(--muted); font-size: .8rem; display: grid; place-items: center; }
.query { margin-right: .8rem; } .query img, .query .absent { outline: 3px solid var(--p0); outline-offset: 1px; }
.card .name { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2; overflow: hidden;
  color: var(--ink); line-height: 1.3; margin-top: .35rem; overflow-wrap: anywhere; }
.walk { display: grid; grid-template-columns: repeat(5, minmax(116px, 1fr)); gap: .4rem .8rem; min-width: 640px; }
.walk h3 { margin: .4rem 0 .2rem; } .walk .cards { flex-direction: column; padding: .2rem; }
.walk .card { flex-basis: auto; } td.words { text-align: left; white-space: normal; min-width: 14rem; }
th.words { text-align: left; }
summary { cursor: pointer; padding: .3rem 0; overflow-wrap: anywhere; }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; font-size: .85rem; border-radius: 6px; }
@media (max-width: 600px) { table { font-size: .85rem; } th, td { padding: .35rem .4rem; } }
:focus-visible { outline: 2px solid var(--p0); outline-offset: 2px; }
"""
