"""Typed configuration: YAML files plus `key=value` overrides, unknown keys are errors, save and load round-trip.

A config is a frozen pydantic model that stands above the class it describes. Choices are tagged unions by `name`:

    ranker:
      name: din
      attention: [80, 40]
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from mmctr.files import write_text


class Config(BaseModel):
    """Base of every config: frozen, and a key it does not know is an error with a suggestion."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file, apply `a.b=value` overrides, validate.

        A top-level `base: other.yaml` (relative to the file) is read first and this file is merged over it.
        Raises ValueError naming the file, the key, the value and, for an unknown key, the nearest known one.
        """
        values = _merged(Path(path), seen=())
        for override in overrides:
            _apply_override(values, override)
        return cls.parse(values, source=str(path))

    @classmethod
    def parse(cls, values: dict[str, Any], source: str = "config") -> Self:
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ValueError(_explain(cls, error, source)) from None

    def save(self, path: str | Path) -> None:
        """Write the resolved config as YAML; `load(path)` gives an equal one."""
        write_text(Path(path), yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def _merged(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ValueError(f"{path}: `base:` goes round in a circle")
    if not path.is_file():
        raise ValueError(f"{path}: no such config file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a config is a mapping of keys to values, found {type(values).__name__}")
    base = values.pop("base", None)
    if base is not None:
        values = _merge(_merged(path.parent / str(base), (*seen, path.resolve())), values)
    return values


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Deep merge; a mapping whose `name` differs replaces the whole, since it is another member of a union."""
    result = dict(under)
    for key, value in over.items():
        old = result.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        if both and value.get("name", old.get("name")) == old.get("name"):
            result[key] = _merge(old, value)
        else:
            result[key] = value
    return result


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override {override!r}: write it as key=value, for example fit.batch_size=512")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"override {override!r}: the value is not valid YAML; quote it") from None
    *parents, last = key.split(".")
    node = values
    for parent in parents:
        if not isinstance(node.get(parent), dict):
            node[parent] = {}
        node = node[parent]
    node[last] = value


def _explain(cls: type[BaseModel], error: ValidationError, source: str) -> str:
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in _strip_tags(cls, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            known = _fields_at(cls, problem["loc"][:-1])
            near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
            lines.append(f"{source}: unknown key {where!r}; {hint}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            value = repr(problem.get("input"))
            shown = value if len(value) <= 80 else value[:77] + "..."
            lines.append(f"{source}: {where or 'config'}: {message} (given {shown})")
    return "\n".join(lines)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The config classes named anywhere in a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) is typing.Annotated or isinstance(annotation, types.GenericAlias):
        return [model for part in typing.get_args(annotation) for model in _models_in(part)]
    return [model for part in typing.get_args(annotation) for model in _models_in(part)]


def _walk(cls: type[BaseModel], loc: Iterable[Any]) -> tuple[list[type[BaseModel]], list[Any]]:
    """Follow a pydantic error location; returns the models it ends in and the location without union tags."""
    models, path = [cls], []
    for part in loc:
        tagged = [m for m in models if "name" in m.model_fields and m.model_fields["name"].default == part]
        field = next((m.model_fields[part] for m in models if part in m.model_fields), None)
        if field is not None:
            models = _models_in(field.annotation)
            path.append(part)
        elif tagged:
            models = tagged
        else:
            path.append(part)
    return models, path


def _fields_at(cls: type[BaseModel], loc: Iterable[Any]) -> list[str]:
    return [name for model in _walk(cls, loc)[0] for name in model.model_fields]


def _strip_tags(cls: type[BaseModel], loc: Iterable[Any]) -> list[Any]:
    return _walk(cls, loc)[1]
