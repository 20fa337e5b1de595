"""The site builds without a warning and without another host, and holds every config key and every package."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mmctr.cli.config import ROOTS, entries_of
from mmctr.config_reference import same_sections
from tests.helpers.tiny import CLONE

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(CLONE)}
    done = subprocess.run(command, cwd=CLONE, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "WARNING" not in done.stdout + done.stderr, done.stderr[-3000:]
    return folder


def text(page: Path) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("root", ROOTS)
def test_every_config_key_is_on_the_page_of_a_recipe(site, root):
    page = (site / "reference" / f"config_{root}.html").read_text(encoding="utf-8")
    entries = entries_of(root)
    same = same_sections(entries)
    told = [one for one in entries if not any(one.key.startswith(f"{name}.") for name in same)]
    assert len(told) > 25
    for entry in told:
        assert f">{entry.key}</code>" in page, entry.key
        assert "." not in entry.key or f'id="{entry.key}"' in page, entry.key


def test_every_package_has_a_page_with_its_public_names(site):
    packages = {path.parent.name for path in (CLONE / "mmctr").glob("*/__init__.py")}
    assert {f"mmctr.{name}.html" for name in packages} < {path.name for path in (site / "reference").iterdir()}
    page = (site / "reference" / "mmctr.rankers.html").read_text(encoding="utf-8")
    names = set(re.findall(r'id="(mmctr[\w.]+)"', page))
    assert {"mmctr.rankers.din", "mmctr.rankers.din.DIN", "mmctr.rankers.din.DINConfig.attention"} <= names
    assert "Deep Interest Network" in text(site / "reference" / "mmctr.rankers.html")
    assert not [name for name in names if name.rsplit(".", 1)[-1].startswith("_")]
    assert 'id="mmctr.config.Config.load"' in (site / "reference" / "mmctr.html").read_text(encoding="utf-8")


def test_pages_of_the_repository_are_pages_of_the_site(site):
    for page, words in {
        "index.html": "make demo",
        "changelog.html": "Unreleased",
        "contributing.html": "make test",
        "license.html": "Apache License",
        "getting_started.html": "mmctr config fit.optimizer",
        "results.html": "AUC",
    }.items():
        assert words in text(site / page), page
    assert not (site / "hooks.py").exists()


class Loaded(HTMLParser):
    """The addresses of what a page loads by itself: scripts, styles, pictures, frames."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "link" and values.get("rel") in ("stylesheet", "preload", "icon", "preconnect"):
            self.addresses.append(values.get("href") or "")
        elif tag in ("script", "img", "iframe", "source") and values.get("src"):
            self.addresses.append(values["src"] or "")


def test_no_page_loads_from_another_host(site):
    for path in site.rglob("*.html"):
        addresses = Loaded(path.read_text(encoding="utf-8")).addresses
        assert len(addresses) > 2
        assert not [one for one in addresses if re.match(r"\w+:|//", one)], path
    for path in site.rglob("*.css"):
        assert not re.search(r"""url\(["']?(?:https?:)?//|@import""", path.read_text(encoding="utf-8")), path
