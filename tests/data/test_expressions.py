from __future__ import annotations

import pyarrow as pa
import pytest

from mmctr.data.expressions import columns_of, evaluate

TABLE = pa.table(
    {
        "rating": [1.0, 4.0, 5.0, None],
        "event": ["view", "cart", None, "purchase"],
        "clicked": [0, 1, 1, 0],
        "other": [1.0, 5.0, 4.0, 2.0],
    }
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rating >= 4", [False, True, True, None]),
        ("rating < other", [False, True, False, None]),
        ("1 < rating <= 4", [False, True, False, None]),
        ("event in [cart, purchase]", [False, True, None, True]),
        ("event in ('cart',)", [False, True, None, False]),
        ("event not in [cart]", [True, False, None, True]),
        ("event == cart", [False, True, None, False]),
        ("event != 'cart'", [True, False, None, True]),
        ("rating in [4, 5]", [False, True, True, None]),
        ("rating > -1 and event == view", [True, False, None, False]),
        ("event == view or rating >= 4", [True, True, True, None]),
        ("not clicked", [True, False, False, True]),
        ("clicked and (rating == 4 or event == purchase)", [False, True, None, False]),
        ("clicked", [0, 1, 1, 0]),
        ("1", [1, 1, 1, 1]),
    ],
)
def test_values(text, expected):
    """A missing value decides as null does in SQL."""
    assert evaluate(text, TABLE, "t").to_pylist() == expected


def test_columns_of_an_expression():
    assert columns_of("event in [cart] and not (clicked or rating > 3)") == {"event", "clicked", "rating"}
    assert columns_of("event == cart") == {"event"} and columns_of("1") == set()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rating >=", "no expression; write one like"),
        ("__import__('os').system('true')", "__import__.*is not read"),
        ("rating.x > 3", "'rating.x' is not read"),
        ("rating + 1 > 3", r"'rating \+ 1' is not read"),
        ("[r for r in rating]", "is not read"),
        ("rating is None", "comparisons are"),
        ("ratng >= 4", "t: column 'ratng' is missing; did you mean 'rating'"),
        ("ratng >= 4 and evnt == view", "t: columns 'evnt', 'ratng' are missing"),
        ("event >= 4", "t: 'event >= 4' does not fit the columns"),
        ("event and clicked", "does not fit the columns"),
        ("rating in clicked", "needs a list"),
        ("event in [1, cart]", "does not fit the columns"),
        ("(" * 600 + "1" + ")" * 600, "expression of 1201 characters"),
        ("(" * 400 + "1" + ")" * 400, "no expression"),
    ],
)
def test_what_is_wrong_is_said(text, message):
    with pytest.raises(ValueError, match=message):
        evaluate(text, TABLE, "t")
