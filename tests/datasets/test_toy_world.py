from __future__ import annotations

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmctr.datasets.toy_config import ToyWorldConfig
from mmctr.datasets.toy_pictures import FACTOR_VALUES, PALETTE
from mmctr.datasets.toy_words import FILLERS, WORDS
from mmctr.datasets.toy_world import SPAN, START, ToyWorld

ROWS = np.arange(1200)


@pytest.fixture(scope="module")
def world() -> ToyWorld:
    return ToyWorld()


@pytest.fixture(scope="module")
def log(world) -> dict[str, np.ndarray]:
    """The default log as rows."""
    return as_rows(world)


def as_rows(world: ToyWorld) -> dict[str, np.ndarray]:
    columns = {name: column.to_numpy() for name, column in zip(*columns_of(world.interactions()), strict=True)}
    return columns | {"user": world.user_rows(columns["user_id"]), "item": world.item_rows(columns["item_id"])}


def columns_of(table):
    return table.column_names, table.columns


def gauc(users: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> float:
    """AUC within each user that has both labels, weighted by his impressions. No ties expected."""
    total = weight = 0.0
    for user in np.unique(users):
        y, x = labels[users == user], scores[users == user]
        clicks, others = int(y.sum()), int((1 - y).sum())
        if clicks and others:
            ranks = x.argsort().argsort() + 1
            auc = (ranks[y == 1].sum() - clicks * (clicks + 1) / 2) / (clicks * others)
            total, weight = total + auc * len(y), weight + len(y)
    return total / weight


def test_pictures(world):
    pictures = world.draw(ROWS[:40])
    assert pictures.shape == (40, 3, 48, 48) and pictures.dtype == np.uint8
    shuffled = np.array([31, 2, 17, 2])
    assert (world.draw(shuffled) == pictures[shuffled]).all()
    assert ToyWorld(ToyWorldConfig(image_size=32, num_items=50)).draw(ROWS[:3]).shape == (3, 3, 32, 32)


def test_an_item_does_not_depend_on_how_many_there_are(world):
    larger = ToyWorld(ToyWorldConfig(num_items=9000))
    assert (larger.draw(ROWS[:20]) == world.draw(ROWS[:20])).all()
    assert larger.titles(ROWS) == world.titles(ROWS)
    across = np.array([4095, 4096, 8191, 8192, 5])  # the blocks that share a random generator
    assert (larger.draw(across)[::-1] == larger.draw(across[::-1])).all()
    assert larger.titles(across)[4] == world.titles(ROWS)[5]


def test_factors_can_be_seen(world):
    """Each factor changes the picture, and the colour can be read off the drawn area."""
    pictures = world.draw(ROWS).transpose(0, 2, 3, 1).astype(float)
    corner = pictures[:, 0, 0][:, None, None]
    drawn = np.abs(pictures - corner).max(axis=-1) > 40
    area = drawn.mean(axis=(1, 2))
    for shape in range(len(FACTOR_VALUES["shape"])):
        here = world.factors["shape"] == shape
        small, medium, large = (np.median(area[here & (world.factors["size"] == s)]) for s in range(3))
        assert small < 0.7 * medium < 0.7 * 0.8 * large

    # the most saturated drawn pixels are those of the first tone, whatever the pattern
    guessed = np.empty(len(ROWS), dtype=int)
    for i in ROWS:
        pixels = pictures[i][drawn[i]]
        far = pixels[np.abs(pixels - 255).sum(axis=1).argsort()[-max(4, len(pixels) // 4) :]]
        guessed[i] = ((PALETTE - far.mean(axis=0)) ** 2).sum(axis=1).argmin()
    assert (guessed == world.factors["colour"]).mean() > 0.95

    # patterns have edges inside the shape
    edges = np.abs(np.diff(pictures, axis=1)).sum(axis=(1, 2, 3)) / area
    patterns = world.factors["pattern"]
    solid = np.median(edges[patterns == 0])
    assert all(np.median(edges[patterns == p]) > 1.3 * solid for p in (1, 2, 3))


def test_titles_tell_the_truth_most_of_the_time(world):
    titles = world.titles(ROWS)
    told = [title for title in titles if title is not None]
    assert 0.01 < 1 - len(told) / len(titles) < 0.06
    assert len({word for values in WORDS.values() for words in values for word in words} | set(FILLERS)) == sum(
        len(words) for values in WORDS.values() for words in values
    ) + len(FILLERS)
    for name, values in WORDS.items():
        value_of = {word: value for value, words in enumerate(values) for word in words}
        right = wrong = 0
        for row, title in enumerate(titles):
            for word in (title or "").lower().split():
                if word in value_of:
                    right += value_of[word] == world.factors[name][row]
                    wrong += value_of[word] != world.factors[name][row]
        assert 0.7 < (right + wrong) / len(told) < 0.8, name
        assert 0.02 < wrong / (right + wrong) < 0.08, name
    described = [text for text in world.descriptions(ROWS) if text]
    assert 0.45 < len(described) / len(ROWS) < 0.55


def test_title_noise_ends():
    clean = ToyWorld(ToyWorldConfig(title_noise=0, missing_title=0, num_items=50))
    noisy = ToyWorld(ToyWorldConfig(title_noise=1, missing_title=0, num_items=50))
    for world, expected in ((clean, True), (noisy, False)):
        for row, title in enumerate(world.titles(ROWS[:50])):
            for name, values in WORDS.items():
                said = [v for v, words in enumerate(values) if set(words) & set((title or "").lower().split())]
                assert all((v == world.factors[name][row]) == expected for v in said)


@pytest.mark.parametrize("seed", [0, 3])
def test_the_oracle_is_a_ceiling_worth_reaching(seed):
    world = ToyWorld(ToyWorldConfig(seed=seed, num_users=600))
    log = as_rows(world)
    taste = world.oracle(log["user"], log["item"], log["timestamp"])
    known = gauc(log["user"], log["label"], taste)
    assert known >= 0.82
    both = world.config.taste_strength * taste + world.config.quality_strength * world.quality[log["item"]]
    assert gauc(log["user"], log["label"], both) >= known + 0.015
    # the taste of the first day is worth less later: it drifts
    stale = world.oracle(log["user"], log["item"], np.full(len(taste), START))
    assert gauc(log["user"], log["label"], stale) < known - 0.01
    assert 0.9 < taste.std() < 1.1


def test_log(world, log):
    assert 0.25 < log["label"].mean() < 0.35
    assert abs(len(log["label"]) / (1500 * 60) - 1) < 0.1
    assert log["timestamp"].dtype == np.int64 and log["timestamp"].min() >= START
    assert SPAN * 0.95 < np.ptp(log["timestamp"]) <= SPAN + 600
    same_user = np.diff(log["user"]) == 0
    assert (np.diff(log["timestamp"])[same_user] >= 0).all() and (np.diff(log["user"]) >= 0).all()
    # an item at most once in a session; a session starts where the position is 0
    session = np.cumsum(log["position"] == 0)
    assert len(np.unique(session * 10_000 + log["item"])) == len(session)
    shown_first, shown_late = log["label"][log["position"] == 0].mean(), log["label"][log["position"] >= 5].mean()
    assert shown_first > shown_late + 0.05


def test_popularity_is_zipf_like(world, log):
    counts = np.sort(np.bincount(log["item"], minlength=1200))[::-1]
    ranks = np.arange(1, 1201)
    slope = np.polyfit(np.log(ranks[2:600]), np.log(counts[2:600]), 1)[0]
    assert -0.95 < slope < -0.6
    assert world.popularity.sum() == pytest.approx(1)
    assert np.corrcoef(world.popularity, world.quality)[0, 1] < 0.1


@pytest.mark.parametrize("pictures", ["files", "bytes"])
@pytest.mark.parametrize("string_ids", [False, True])
def test_write(tmp_path, pictures, string_ids):
    config = ToyWorldConfig(
        num_items=100,
        num_users=20,
        impressions_per_user=12,
        missing_picture=0.1,
        pictures=pictures,
        string_ids=string_ids,
    )
    world = ToyWorld(config)
    one, two = world.write(tmp_path / "one"), ToyWorld(config).write(tmp_path / "two")
    for name in ("items", "interactions", "users"):
        assert (one / f"{name}.parquet").read_bytes() == (two / f"{name}.parquet").read_bytes()
    items = pq.read_table(one / "items.parquet").to_pydict()
    assert set(items) == {"item_id", "title", "description", "category", "brand", "image"} | {
        f"factor_{name}" for name in FACTOR_VALUES
    }
    assert len(set(items["item_id"])) == 100 and items["factor_colour"] == [
        FACTOR_VALUES["colour"][v] for v in world.factors["colour"]
    ]
    assert 0 < sum(image is None for image in items["image"]) < 25
    for row, image in enumerate(items["image"]):
        if image is not None:
            data = image if pictures == "bytes" else (one / image).read_bytes()
            pixels = np.asarray(Image.open(io.BytesIO(data))).transpose(2, 0, 1).astype(float)
            assert np.abs(pixels - world.draw(np.array([row]))[0]).mean() < 6

    log = pq.read_table(one / "interactions.parquet")
    assert log.column_names == ["user_id", "item_id", "timestamp", "label", "position"]
    assert log.equals(world.interactions())
    users = pq.read_table(one / "users.parquet").to_pydict()
    assert set(users) == {"user_id", "age_group", "region"}
    assert set(log["item_id"].to_pylist()) <= set(items["item_id"])
    assert set(log["user_id"].to_pylist()) == set(users["user_id"])
    assert isinstance(items["item_id"][0], str if string_ids else int)
    assert (world.item_rows(np.array(items["item_id"])) == np.arange(100)).all()
    assert (world.user_rows(np.array(users["user_id"])) == np.arange(20)).all()


def test_seeds_differ():
    one, two = (ToyWorld(ToyWorldConfig(num_items=50, num_users=5, seed=seed)) for seed in (1, 2))
    assert not (one.factors["shape"] == two.factors["shape"]).all()
    assert not one.interactions().equals(two.interactions())


def test_extreme_settings_still_give_a_log():
    config = ToyWorldConfig(
        num_items=50, num_users=30, popularity_exponent=2, session_length=20, click_rate=0.05, drift=1, seed=7
    )
    log = as_rows(ToyWorld(config))
    session = np.cumsum(log["position"] == 0)
    assert len(np.unique(session * 100 + log["item"])) == len(session)
    assert 0.02 < log["label"].mean() < 0.09
    lonely = ToyWorld(ToyWorldConfig(num_items=50, num_users=1, impressions_per_user=1, session_length=1))
    assert lonely.interactions().num_rows >= 1


@pytest.mark.parametrize(
    "values",
    [
        {"num_items": 10},
        {"num_users": 0},
        {"image_size": 8},
        {"title_noise": 1.5},
        {"missing_picture": -0.1},
        {"popularity_exponent": 9},
        {"drift": 2},
        {"pictures": "urls"},
        {"impressions_per_user": 3},
        {"pictures_size": 3},
    ],
)
def test_bad_values_raise_and_are_named(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        ToyWorldConfig(**values)
