"""HTML pages from jinja2 templates: the environment, the formats of numbers, and the item cards all pages share.

Each page is one file without scripts that needs no network: style sheets, SVG plots and pictures are inside the file.
Templates hold all markup, and the environment escapes every value that is not `markupsafe.Markup`; only the SVG of
`mmctr.reports.plots` is.
"""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from mmctr.reports.plots import line_key

IMAGE_FORMATS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg"}
"""first bytes of an image file -> name of the image format"""


@dataclass(frozen=True)
class ItemCard:
    """An item as a page shows the item: picture, title, identifier and, for a search result, the score."""

    item_id: int | str
    title: str
    image: bytes | None = None
    """Content of a PNG or JPEG file; content of any other format counts as no picture."""
    score: float | None = None

    @property
    def image_url(self) -> str | None:
        """The picture as a `data:` URL, None without a picture in PNG or JPEG format."""
        if self.image is None:
            return None
        for first_bytes, image_format in IMAGE_FORMATS.items():
            if self.image.startswith(first_bytes):
                return f"data:image/{image_format};base64,{base64.b64encode(self.image).decode('ascii')}"
        return None


@dataclass(frozen=True)
class NeighbourRow:
    """An item and the items nearest to that item, nearest first."""

    query: ItemCard
    neighbours: list[ItemCard]


def number_text(value: float | None, spec: str = ".4f") -> str:
    """A number in a format of `format`, and a dash for a number that is missing or not finite."""
    return "–" if value is None or not math.isfinite(value) else format(value, spec)


@lru_cache
def template_environment(*packages: str) -> Environment:
    """The jinja2 environment of the pages: templates of `mmctr.reports`, then those of further packages by name.

    All output is escaped, and an undefined name is an error. Filters: `number` is `number_text`.
    Globals: `line_key` is `plots.line_key`.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package) for package in ("mmctr.reports", *packages)]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number_text
    environment.globals["line_key"] = line_key
    return environment


def render_page(template: str, *packages: str, **values: Any) -> str:
    """Render a template of `template_environment(*packages)`.

    Lone surrogates, which names of folders in another encoding hold, become question marks: UTF-8 has no code for them.
    """
    html = template_environment(*packages).get_template(template).render(**values)
    return html.encode("utf-8", "replace").decode("utf-8")
