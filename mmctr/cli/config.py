"""`mmctr config`: the reference of config keys at the command line."""

from __future__ import annotations

import shutil
from dataclasses import replace

from mmctr.config import Config
from mmctr.config_reference import Entry, find, first_sentence, full_text, reference
from mmctr.shipped import recipe_module, recipes_folder, shipped_config, shipped_configs

ROOTS = ("pretrain", "finetune", "study")


def config_class(recipe: str) -> type[Config]:
    """The config class of a recipe ("pretrain", "finetune") or of a study ("study"); this imports torch."""
    from mmctr.runs.config import FinetuneConfig, PretrainConfig
    from mmctr.studies.config import StudyConfig

    return {"pretrain": PretrainConfig, "finetune": FinetuneConfig, "study": StudyConfig}[recipe]


def entries_of(recipe: str) -> list[Entry]:
    """The entries of the reference of a recipe or study, each with the shipped configs that set the key."""
    return reference(config_class(recipe), shipped_configs("studies" if recipe == "study" else recipe))


def config_command(key: str | None, recipe: str | None) -> str:
    """The text of `mmctr config [KEY]`.

    Args:
        key: a dotted key, whose entry and nested entries are listed; None: the sections are listed.
        recipe: "pretrain", "finetune" or "study"; None: all three.

    Raises:
        ValueError: no config has the key; the message names similar keys.
    """
    roots = (recipe,) if recipe else ROOTS
    width = min(shutil.get_terminal_size().columns, 120)
    entries = {root: entries_of(root) for root in roots}
    if key is None:
        return "\n\n".join([*(_roots(root, entries[root]) for root in roots), _folder()])
    matches: dict[str, list[Entry]] = {}
    for root in roots:
        try:
            matches[root] = find(entries[root], key)
        except ValueError:
            continue
    if not matches:
        find([entry for root in roots for entry in entries[root]], key)
    groups: dict[tuple[Entry, ...], list[str]] = {}
    for root, root_entries in matches.items():  # recipes with equal entries are listed together
        groups.setdefault(tuple(replace(entry, files=()) for entry in root_entries), []).append(root)
    parts = []
    for group, names in groups.items():
        files = [[f"{root}/{name}" for root in names for name in matches[root][i].files] for i in range(len(group))]
        text = full_text([replace(entry, files=tuple(ones)) for entry, ones in zip(group, files, strict=True)], width)
        parts.append(f"== {', '.join(_title(root) for root in names)}\n\n{text}")
    return "\n\n".join(parts)


def shipped_path(config: str) -> str:
    """The path of a shipped config file, for programs such as `accelerate launch` that need the path.

    Args:
        config: the name of the file, such as configs/accelerate/gpu.yaml.

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
    """The heading of the entries of a recipe or study."""
    return "studies of `mmctr coldstart`" if root == "study" else recipe_module(root)


def _roots(root: str, entries: list[Entry]) -> str:
    """The sections of a config as text."""
    lines = [f"== {_title(root)}: {len(entries)} keys"]
    for entry in entries:
        if "." not in entry.key:
            lines.append(f"  {entry.key:<12} {first_sentence(entry.meaning)}".rstrip())
    return "\n".join(lines)


def _folder() -> str:
    """The last lines of the list of sections."""
    return (
        f"`mmctr config KEY` explains a key and all nested keys, as in `mmctr config fit.optimizer`.\n"
        f"Shipped configs: {recipes_folder() / 'configs'}"
    )
