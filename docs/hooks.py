"""What MkDocs builds besides the pages of docs/: README, changelog and contributing, and two generated references.

Nothing generated is written to the repository: pages are made in memory when the site is built.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

CLONE = Path(__file__).resolve().parents[1]
TOP = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "LICENSE": "license.md",
}
"""files at the top of the repository and the pages they become"""
RECIPES = {
    "pretrain": ("Pretraining", "The keys of `pretrain.train`"),
    "finetune": ("Ranking", "The keys of `finetune.train`"),
    "study": ("Studies", "The keys of a study, for `mmctr coldstart`"),
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the API pages into the navigation."""
    reference = next(part["Reference"] for part in config.nav or [] if "Reference" in part)
    api = next(part for part in reference if "API" in part)
    api["API"] = [{name: f"reference/{name}.md"} for name in api_pages()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not files of docs/."""
    pages = {page: (CLONE / name).read_text(encoding="utf-8") for name, page in TOP.items()}
    pages["license.md"] = f"# License\n\n```text\n{pages['license.md']}\n```\n"
    pages |= {f"reference/config_{root}.md": config_page(root) for root in RECIPES}
    pages |= {f"reference/{name}.md": text for name, text in api_pages().items()}
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points links of files at the top of the repository, and links to those files, to the pages of the site."""
    at_top = page.file.src_uri in TOP.values()

    def moved(match: re.Match[str]) -> str:
        target, anchor = match.group(1), match.group(2) or ""
        name = posixpath.normpath(target if at_top else posixpath.join("docs", target))
        return f"]({TOP.get(name, name.removeprefix('docs/'))}{anchor})"

    return re.sub(r"\]\((?!\w+://)([^)#\s]+)(#[^)\s]*)?\)", moved, markdown)


def config_page(root: str) -> str:
    """The reference of the config keys of a recipe, as Markdown."""
    from mmctr.cli.config import entries_of
    from mmctr.config_reference import facts, same_sections

    title, lead = RECIPES[root]
    entries = entries_of(root)
    same, skipped, conditions = same_sections(entries), None, ()
    lines = [
        f"# {title}",
        "",
        f"{lead}, {len(entries)} in all; `mmctr config KEY` prints the same. A key is given in a YAML file, or as",
        "`key=value` on the command line. `NAME` stands for a name that you choose.",
        "",
    ]
    anchors: set[str] = set()
    for entry in entries:
        if skipped is not None and entry.key.startswith(f"{skipped}."):
            continue
        skipped = entry.key if entry.key in same else None
        if "." not in entry.key:
            lines += [f"## {entry.key}", ""]
        if entry.conditions != conditions and entry.conditions:
            lines += [f"**With {' and '.join(f'`{union}.name: {name}`' for union, name in entry.conditions)}**", ""]
        elif entry.conditions != conditions and "." in entry.key:
            lines += [f"**Further keys of `{entry.key.rsplit('.', 1)[0]}`**", ""]
        conditions = entry.conditions
        anchor = "" if entry.key in anchors or "." not in entry.key else f"{{ #{entry.key} }}"
        anchors.add(entry.key)
        paragraphs = [facts(entry), entry.meaning]
        if skipped:
            paragraphs.append(f"The keys are those of `{same[entry.key]}`.")
        if entry.files:
            more = f" and {len(entry.files) - 6} more" if len(entry.files) > 6 else ""
            paragraphs.append(f"Set in {', '.join(f'`{name}`' for name in entry.files[:6])}{more}.")
        first, *rest = [part for part in paragraphs if part]
        lines += [f"`{entry.key}`{anchor}", f":   {first}", *(f"\n    {part}" for part in rest), ""]
    return "\n".join(lines)


def api_pages() -> dict[str, str]:
    """{name: Markdown} of a page for each package of the library, and one for the modules that lie in none."""
    folder = CLONE / "mmctr"
    pages = {"mmctr": _api_page("mmctr", sorted(folder.glob("*.py")))}
    for package in sorted(path for path in folder.iterdir() if (path / "__init__.py").is_file()):
        pages[f"mmctr.{package.name}"] = _api_page(f"mmctr.{package.name}", sorted(package.glob("*.py")))
    return pages


def _api_page(name: str, modules: list[Path]) -> str:
    lines = [f"# {name}", ""]
    for path in modules:
        if path.stem == "__init__":
            lines += [ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "", ""]
        elif not path.stem.startswith("_"):
            lines += [f"::: {name}.{path.stem}", ""]
    return "\n".join(lines)
