"""The lower bounds of pyproject.toml are the versions with which `make test-lowest` has run."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

from tests.helpers.tiny import CLONE
from tests.test_dependencies import PROJECT, distribution

LOWEST = CLONE / "tests" / "lowest.txt"
NOT_TRIED = {"deepspeed"}
"""distributions that `make test-lowest` does not install, since they need a GPU"""
TOOLS = {"hatchling", "pre-commit", "pyright", "ruff"}
"""distributions that build and check this repository, and that no test imports"""
IMPORTS = """
import importlib, pkgutil
for root in ("mmctr", "pretrain", "finetune"):
    for module in pkgutil.walk_packages(importlib.import_module(root).__path__, f"{root}."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
            print(module.name)
"""


def lower_bounds() -> dict[str, str]:
    """Distribution -> lower bound, of all requirements that the package and the tests import."""
    extras = PROJECT["optional-dependencies"]
    groups = [PROJECT["dependencies"], *(extras[name] for name in extras.keys() - {"docs"})]
    split = [requirement.split(">=") for group in groups for requirement in group if ">=" in requirement]
    return {distribution(name): bound for name, bound in split if distribution(name) not in NOT_TRIED | TOOLS}


def lowest_versions() -> dict[str, str]:
    """Distribution -> version, of the constraints file."""
    lines = LOWEST.read_text(encoding="utf-8").splitlines()
    pinned = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {distribution(name): pin for name, pin in pinned}


def test_lower_bounds_are_versions_that_were_tried():
    assert lower_bounds() == lowest_versions()


def test_every_requirement_has_one_lower_bound():
    extras = PROJECT["optional-dependencies"]
    for requirement in [*PROJECT["dependencies"], *(r for group in extras.values() for r in group)]:
        assert requirement.startswith("mmctr[") or requirement.count(">=") == 1, requirement


@pytest.mark.lowest
@pytest.mark.slow
def test_every_module_is_imported_without_a_warning_of_mmctr():
    """Warnings of other distributions about one another are theirs; `-W` matches the module that is blamed."""
    blamed = "error:::mmctr.data.images"  # Pillow before 11.3 warns there that AVIF is an unknown feature
    done = subprocess.run([sys.executable, "-W", blamed, "-c", IMPORTS], cwd=CLONE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mmctr.serving.server" in done.stdout and "finetune.train" in done.stdout


@pytest.mark.lowest
def test_installed_versions_are_within_the_bounds():
    """In `.venv-lowest`, of `make test-lowest`, installed versions are the bounds."""
    for name, bound in lower_bounds().items():
        installed = Version(Version(version(name)).public)  # 2.10.0+cpu is 2.10.0
        assert installed >= Version(bound), name
        if Path(sys.prefix).name == ".venv-lowest":
            assert installed == Version(bound), name
