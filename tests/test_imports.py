"""The packages of mmctr lie on floors, and a module imports from lower floors alone: see docs/architecture.md."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.helpers.tiny import CLONE

FLOORS = [
    {"cli"},
    {"api"},
    {"serving"},
    {"export", "concepts"},
    {"studies"},
    {"runs"},
    {"training"},
    {"reports"},
    {"evaluation"},
    {"tasks"},
    {"encoders", "embedders", "rankers"},
    {"features"},
    {"losses", "retrieval"},
    {"data"},
    {"datasets"},
    {"layers"},
    {"config_reference"},
    {"config"},
    {"run_folder"},
    {"distributed", "manifests", "locks"},
    {"files", "shipped"},
    {"errors"},
]
"""from the top down; packages of one floor do not import each other"""
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
FRONT = {"__init__", "__main__"}
"""the front door, which hands out public names of every floor"""


def module_name(path: Path, root: Path = CLONE) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str) -> set[str]:
    """Dotted names of all that a module imports: at its top, inside functions, and for type checking alone."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a module lies"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def package(module: str) -> str:
    """The part of `mmctr` that a module or a name in it lies in."""
    return module.split(".")[1] if module.count(".") else "__init__"


def upward(module: str, source: str) -> list[str]:
    """The imports of a module of `mmctr` that do not go down."""
    own = package(module)
    if own in FRONT:
        return []
    inside = [name for name in imports(source) if name.startswith("mmctr.")]
    return [name for name in inside if package(name) != own and FLOOR[package(name)] <= FLOOR[own]]


MODULES = {module_name(path): path for path in sorted((CLONE / "mmctr").rglob("*.py"))}


def test_every_package_has_a_floor():
    found = {package(name) for name in MODULES} - FRONT
    assert found == set(FLOOR)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_lower_floors_alone(module):
    source = MODULES[module].read_text(encoding="utf-8")
    assert upward(module, source) == []
    recipes = {name for name in imports(source) if name.split(".")[0] in ("pretrain", "finetune")}
    assert not recipes, f"{module} imports a recipe: {recipes}"


def test_an_import_that_goes_up_is_seen():
    assert upward("mmctr.layers.mlp", "from mmctr.rankers.din import DIN") == ["mmctr.rankers.din.DIN"]
    assert upward("mmctr.encoders.hf", "def f():\n    import mmctr.rankers.din") == ["mmctr.rankers.din"]
    assert upward("mmctr.rankers.din", "from mmctr.layers import jagged, mlp") == []


def test_no_module_imports_itself_through_others():
    graph = {}
    for module, path in MODULES.items():
        names = imports(path.read_text(encoding="utf-8"))
        graph[module] = {name if name in MODULES else name.rsplit(".", 1)[0] for name in names} & set(MODULES)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"these import each other: {error.args[1]}")


@pytest.mark.parametrize("recipe", ["pretrain", "finetune"])
def test_a_recipe_imports_no_other_recipe(recipe):
    for path in (CLONE / recipe).glob("*.py"):
        tops = {name.split(".")[0] for name in imports(path.read_text(encoding="utf-8"))}
        assert not tops & ({"pretrain", "finetune"} - {recipe})


def test_import_of_mmctr_loads_no_torch():
    code = "import sys, mmctr; print(sorted({'torch', 'numpy', 'pyarrow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
