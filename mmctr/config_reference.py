"""Reference of config keys: a config class is walked through nested configs, mappings, lists and tagged unions.

Every key gets a dotted name, type, default, bounds, the meaning its docstring gives, and the shipped files that set it.
`NAME` in a dotted name stands for a key of a mapping that the user chooses.
"""

from __future__ import annotations

import difflib
import json
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mmctr.config import read_config

USER_KEY = "NAME"
"""stands in a dotted name for the keys of a mapping"""
Condition = tuple[str, str]
"""(dotted name of a tagged union, name of the member that has the key)"""


@dataclass(frozen=True)
class Entry:
    """One key of a config."""

    key: str
    """dotted name, as in an override"""
    type: str
    default: str
    """as YAML has it; `required` without a default, empty for a section"""
    bounds: str
    meaning: str
    conditions: tuple[Condition, ...] = ()
    """unions that must have a given member for the key to exist"""
    section: type[BaseModel] | None = None
    """the config class, where the key holds one config and its keys follow"""
    files: tuple[str, ...] = ()
    """shipped YAML files that set the key"""


def reference(root: type[BaseModel], files: Iterable[Path] = ()) -> list[Entry]:
    """The entries of all keys of a config class, each section followed by its keys.

    Args:
        files: configs of that class; an entry names those that set its key in their text (not in that of a `base`).
    """
    texts = [(path.name, read_config(path, with_base=False), read_config(path)) for path in files]
    entries = []
    for entry in _walk(root, None, (), ()):
        path = tuple(entry.key.split("."))
        names = [name for name, said, whole in texts if _is_set(said, whole, path, entry.conditions)]
        entries.append(replace(entry, files=tuple(names)))
    return entries


def undocumented(root: type[BaseModel]) -> list[str]:
    """`Class.field` of all fields without a docstring in `root` itself; the name of a union member needs none."""
    return [
        f"{root.__name__}.{name}"
        for name, field in root.model_fields.items()
        if not field.description and not _is_tag(name, field)
    ]


def find(entries: Sequence[Entry], key: str) -> list[Entry]:
    """The entries of a key and of all keys below it. A key of a mapping may stand for `NAME`.

    Raises:
        ValueError: there is no such key; the nearest ones are named.
    """
    parts = key.strip(".").split(".")
    found = [entry for entry in entries if _begins(entry.key.split("."), parts)]
    if found:
        return found
    near = nearest(entries, key)
    hint = f"did you mean {', '.join(near)}?" if near else "`mmctr config` lists the sections"
    raise ValueError(f"no config key {key!r}; {hint}")


def nearest(entries: Sequence[Entry], key: str, count: int = 5) -> list[str]:
    """Keys like a mistyped one: those that end so first, then those spelled much alike."""
    keys = list(dict.fromkeys(entry.key for entry in entries))
    last = key.rsplit(".", 1)[-1]
    ends = [one for one in keys if one.endswith(f".{key}") or one.rsplit(".", 1)[-1] == last]
    alike = difflib.get_close_matches(key, keys, n=count, cutoff=0.75)
    lasts = difflib.get_close_matches(last, [one.rsplit(".", 1)[-1] for one in keys], n=2, cutoff=0.7)
    ends_alike = [one for one in keys if one.rsplit(".", 1)[-1] in lasts]
    return list(dict.fromkeys([*ends, *alike, *ends_alike]))[:count]


def _walk(
    cls: type[BaseModel], defaults: BaseModel | None, above: tuple[str, ...], conditions: tuple[Condition, ...]
) -> Iterator[Entry]:
    for name, field in cls.model_fields.items():
        if _is_tag(name, field) and conditions and conditions[-1][0] == ".".join(above):
            continue  # the union has one entry for the names of its members
        default = getattr(defaults, name) if defaults is not None else field.get_default(call_default_factory=True)
        inside, models = _models(field.annotation)
        path = (*above, name)
        is_section = len(models) == 1 and not inside
        yield Entry(
            key=".".join(path),
            type=type_name(field.annotation),
            default=_default(default, bool(models)),
            bounds=", ".join([*_bounds(field.metadata), *(f"each {one}" for one in _inner_bounds(field.annotation))]),
            meaning=" ".join((field.description or (_summary(models[0]) if is_section else "")).split()),
            conditions=conditions,
            section=models[0] if is_section else None,
        )
        below = (*path, *inside)
        if len(models) > 1:
            yield _choice(below, models, default, conditions)
        for model in models:
            union = [(".".join(below), _tag(model))] if len(models) > 1 else []
            given = default if isinstance(default, model) else None
            yield from _walk(model, given, below, (*conditions, *union))


def _choice(
    path: tuple[str, ...], models: list[type[BaseModel]], default: Any, conditions: tuple[Condition, ...]
) -> Entry:
    """The entry of the key `name` of a tagged union."""
    meanings = [f"`{_tag(model)}`: {first_sentence(_summary(model)).rstrip('.')}" for model in models]
    return Entry(
        key=".".join((*path, "name")),
        type=" | ".join(_tag(model) for model in models),
        default=_tag(type(default)) if isinstance(default, BaseModel) else "required",
        bounds="",
        meaning="; ".join(meanings),
        conditions=conditions,
    )


def _is_tag(name: str, field: FieldInfo) -> bool:
    return name == "name" and typing.get_origin(field.annotation) is typing.Literal


def _tag(model: type[BaseModel]) -> str:
    return str(model.model_fields["name"].default)


def _summary(model: type[BaseModel]) -> str:
    """The first paragraph of the docstring of a class."""
    return " ".join((model.__doc__ or "").strip().split("\n\n")[0].split())


def _models(annotation: Any) -> tuple[tuple[str, ...], list[type[BaseModel]]]:
    """The configs a field holds, and the parts of a dotted name between the field and their keys."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return (), [annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _models(arguments[0])
    if origin in (dict, Mapping):
        inside, models = _models(arguments[1])
        return (USER_KEY, *inside), models
    if origin in (list, tuple, set):
        inside, models = _models(arguments[0])
        return ("0", *inside), models
    parts = [_models(argument) for argument in arguments] if origin in (typing.Union, types.UnionType) else []
    inside = next((one for one, models in parts if models), ())
    return inside, [model for _, models in parts for model in models]


def type_name(annotation: Any) -> str:
    """A type as a reader of YAML calls it: `int`, `list of str`, `mean | sum`, `section or null`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_name(arguments[0])
    if origin is typing.Literal:
        return " | ".join(str(value) for value in arguments)
    if origin in (typing.Union, types.UnionType):
        kinds = dict.fromkeys(type_name(argument) for argument in arguments)  # the members of a union are one section
        return " or ".join(kinds)
    if origin is tuple and Ellipsis not in arguments:
        return f"list of {len(arguments)} {type_name(arguments[0])}"
    if origin in (list, tuple, set):
        return f"list of {type_name(arguments[0])}"
    if origin in (dict, Mapping):
        return f"mapping of names to {type_name(arguments[1])}"
    if annotation is Any:
        return "any value"
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return getattr(annotation, "__name__", str(annotation))


def _default(value: Any, has_models: bool) -> str:
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel) or (has_models and value):
        return ""  # the keys below have the defaults
    if isinstance(value, Path):
        value = str(value)
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _bounds(metadata: Iterable[Any]) -> list[str]:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = [f"{sign} {getattr(one, name)}" for one in metadata for name, sign in signs.items() if hasattr(one, name)]
    lengths = (("min_length", "at least"), ("max_length", "at most"))
    found += [f"{text} {getattr(one, name)} long" for one in metadata for name, text in lengths if hasattr(one, name)]
    return found


def _inner_bounds(annotation: Any) -> list[str]:
    """Bounds on the values inside a list or a mapping."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Annotated:
        fields = [one for one in arguments[1:] if isinstance(one, FieldInfo)]
        own = _bounds([part for field in fields for part in field.metadata])
        return [*own, *_inner_bounds(arguments[0])]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return []
    return [bound for argument in arguments for bound in _inner_bounds(argument)]


def _begins(key: list[str], parts: list[str]) -> bool:
    return len(parts) <= len(key) and all(
        a in (b, USER_KEY) or (a == "0" and b.isdigit()) for a, b in zip(key, parts, strict=False)
    )


def _values(value: Any, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], Any]]:
    """(concrete path, value) of all places in a tree of YAML that a path with `NAME` in it fits."""
    if not path:
        return [((), value)]
    if isinstance(value, dict):
        keys = [str(key) for key in value] if path[0] == USER_KEY else [path[0]] if path[0] in value else []
        below = {str(key): inner for key, inner in value.items()}
    elif isinstance(value, list) and path[0] == "0":
        keys, below = [str(number) for number in range(len(value))], {str(n): one for n, one in enumerate(value)}
    else:
        return []
    return [((key, *rest), found) for key in keys for rest, found in _values(below[key], path[1:])]


def _is_set(said: Any, whole: Any, path: tuple[str, ...], conditions: Sequence[Condition]) -> bool:
    """Whether a file sets a key, and the unions above the key have the members it belongs to.

    Args:
        said: the values in the text of the file.
        whole: the values with those of its `base` below them.
    """
    for concrete, _ in _values(said, path):
        for union, member in conditions:
            at = (*concrete[: union.count(".") + 1], "name")
            if not any(value == member for _, value in _values(whole, at)):
                break
        else:
            return True
    return False


def facts(entry: Entry) -> str:
    """Type, default and bounds of an entry in one line."""
    default = entry.default if entry.default in ("", "required") else f"default {entry.default}"
    return ", ".join(part for part in (entry.type, default, entry.bounds) if part)


def same_sections(entries: Sequence[Entry]) -> dict[str, str]:
    """{dotted name of a section: that of an earlier one with the same keys, defaults and meanings}."""
    seen: dict[tuple, str] = {}
    same = {}
    for entry in entries:
        if entry.section is not None:
            below = [one for one in entries if one.key.startswith(f"{entry.key}.")]
            rest = tuple((one.key.removeprefix(entry.key), one.default, len(one.conditions)) for one in below)
            first = seen.setdefault((entry.section, rest), entry.key)
            if first != entry.key:
                same[entry.key] = first
    return same


def full_text(entries: Sequence[Entry], width: int = 100) -> str:
    """All that is known of some keys, as text."""
    blocks = []
    for entry in entries:
        about = [facts(entry)]
        if entry.conditions:
            about.append("with " + " and ".join(f"{union}.name: {member}" for union, member in entry.conditions))
        if entry.files:
            more = f" and {len(entry.files) - 6} more" if len(entry.files) > 6 else ""
            about.append(f"set in {', '.join(entry.files[:6])}{more}")
        blocks.append("\n".join([entry.key, *_wrapped([entry.meaning, *about], "    ", width)]))
    return "\n\n".join(blocks)


def compact_text(entries: Sequence[Entry], width: int = 100) -> str:
    """All keys of a config in few lines, a paragraph for each key at the top; sections told before are not repeated."""
    lines: list[str] = []
    same, skipped, conditions = same_sections(entries), None, ()
    for entry in entries:
        if skipped is not None and entry.key.startswith(f"{skipped}."):
            continue
        skipped = entry.key if entry.key in same else None
        indent = "  " * len(entry.conditions)
        if "." not in entry.key:
            lines.append("")
        if entry.conditions != conditions and entry.conditions:
            union, member = entry.conditions[-1]
            lines.append(f"{indent}-- {union}.name: {member}")
        conditions = entry.conditions
        meaning = f"the keys of `{same[entry.key]}`; {entry.meaning}" if skipped else entry.meaning
        lines.append(f"{indent}{entry.key}  ({facts(entry)})")
        lines += _wrapped([first_sentence(meaning)], f"{indent}    ", width)
    return "\n".join(lines).strip("\n")


def first_sentence(text: str) -> str:
    """What a text says before the first full stop that a capital letter follows."""
    return re.split(r"(?<=[^.]\.) (?=[A-Z])", text, maxsplit=1)[0]


def _wrapped(paragraphs: Iterable[str], indent: str, width: int) -> list[str]:
    wrap = textwrap.TextWrapper(
        width, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return [line for paragraph in paragraphs if paragraph for line in wrap.wrap(paragraph)]
