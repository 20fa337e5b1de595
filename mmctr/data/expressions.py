"""Labels as expressions over the columns of a table: `rating >= 4`, `event in [cart, purchase]`.

The text is parsed by the parser of Python and never executed: names, numbers, texts, comparisons, lists, `and`, `or`
and `not` are read, everything else is an error.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from mmctr.data.arrow import pc
from mmctr.data.tables import require_columns

MAX_LENGTH = 1000
"""longest expression, in characters: the parser of Python needs much memory for deeply nested text"""
_COMPARISONS: dict[type[ast.cmpop], Callable[..., Any]] = {
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
}


def parse_expression(text: str) -> ast.expr:
    """Parse an expression.

    Args:
        text: such as `rating >= 4 and event in [cart, purchase]`. Names are columns; within a list, and compared with a
            column, a word that is no column is a text. Columns whose names are no words are renamed first.

    Raises:
        ValueError: the text is no expression, or holds something that is not read.
    """
    if len(text) > MAX_LENGTH:
        raise ValueError(f"expression of {len(text)} characters; at most {MAX_LENGTH} are read")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"{text!r}: no expression; write one like rating >= 4, or event in [cart, purchase]") from None
    _check(tree, text)
    return tree


def _check(node: ast.AST, text: str) -> None:
    match node:
        case ast.BoolOp(values=parts) | ast.List(elts=parts) | ast.Tuple(elts=parts) | ast.Set(elts=parts):
            pass
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=part):
            parts = [part]
        case ast.Compare(left=left, ops=ops, comparators=right):
            if any(not isinstance(op, (*_COMPARISONS, ast.In, ast.NotIn)) for op in ops):
                raise ValueError(f"{text!r}: comparisons are ==, !=, <, <=, >, >=, in and not in")
            parts = [left, *right]
        case ast.Name() | ast.Constant(value=bool() | int() | float() | str()):
            parts = []
        case _:
            raise ValueError(
                f"{text!r}: {ast.unparse(node)!r} is not read; an expression has columns, numbers, texts, comparisons, "
                f"lists, and, or, not"
            )
    for part in parts:
        _check(part, text)


def columns_of(text: str) -> set[str]:
    """The names in an expression that must be columns: all that stand alone or on the left of a comparison.

    Raises:
        ValueError: the text is no expression.
    """
    return _columns(parse_expression(text))


def _columns(node: ast.expr) -> set[str]:
    match node:
        case ast.Name(id=name):
            return {name}
        case ast.BoolOp(values=parts):
            return set().union(*map(_columns, parts))
        case ast.UnaryOp(operand=part) | ast.Compare(left=part):
            return _columns(part)
    return set()


def evaluate(text: str, table: pa.Table, source: Any) -> pa.ChunkedArray:
    """The value of an expression for each row of a table.

    Args:
        text: the expression.
        table: n rows.
        source: name of the file or table, for error messages.

    Returns:
        (n,) the column, for the name of a column; else a column of bools, null where a value that decides is missing.

    Raises:
        ValueError: the text is no expression, a column is missing, or the types do not fit.
    """
    tree = parse_expression(text)
    require_columns(table, sorted(_columns(tree)), source)
    try:
        value = _value(tree, table)
    except (pa.ArrowException, TypeError) as error:
        raise ValueError(f"{source}: {text!r} does not fit the columns: {error}") from None
    if isinstance(value, pa.ChunkedArray):
        return value
    scalar = value if isinstance(value, pa.Scalar) else pa.scalar(value)
    return pa.chunked_array([pa.repeat(scalar, len(table))])


def _value(node: ast.expr, table: pa.Table) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return table.column(name)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return pc.negate(_value(operand, table))
        case ast.UnaryOp(operand=operand):
            return pc.invert(_truth(_value(operand, table)))
        case ast.BoolOp(op=op, values=parts):
            combine = pc.and_kleene if isinstance(op, ast.And) else pc.or_kleene
            first, *others = [_truth(_value(part, table)) for part in parts]
            for other in others:
                first = combine(first, other)
            return first
        case ast.Compare(left=left, ops=ops, comparators=right):
            result, under = None, left
            for op, over in zip(ops, right, strict=True):
                compared = _compared(under, op, over, table)
                result = compared if result is None else pc.and_kleene(result, compared)
                under = over
            return result
    raise TypeError(f"{ast.unparse(node)!r} has no value of its own")


def _compared(left: ast.expr, op: ast.cmpop, right: ast.expr, table: pa.Table) -> Any:
    column = _value(left, table)
    if isinstance(op, ast.In | ast.NotIn):
        if not isinstance(right, ast.List | ast.Tuple | ast.Set):
            raise TypeError("`in` needs a list, such as [cart, purchase]")
        values = pa.array([_literal(part) for part in right.elts])
        found = pc.is_in(column, value_set=values.cast(column.type))
        found = pc.invert(found) if isinstance(op, ast.NotIn) else found
        return pc.if_else(pc.is_valid(column), found, pa.scalar(None, pa.bool_()))
    if isinstance(right, ast.Name) and right.id not in table.column_names:
        return _COMPARISONS[type(op)](column, right.id)  # a word that is no column is a text
    return _COMPARISONS[type(op)](column, _value(right, table))


def _literal(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return name
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
    raise TypeError(f"{ast.unparse(node)!r} in a list is neither a number nor a word")


def _truth(value: Any) -> Any:
    """A column of numbers or bools as bools."""
    if isinstance(value, bool | int | float):
        return bool(value)
    return value if pa.types.is_boolean(value.type) else pc.not_equal(value, 0)
