"""`mmctr config`: the reference of config keys at the command line."""

from __future__ import annotations

import shutil
from dataclasses import replace

from mmctr.config import Config
from mmctr.config_reference import Entry, find, first_sentence, full_text, reference
from mmctr.shipped import recipe_module, recipes_folder, shipped_config, shipped_configs

ROOTS = ("pretrain", "finetune", "study")


def config_class(recipe: str) -> type[Config]:
    """The config of a recipe, or of a study. Imports torch."""
    from mmctr.runs.config import FinetuneConfig, PretrainConfig
    from mmctr.studies.config import StudyConfig

    return {"pretrain": PretrainConfig, "finetune": FinetuneConfig, "study": StudyConfig}[recipe]


def entries_of(recipe: str) -> list[Entry]:
    """The reference of a recipe or of a study, with the shipped configs that set each key."""
    return reference(config_class(recipe), shipped_configs("studies" if recipe == "study" else recipe))


def config_command(key: str | None, recipe: str | None) -> str:
    """The text of `mmctr config [KEY]`: the entries of a key and of all below it, or the sections without a key.

    Raises:
        ValueError: no config has the key; the nearest ones are named.
    """
    roots = (recipe,) if recipe else ROOTS
    width = min(shutil.get_terminal_size().columns, 120)
    entries = {root: entries_of(root) for root in roots}
    if key is None:
        return "\n\n".join([*(_roots(root, entries[root]) for root in roots), _folder()])
    found: dict[str, list[Entry]] = {}
    for root in roots:
        try:
            found[root] = find(entries[root], key)
        except ValueError:
            continue
    if not found:
        find([entry for root in roots for entry in entries[root]], key)
    told: dict[tuple[Entry, ...], list[str]] = {}
    for root, some in found.items():  # recipes whose keys are the same are told of together
        told.setdefault(tuple(replace(entry, files=()) for entry in some), []).append(root)
    parts = []
    for some, names in told.items():
        files = [[f"{root}/{name}" for root in names for name in found[root][at].files] for at in range(len(some))]
        text = full_text([replace(entry, files=tuple(ones)) for entry, ones in zip(some, files, strict=True)], width)
        parts.append(f"== {', '.join(_title(root) for root in names)}\n\n{text}")
    return "\n\n".join(parts)


def shipped_path(config: str) -> str:
    """The place of a shipped config file, for programs that do not know the shipped ones, as `accelerate launch`.

    Raises:
        ValueError: no such file is shipped.
    """
    path = shipped_config(config)
    if path is None:
        folder = recipes_folder() / "configs"
        known = sorted(str(one.relative_to(folder.parent)) for one in folder.glob("*/*.yaml"))
        raise ValueError(f"{config}: no shipped config of that name; the shipped ones are {', '.join(known)}")
    return str(path)


def _title(root: str) -> str:
    return "studies of `mmctr coldstart`" if root == "study" else recipe_module(root)


def _roots(root: str, entries: list[Entry]) -> str:
    lines = [f"== {_title(root)}: {len(entries)} keys"]
    for entry in entries:
        if "." not in entry.key:
            lines.append(f"  {entry.key:<12} {first_sentence(entry.meaning)}".rstrip())
    return "\n".join(lines)


def _folder() -> str:
    return (
        f"`mmctr config KEY` explains a key and those below it, as in `mmctr config fit.optimizer`.\n"
        f"Shipped configs: {recipes_folder() / 'configs'}"
    )
