"""Typed configuration: YAML files with `key=value` overrides, where unknown keys are errors and a saved config loads
equal.

A config is a frozen pydantic model, defined above the class that the config describes. A choice between several configs
is a tagged union by the key `name`:

    ranker:
      name: din
      attention: [80, 40]
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mmctr.files import YamlLoader, read_yaml, user_path, write_text
from mmctr.shipped import find_config, shipped_config

Width = Annotated[int, Field(ge=1)]
"""number of units of a layer, of dimensions or of values"""


class Config(BaseModel):
    """Base class of all configs: frozen, and an unknown key is an error with a suggestion."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _expand_home(cls, values: Any) -> Any:
        """A text that begins with `~/`, alone or in a list, is a path in the home folder, whatever the key."""
        return {key: _expanded(value) for key, value in values.items()} if isinstance(values, dict) else values

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file, apply overrides, and validate the values.

        A top-level key `base: other.yaml` (relative to the file) names a file that is read first and over which the
        values of this file are merged. A path such as `configs/finetune/toy_din_id.yaml` that does not exist, as `path`
        or as `base`, is replaced by the file of that name that is shipped with the package.

        Args:
            path: the YAML file.
            overrides: `a.b=value` each, where the value is YAML.

        Raises:
            ValueError: the file is missing or malformed, or a key or value is invalid; the message names the file, the
                key, the value and, for an unknown key, the most similar known key.

        Example:
            ```python
            config = mmctr.FinetuneConfig.load("configs/finetune/toy_din_id.yaml", ["seed=3", "run_dir=runs/id"])
            assert config.seed == 3
            ```
        """
        values = read_config(find_config(path))
        _apply_overrides(values, overrides)
        return cls.parse(values, source=str(path))

    @classmethod
    def parse(cls, values: dict[str, Any], source: str = "config") -> Self:
        """Validate a mapping of values.

        Args:
            values: nested mapping of keys to values.
            source: name of the file, for error messages.

        Raises:
            ValueError: a key or value is invalid.
        """
        if not isinstance(values, dict):
            raise ValueError(f"{source}: a config is a mapping of keys to values, found {type(values).__name__}")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ValueError(_explain(cls, error, source)) from None

    def save(self, path: str | Path) -> None:
        """Write the resolved config as a YAML file, which `load` reads as an equal config."""
        write_text(Path(path), yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def _expanded(value: Any) -> Any:
    """A value with the home folder in place of `~`; lists are changed within, mappings have configs of their own."""
    if isinstance(value, list | tuple):
        return [_expanded(one) for one in value]
    return str(user_path(value)) if isinstance(value, str) and value.startswith("~/") else value


def read_config(path: Path, with_base: bool = True) -> dict[str, Any]:
    """The values of a YAML file without validation.

    Args:
        path: the YAML file.
        with_base: whether to merge the values over the values of the file that the key `base` names.

    Raises:
        ValueError: the file is missing, is not valid YAML, is not a mapping, repeats a key, or `base` files name each
            other in a circle.
    """
    return _merged(path, (), with_base)


def _merged(path: Path, seen: tuple[Path, ...], with_base: bool = True) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ValueError(f"{path}: `base:` goes round in a circle")
    if not path.exists():
        raise ValueError(f"{path}: no such config file")
    values = read_yaml(path) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a config is a mapping of keys to values, found {type(values).__name__}")
    base = values.pop("base", None)
    if base is not None and with_base:
        under = path.parent / user_path(str(base))
        if not under.exists():
            under = shipped_config(str(base)) or under
        values = _merge(_merged(under, (*seen, path.resolve())), values)
    return values


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Deep merge; a mapping whose `name` differs replaces the whole, since it is another member of a union."""
    result = dict(under)
    for key, value in over.items():
        old = result.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and value.get("name", old.get("name")) == old.get("name"):
            result[key] = _merge(old, value)
        else:
            result[key] = value
    return result


def _apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> None:
    parsed: list[tuple[list[str], Any]] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ValueError(f"override {override!r}: write it as key=value, for example fit.batch_size=512")
        try:
            parsed.append((key.split("."), yaml.load(text, YamlLoader)))
        except yaml.YAMLError:
            raise ValueError(f"override {override!r}: the value is not valid YAML; quote it") from None
    # names first: another name is another member of a union, which the keys of the old one do not fit
    for (*parents, last), value in sorted(parsed, key=lambda pair: pair[0][-1] != "name"):
        node = values
        for parent in parents:
            if not isinstance(node.get(parent), dict):
                node[parent] = {}
            node = node[parent]
        if last == "name" and node.get("name", value) != value:
            node.clear()
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
        elif problem["type"] in ("union_tag_invalid", "union_tag_not_found"):
            known = [str(model.model_fields["name"].default) for model in _walk(cls, problem["loc"])[0]]
            tag = problem.get("ctx", {}).get("tag")
            near = difflib.get_close_matches(str(tag), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"it is one of {', '.join(known)}"
            what = f"{where}.name: unknown name {tag!r}" if tag is not None else f"{where}.name is missing"
            lines.append(f"{source}: {what}; {hint}")
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
    return [model for part in typing.get_args(annotation) for model in _models_in(part)]


def _walk(cls: type[BaseModel], loc: Iterable[Any]) -> tuple[list[type[BaseModel]], list[Any]]:
    """Follow a pydantic error location; returns the models it ends in and the location without union tags."""
    models, path, is_key = [cls], [], False
    for part in loc:
        if is_key:  # of a mapping or a list: the user's own word, even where it reads like a field
            path.append(part)
            is_key = False
            continue
        tagged = [m for m in models if "name" in m.model_fields and m.model_fields["name"].default == part]
        field = next((m.model_fields[part] for m in models if part in m.model_fields), None)
        if field is not None:
            models = _models_in(field.annotation)
            path.append(part)
            parts = (field.annotation, *typing.get_args(field.annotation))
            is_key = bool(models) and any(typing.get_origin(kind) in (dict, list, tuple) for kind in parts)
        elif tagged:
            models = tagged
        else:
            path.append(part)
    return models, path


def _fields_at(cls: type[BaseModel], loc: Iterable[Any]) -> list[str]:
    return [name for model in _walk(cls, loc)[0] for name in model.model_fields]


def _strip_tags(cls: type[BaseModel], loc: Iterable[Any]) -> list[Any]:
    return _walk(cls, loc)[1]
