from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from mmctr.concepts.disentanglement import udr
from mmctr.concepts.naming import Attribute, auc_with_interval, frequent_words, name_dimensions, read_attributes

N = 1200
RNG = np.random.default_rng(0)
COLOUR, SHAPE = RNG.integers(0, 4, N), RNG.integers(0, 2, N)
COLOURS = ["black", "navy", "white", "yellow"]
ATTRIBUTES = [Attribute("colour", COLOUR, COLOURS), Attribute("shape", SHAPE, ["round", "square"])]
# how bright each item is, its shape, noise, nothing
MU = np.stack(
    [
        np.array([-1.5, -1.0, 1.0, 1.5])[COLOUR] + 0.5 * RNG.normal(size=N),
        2.0 * SHAPE - 1 + 0.5 * RNG.normal(size=N),
        RNG.normal(size=N),
        np.full(N, 0.2),
    ],
    1,
)


def test_dimensions_get_the_names_of_what_they_follow():
    bright, shape, noise, nothing = name_dimensions(MU, ATTRIBUTES)
    assert bright.text == "colour: black, navy ↔ yellow, white" and bright.verified and bright.source == "column"
    assert shape.text == "shape: round ↔ square" and shape.verified
    assert shape.auc == pytest.approx(0.998, abs=0.004) and shape.interval[0] < shape.auc < shape.interval[1] <= 1
    assert sum(shape.num_items) == N // 2
    assert noise is not None and not noise.verified  # the best of what there is, and not shown as a name
    assert nothing is None


def test_names_are_found_and_verified_on_different_items():
    """What goes with a dimension on the naming half alone is no name."""
    naming = np.zeros(N, bool)
    naming[np.random.default_rng(0).permutation(N)[: N // 2]] = True
    lucky = np.where(naming, MU[:, 2] > 0, RNG.random(N) < 0.5).astype(np.int64)
    (name,) = name_dimensions(MU[:, 2:3], [Attribute("lucky", lucky, ["no", "yes"])])
    assert name.column == "lucky" and not name.verified and abs(name.auc - 0.5) < 0.06


def test_words_name_dimensions():
    titles = [f"{('dark' if c < 2 else 'bright') if RNG.random() < 0.7 else ''} thing {COLOURS[c]}" for c in COLOUR]
    (name,) = name_dimensions(MU[:, :1], texts=titles)
    assert name.source == "word" and name.column is None and name.verified and name.auc > 0.95
    assert name.low[0] in ("dark", "black") and set(name.low) <= {"dark", "black", "navy"}
    assert set(name.high) <= {"bright", "white", "yellow"} and "thing" not in name.text
    has, words = frequent_words([*titles, "Ärmel-los x2", *["zwölf"] * 20])
    assert "zwölf" in words and has[-20:, words.index("zwölf")].all() and "ärmel-los" not in words


def test_prompts_name_dimensions():
    alike = np.stack([RNG.normal(size=N), -MU[:, 0] + 0.3 * RNG.normal(size=N), MU[:, 0] + 0.3 * RNG.normal(size=N)], 1)
    (name,) = name_dimensions(MU[:, :1], prompts=(alike, ["striped", "a dark photo", "a bright photo"]))
    assert name.text == "a dark photo ↔ a bright photo" and name.source == "prompt" and name.verified


def test_columns_as_attributes():
    table = pa.table(
        {
            "item_id": range(N),
            "image": [None] * N,
            "colour": [COLOURS[c] if row % 10 else None for row, c in enumerate(COLOUR)],
            "constant": ["same"] * N,
            "unique": [f"value {row}" for row in range(N)],
            "rare": ["a"] * 600 + ["b"] * 590 + ["c"] * 10,
            "price": np.linspace(1, 100, N),
            "stars": RNG.integers(1, 6, N),
            "empty": pa.nulls(N, pa.string()),
        }
    )
    found, refused = read_attributes(table)
    assert [a.name for a in found] == ["colour", "rare", "price", "stars"]
    assert refused == {
        "constant": "the same for all items",
        "unique": "no value has 20 items",
        "empty": "no value has 20 items",
    }
    colour, rare, price, stars = found
    assert colour.codes[0] == -1 and [colour.values[c] for c in colour.codes[1:9]] == [COLOURS[c] for c in COLOUR[1:9]]
    assert rare.values == ["a", "b"] and (rare.codes[-10:] == -1).all()
    assert price.values[0] == "below 20.8" and price.values[-1] == "80.2 and more" and len(price.values) == 5
    assert np.bincount(price.codes).tolist() == [240] * 5 and (np.diff(price.codes) >= 0).all()
    assert sorted(stars.values) == ["1", "2", "3", "4", "5"]
    assert [a.name for a in read_attributes(table, ["rare"])[0]] == ["rare"]
    with pytest.raises(ValueError, match="column 'constant' cannot name anything: the same for all items"):
        read_attributes(table, ["constant"])
    with pytest.raises(ValueError, match="column 'size' is missing"):
        read_attributes(table, ["size"])


def test_intervals_hold_what_they_say():
    """95 % intervals of many samples cover the true AUC in about that many."""
    rng, covered = np.random.default_rng(1), 0
    truth = 0.760  # of two normals a standard deviation apart
    for _ in range(400):
        low, high = auc_with_interval(rng.normal(size=40), rng.normal(size=60) + 1)[1]
        covered += low < truth < high
    assert 0.91 < covered / 400 < 0.99
    assert auc_with_interval(np.zeros(1), np.ones(9)) == (0.5, (0.0, 1.0))


def test_udr_prefers_the_run_that_others_agree_with():
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))[0]
    base = RNG.normal(size=(N, 3))
    shuffled = base[:, [2, 0, 1]] * [1, -1, 2] + 0.05 * RNG.normal(size=(N, 3))
    dead = np.concatenate([base, np.zeros((N, 2))], 1)
    scores = udr([base, shuffled, dead, base @ rotation, np.zeros((N, 3))])
    assert min(scores[:3]) > scores[3] + 0.1 and scores[4] == 0
    assert udr([base, shuffled])[0] > 0.85
    with pytest.raises(ValueError, match="two or more"):
        udr([base])
