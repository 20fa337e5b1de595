from __future__ import annotations

import pyarrow as pa
import pytest

from mmctr.retrieval.filters import matching

ITEMS = pa.table(
    {
        "colour": ["red", "blue", None, "dark red"],
        "price": [5, 20, None, 7],
        "score": [0.5, float("nan"), 1.0, -2.0],
        "new": [True, False, None, True],
        "tags": [["a", "b"], [], None, ["b=c"]],
        "a<b": ["x", "y", "z", "x"],
    }
)


@pytest.mark.parametrize(
    ("conditions", "rows"),
    [
        ([], [0, 1, 2, 3]),
        (["colour=red"], [0]),
        ([" colour = dark red "], [3]),
        (["colour=red|blue"], [0, 1]),
        (["colour!=red"], [1, 3]),
        (["price<7"], [0]),
        (["price<=7.0"], [0, 3]),
        (["price>6", "price<20"], [3]),
        (["price>=20"], [1]),
        (["price=5|7"], [0, 3]),
        (["price!=5"], [1, 3]),
        (["score>=-5"], [0, 2, 3]),
        (["new=true"], [0, 3]),
        (["new!=True"], [1]),
        (["tags=b"], [0]),
        (["tags=b|b=c"], [0, 3]),
        (["tags!=b"], [1, 3]),
        (["colour=green"], []),
    ],
)
def test_conditions(conditions, rows):
    assert matching(ITEMS, conditions).nonzero()[0].tolist() == rows


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("colour", "write COLUMN=VALUE"),
        ("=red", "write COLUMN=VALUE"),
        ("size=3", "no column 'size' here; there are colour, price"),
        ("colour<3", "'colour' holds string, and < needs numbers"),
        ("price<cheap", "'cheap' is none"),
        ("price=cheap", "'cheap' is none"),
        ("new=yes", "true and false"),
    ],
)
def test_mistakes(condition, message):
    with pytest.raises(ValueError, match=message) as error:
        matching(ITEMS, [condition])
    assert repr(condition) in str(error.value)


def test_an_empty_catalog():
    assert matching(ITEMS.slice(0, 0), ["colour=red", "price<3", "tags=a"]).tolist() == []
