"""Conditions on catalog columns in the syntax of the command line: `colour=red|blue`, `price<20`, `brand!=Acme`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from mmctr.data.arrow import pc
from mmctr.data.tables import one_array

_SIGN = re.compile(r"!=|<=|>=|=|<|>")
_ORDER: dict[str, Callable[..., Any]] = {
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}


def matching(items: pa.Table, conditions: Sequence[str]) -> np.ndarray:
    """The rows that fulfil every condition. A missing value fulfils no condition, `!=` included.

    `=` and `!=` take several values separated by `|`. A row of a list column fulfils `=` when any value of the list is
    among the given values. `<`, `<=`, `>` and `>=` need a column of numbers.

    Args:
        items: a table of n rows.
        conditions: conditions such as `price<20`.

    Returns:
        (n,) bool mask.

    Raises:
        ValueError: a condition is malformed, names an unknown column, or does not fit the type of the column; the
            message names the condition and the problem.
    """
    mask = np.ones(len(items), bool)
    for condition in conditions:
        mask &= _one(items, condition)
    return mask


def parse_condition(condition: str) -> tuple[str, str, str]:
    """(column, sign, value) of a condition, without spaces around the three; the column ends at the first sign.

    The time is linear in the length of the text, which may come from the request of a stranger. Raises ValueError where
    there is no column or no sign.
    """
    text = condition.strip()
    sign = _SIGN.search(text, 1)  # a column has a character at least
    if sign is None:
        shown = text if len(text) <= 200 else f"{text[:200]}..."
        raise ValueError(f"condition {shown!r}: write COLUMN=VALUE, COLUMN!=VALUE, COLUMN<NUMBER or the like")
    return text[: sign.start()].rstrip(), sign.group(), text[sign.end() :].lstrip()


def _one(items: pa.Table, condition: str) -> np.ndarray:
    name, sign, value = parse_condition(condition)
    if name not in items.column_names:
        known = ", ".join(column for column in items.column_names) or "none"
        raise ValueError(f"condition {condition!r}: no column {name!r} here; there are {known}")
    column = one_array(items.column(name))
    if sign in _ORDER:
        if not _is_number(column.type):
            raise ValueError(f"condition {condition!r}: {name!r} holds {column.type}, and {sign} needs numbers")
        return _plain(_ORDER[sign](column.cast(pa.float64()), _number(value, name, condition)))
    values = value.split("|")
    if pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
        inside = _among(pc.list_flatten(column), values, name, condition)
        rows = pc.list_parent_indices(column).to_numpy()
        hits = np.zeros(len(column), bool)
        hits[rows[inside]] = True
    else:
        hits = _among(column, values, name, condition)
    return hits if sign == "=" else ~hits & np.asarray(column.is_valid())


def _among(column: pa.Array, values: list[str], name: str, condition: str) -> np.ndarray:
    if _is_number(column.type):
        wanted = pa.array([_number(value, name, condition) for value in values], pa.float64())
        return _plain(pc.is_in(column.cast(pa.float64()), wanted, skip_nulls=True))
    if pa.types.is_boolean(column.type):
        words = {"true": True, "false": False}
        if any(value.lower() not in words for value in values):
            raise ValueError(f"condition {condition!r}: {name!r} holds true and false")
        return _plain(pc.is_in(column, pa.array([words[value.lower()] for value in values])))
    return _plain(pc.is_in(column.cast(pa.string()), pa.array(values, pa.string()), skip_nulls=True))


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _number(value: str, name: str, condition: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"condition {condition!r}: {name!r} holds numbers and {value!r} is none") from None


def _plain(mask: Any) -> np.ndarray:
    return np.asarray(pc.fill_null(mask, False)).astype(bool)
