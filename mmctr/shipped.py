"""Recipes and configs that are shipped with the library.

A clone has `pretrain/`, `finetune/` and `configs/` next to `mmctr/`. A wheel carries the same folders inside the
package, as `mmctr/recipes/`, so an installation without a clone runs the same recipes.
"""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
RECIPES = ("pretrain", "finetune")


def recipes_folder() -> Path:
    """The folder that holds `pretrain/`, `finetune/` and `configs/`.

    Raises:
        ValueError: neither a clone nor a whole installation; a copy of `mmctr/` alone has no recipes.
    """
    for folder in (PACKAGE / "recipes", PACKAGE.parent):
        if all((folder / recipe / "train.py").is_file() for recipe in RECIPES) and (folder / "configs").is_dir():
            return folder
    raise ValueError(
        f"{PACKAGE}: this copy of mmctr has no recipes and no configs; install the package with `pip install .` in a "
        f"clone of the repository, or run it from the clone"
    )


def recipe_module(recipe: str) -> str:
    """The module to run a recipe: `finetune.train` in a clone, `mmctr.recipes.finetune.train` when installed."""
    return f"{recipe}.train" if recipes_folder() == PACKAGE.parent else f"mmctr.recipes.{recipe}.train"


def shipped_config(path: str | Path) -> Path | None:
    """The shipped file that a path like `configs/finetune/toy_din_id.yaml` names; None where no file is shipped so."""
    path = Path(path)
    if path.is_absolute() or path.parts[:1] != ("configs",):
        return None
    shipped = recipes_folder() / path
    return shipped if shipped.is_file() else None


def find_config(path: str | Path) -> Path:
    """The file at `path`; where there is none, the shipped file of that name; else `path` as it is given."""
    given = Path(os.path.expanduser(path))
    return given if given.exists() else shipped_config(path) or given


def shipped_configs(kind: str) -> list[Path]:
    """The shipped YAML files of one kind: `pretrain`, `finetune`, `studies` or `accelerate`."""
    return sorted((recipes_folder() / "configs" / kind).glob("*.yaml"))


def recipe_environment() -> dict[str, str]:
    """The environment variables of a process that runs a recipe in whatever folder: a clone is made importable."""
    environment = dict(os.environ)
    if recipes_folder() == PACKAGE.parent:
        path = [str(PACKAGE.parent), environment.get("PYTHONPATH")]
        environment["PYTHONPATH"] = os.pathsep.join(part for part in path if part)
    return environment
