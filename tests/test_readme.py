"""What README and docs name is there: files, commands, flags, configs, overrides, links."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path

import pytest

from mmctr.cli.parser import make_parser
from tests.test_imports import FLOOR

CLONE = Path(__file__).resolve().parents[1]
PAGES = sorted([*CLONE.glob("*.md"), *(CLONE / "docs").glob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
OTHER_TOOLS = {"--config_file", "--cpu", "--num_processes", "--nproc_per_node", "--gather-with-grad", "--check"}


def page(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def fences(text: str) -> list[str]:
    return [body for _, body in FENCE.findall(text)]


def code(text: str) -> list[str]:
    """Lines of fenced blocks, a line ending in a backslash joined with the next one, and inline code."""
    lines = [line for body in fences(text) for line in body.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`([^`]+)`", FENCE.sub("", text))
    return [line.strip().removeprefix("$ ") for line in [*lines, *inline]]


def words(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # an apostrophe in prose
        return line.split()


def subcommands() -> dict[str, argparse.ArgumentParser]:
    (action,) = [a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return action.choices


def flags(parser: argparse.ArgumentParser) -> set[str]:
    return set(parser._option_string_actions)


def tree_names() -> list[str]:
    """The names at the head of the lines of the README's tree, in order; the ground modules stand on one line."""
    (tree,) = [body for body in fences(page(CLONE / "README.md")) if body.startswith("mmctr/\n")]
    names: list[str] = []
    for line in tree.splitlines()[1:]:
        head = re.split(r"\s{3,}", line.strip())[0]
        names += [f"mmctr/{name}" if line.startswith("  ") else name for name in head.split()]
    return names


def recipe_calls(text: str, modules: Iterable[str]) -> list[tuple[str, list[str]]]:
    """(recipe, [config, overrides ...]) of each call in a fenced block whose config is one of ours.

    A shell variable in an override stands for a number; a config named by one is not looked at.
    """
    calls = []
    for line in (line for body in fences(text) for line in body.replace("\\\n", " ").splitlines()):
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|()")
        lexer.whitespace_split = True
        try:
            parts = list(lexer)
        except ValueError:  # an apostrophe in printed text
            continue
        for module in set(modules) & set(parts):
            arguments = list(takewhile(lambda word: not set(word) <= set(";&|()"), parts[parts.index(module) + 1 :]))
            if arguments and arguments[0].startswith("configs/") and "$" not in arguments[0]:
                calls.append((module, [re.sub(r"\$\w+|\$\{\w+\}", "0", word) for word in arguments]))
    return calls


def test_recipe_calls_are_found():
    text = "```bash\nfor s in 0 1; do python -m a.b configs/x.yaml 'k={n: 1}' seed=$s \\\n  z=2; done\na.b $c\n```\n"
    assert recipe_calls(text, {"a.b"}) == [("a.b", ["configs/x.yaml", "k={n: 1}", "seed=0", "z=2"])]
    recipes = {"pretrain.train", "finetune.train"}
    assert len(recipe_calls(page(CLONE / "README.md"), recipes)) > 2
    assert len([call for path in PAGES for call in recipe_calls(page(path), recipes)]) > 20


def test_the_tree_has_a_line_a_package():
    names = tree_names()
    assert len(names) == len(set(names)) > 25
    for name in names:
        assert (CLONE / name).is_dir() if name.endswith("/") else (CLONE / name).is_file(), name
    packages = {f"mmctr/{path.parent.name}/" for path in (CLONE / "mmctr").glob("*/__init__.py")}
    modules = {f"mmctr/{path.name}" for path in (CLONE / "mmctr").glob("[a-z]*.py")}
    assert {name for name in names if name.startswith("mmctr/")} == packages | modules


def test_the_tree_is_ordered_by_floors():
    floors = [FLOOR[Path(name).stem] for name in tree_names() if name.startswith("mmctr/")]
    packages = floors[: len(floors) - 9]  # the last lines name the ground in no order
    assert packages == sorted(packages)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_and_flags_exist(path):
    known = subcommands()
    everywhere = OTHER_TOOLS.union(*map(flags, known.values()))
    for line in code(page(path)):
        match = re.match(r"(?:.*-m )?mmctr ([a-z]\S*)(.*)", line)
        if match and not line.startswith(("mmctr/", "import")):
            name, rest = match.groups()
            assert name in known, line
            unknown = {w for w in words(rest) if re.match(r"--?[a-z]", w)} - flags(known[name])
            assert not unknown, f"mmctr {name} has no {unknown}: {line}"
        elif line.startswith("--") and not line.startswith("--8<--"):  # the mark of an included file
            assert line.split()[0] in everywhere, line


def test_every_command_is_in_the_readme_or_in_getting_started():
    texts = [page(CLONE / "README.md"), page(CLONE / "docs" / "getting_started.md")]
    named = {m for text in texts for line in code(text) for m in re.findall(r"^mmctr ([a-z][a-z-]*)", line)}
    assert named == set(subcommands())


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_configs_and_links_exist(path):
    text = page(path)
    for name in re.findall(r"configs/[\w/*.-]+\.yaml", text):
        assert list(CLONE.glob(name)), name
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_recipe_lines_load(path):
    """Whatever config and overrides a line gives to a recipe, they are a valid config of it."""
    from mmctr.runs.config import FinetuneConfig, PretrainConfig

    recipes = {"pretrain.train": PretrainConfig, "finetune.train": FinetuneConfig}
    for module, arguments in recipe_calls(page(path), recipes.keys()):
        # the worked example of docs/extending.md is not in the union; "..." stands for what was left out
        overrides = [word for word in arguments[1:] if word not in ("task.ranker.name=recency", "...")]
        recipes[module].load(CLONE / arguments[0], overrides)


def test_nothing_names_a_machine():
    for path in PAGES:
        text = page(path).replace("localhost:8000", "").replace("127.0.0.1:8000", "")  # where `mmctr serve` listens
        assert not re.search(r"/work/|/home/|/root/|localhost|127\.0\.0\.1", text), path
