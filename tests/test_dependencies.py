"""What the code imports is declared in pyproject.toml, rather than installed by luck with another package."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from importlib.metadata import packages_distributions

import pytest

from tests.helpers.tiny import CLONE
from tests.test_imports import imports

OURS = {"mmctr", "pretrain", "finetune"}
FOR_DEVELOPERS = {"dev", "docs"}
"""extras that no user installs"""
PROJECT = tomllib.loads((CLONE / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def distribution(requirement: str) -> str:
    """The normalised name (PEP 503) of the distribution a requirement begins with."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s\[<>=!~;(]", requirement, maxsplit=1)[0]).lower()


def declared() -> set[str]:
    extras = PROJECT["optional-dependencies"]
    optional = [requirement for name in extras.keys() - FOR_DEVELOPERS for requirement in extras[name]]
    return {distribution(requirement) for requirement in [*PROJECT["dependencies"], *optional]}


def undeclared(packages: Iterable[str], known: set[str], owners: Mapping[str, list[str]]) -> list[str]:
    """The third-party packages that no declared distribution has. One that is not installed is taken for its own."""
    outside = set(packages) - set(sys.stdlib_module_names) - OURS
    return sorted(name for name in outside if known.isdisjoint(map(distribution, owners.get(name, [name]))))


@pytest.mark.parametrize("root", sorted(OURS))
def test_every_imported_package_is_declared(root):
    owners = packages_distributions()
    packages: set[str] = set()
    for path in (CLONE / root).rglob("*.py"):
        packages |= {name.split(".")[0] for name in imports(path.read_text(encoding="utf-8"))}
    assert undeclared(packages, declared(), owners) == []


def test_an_undeclared_import_is_seen():
    owners = {"yaml": ["PyYAML"], "attr": ["attrs"]}
    packages = {"yaml", "attr", "json", "mmctr", "absent"}
    assert undeclared(packages, {"pyyaml"}, owners) == ["absent", "attr"]
    assert undeclared(packages, {"pyyaml", "attrs", "absent"}, owners) == []


REQUIREMENTS = {"torch>=2.6": "torch", "mkdocs[python]>=0.29": "mkdocs", "Huggingface_Hub ~= 1": "huggingface-hub"}


@pytest.mark.parametrize(("requirement", "name"), REQUIREMENTS.items())
def test_the_name_of_a_requirement(requirement, name):
    assert distribution(requirement) == name
