"""A drawn catalog whose truth is known: what every picture shows, what every user likes, why every click happened.

It is the default data set and the instrument the rest is measured with. Items are coloured shapes with noisy titles;
users have a drifting taste over the factors of a drawing, so content predicts clicks; every item also has a quality
that no picture or title shows, so item ids predict something that content cannot.

The columns `factor_*` of items.parquet are ground truth for metrics; training on them is cheating.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from mmctr.config import Config
from mmctr.datasets.toy_pictures import FACTOR_VALUES, draw_pictures, encode_jpeg
from mmctr.files import replace_file

# How much of a user's taste hangs on each factor.
FACTOR_WEIGHTS = {"shape": 1.0, "colour": 1.0, "pattern": 0.7, "size": 0.4, "background": 0.3}
# Words for each value, in the order of FACTOR_VALUES. No word stands for two values.
_WORDS = {
    "shape": "circle disc round|ring hoop loop|square block tile|triangle pyramid wedge|star starburst asterisk|"
    "cross plus crosspiece",
    "colour": "red crimson scarlet|orange tangerine amber|yellow lemon golden|green emerald fern|blue navy cobalt|"
    "purple violet plum|pink rose fuchsia|black ebony jet",
    "pattern": "solid plain uniform|striped stripy lined|dotted polka-dot spotted|checked chequered gingham",
    "size": "small mini petite|medium mid-size regular|large big oversized",
    "background": "cream-backed on-ivory|mint-backed on-jade|sky-backed on-azure|blush-backed on-peach",
}
WORDS = {name: [words.split() for words in text.split("|")] for name, text in _WORDS.items()}
_BRANDS = """Arvello Bontek Cassiro Dunvale Elmora Fintry Gradova Holmqvist Istria Jorvane
    Kelbrook Lumaro Morvek Nestano Ostrava Pellmar Quenby Rostova Silvano Tarkin"""
_FILLERS = "new classic premium original handmade limited everyday deluxe signature essential gift vintage"
BRANDS, FILLERS = _BRANDS.split(), _FILLERS.split()
CATEGORIES = ["round", "round", "cornered", "cornered", "pointed", "pointed"]  # of each shape
AGE_GROUPS = ["18-24", "25-34", "35-44", "45-54", "55-64", "65+"]
REGIONS = ["north", "east", "south", "west", "centre", "coast", "islands", "abroad"]

START = 1_700_000_000  # seconds; the log begins here
SPAN = 90 * 86_400  # seconds; and is this long
_SESSION_GAP = 600  # seconds between the starts of a user's sessions, at least: sessions do not overlap
_ITEM_BASE, _USER_BASE = 7_000_000_000, 5_000_000_000  # integer ids beyond 32 bits, as many shops have
_BLOCK = 4096  # items share a random generator by blocks of this many rows, whatever batches they are asked for in
_USERS_PER_CHUNK = 512
_DRAW_BATCH = 512


class ToyWorldConfig(Config):
    """What the drawn catalog and its log look like."""

    num_items: int = Field(default=1200, ge=50, le=10_000_000)
    """items of the catalog"""
    num_users: int = Field(default=1500, ge=1, le=10_000_000)
    """users of the log"""
    impressions_per_user: int = Field(default=60, ge=1, le=10_000)
    """Mean over users; the spread is log-normal."""
    session_length: int = Field(default=6, ge=1, le=20)
    """Mean number of positions a session shows."""
    image_size: int = Field(default=48, ge=16, le=512)
    """side of a picture in pixels"""
    seed: int = Field(default=0, ge=0)
    """of everything random in the world"""
    title_noise: float = Field(default=0.05, ge=0, le=1)
    """Probability that a mentioned factor is the wrong one."""
    missing_picture: float = Field(default=0.03, ge=0, le=1)
    """Probability that an item has no picture."""
    missing_title: float = Field(default=0.03, ge=0, le=1)
    """Probability that an item has no title."""
    click_rate: float = Field(default=0.3, ge=0.01, le=0.99)
    """Mean of the label; the bias of the click model is solved for it."""
    taste_strength: float = Field(default=2.5, ge=0, le=20)
    """Logits per standard deviation of the user's utility."""
    quality_strength: float = Field(default=1.0, ge=0, le=20)
    """Logits per standard deviation of the item's hidden quality."""
    drift: float = Field(default=0.5, ge=0, le=1)
    """How far a user's taste moves to his second taste over the log: 0 stays, 1 arrives."""
    position_effect: float = Field(default=0.5, ge=0, le=10)
    """Logits lost per unit of log(1 + position)."""
    popularity_exponent: float = Field(default=0.8, ge=0, le=2)
    """Exposure of the item of rank r is proportional to r to the minus this; 0 is uniform."""
    pictures: Literal["files", "bytes"] = "files"
    """Whether items.parquet holds paths into images/ or the JPEG bytes."""
    string_ids: bool = False
    """Ids such as "toy-000123"; otherwise integers beyond 32 bits."""

    @model_validator(mode="after")
    def _sessions_fit(self) -> Self:
        if self.impressions_per_user < self.session_length:
            raise ValueError(
                f"impressions_per_user: {self.impressions_per_user} is less than one session of session_length "
                f"{self.session_length}; raise the one or lower the other"
            )
        return self


class ToyWorld:
    """The world of a config. Equal configs give equal worlds, whatever order or batches its parts are asked for in.

    factors: for each factor the true value of every item, (N,) integers into `factor_values[factor]`.
    taste: for each factor (U, 2, V) float32, the user's liking of each value at the begin and the end of a full drift,
        standardised over the values.
    quality: (N,) standard normal, hidden from pictures and titles.
    popularity: (N,) probability of exposure.
    item_ids, user_ids: (N,), (U,) as written to the parquet files.
    """

    factor_values = FACTOR_VALUES

    def __init__(self, config: ToyWorldConfig | None = None) -> None:
        self.config = config = config or ToyWorldConfig()
        rows = np.arange(config.num_items)
        draws = self._uniform("factors", rows, len(FACTOR_VALUES))
        self.factors = {
            name: (draws[:, i] * len(values)).astype(np.int64) for i, (name, values) in enumerate(FACTOR_VALUES.items())
        }
        self.brand = (self._uniform("brand", rows, 1)[:, 0] * len(BRANDS)).astype(np.int64)
        self.quality = self._rng("quality").standard_normal(config.num_items)
        weights = (1.0 + self._rng("popularity").permutation(config.num_items)) ** -config.popularity_exponent
        self.popularity = weights / weights.sum()
        self._exposure = np.cumsum(self.popularity)
        self._exposure[-1] = 1.0  # rounding must not leave a draw beyond the last item
        self.taste = {}
        for name, values in FACTOR_VALUES.items():
            taste = self._rng(f"taste {name}").standard_normal((config.num_users, 2, len(values)), dtype=np.float32)
            taste -= taste.mean(axis=2, keepdims=True)
            self.taste[name] = taste / taste.std(axis=2, keepdims=True)
        self.item_ids = self._ids("toy", _ITEM_BASE, config.num_items)
        self.user_ids = self._ids("user", _USER_BASE, config.num_users)

    # Randomness -----------------------------------------------------------------------------------------------------

    def _rng(self, purpose: str, block: int = 0) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, zlib.crc32(purpose.encode()), block])

    def _uniform(self, purpose: str, rows: np.ndarray, columns: int) -> np.ndarray:
        """(n, columns) float32 in [0, 1) that depend on the rows only, not on the batch they come in."""
        rows = np.asarray(rows)
        result = np.empty((len(rows), columns), dtype=np.float32)
        blocks = rows // _BLOCK
        for block in np.unique(blocks):
            here = blocks == block
            drawn = self._rng(purpose, int(block)).random((_BLOCK, columns), dtype=np.float32)
            result[here] = drawn[rows[here] % _BLOCK]
        return result

    def _ids(self, prefix: str, base: int, count: int) -> np.ndarray:
        return np.char.mod(f"{prefix}-%06d", np.arange(count)) if self.config.string_ids else base + np.arange(count)

    def item_rows(self, item_ids: np.ndarray) -> np.ndarray:
        """Rows of items by the ids in the parquet files."""
        return _rows(item_ids, _ITEM_BASE)

    def user_rows(self, user_ids: np.ndarray) -> np.ndarray:
        """Rows of users by the ids in the parquet files."""
        return _rows(user_ids, _USER_BASE)

    # Items ----------------------------------------------------------------------------------------------------------

    def draw(self, rows: np.ndarray) -> np.ndarray:
        """The pictures of some items, (n, 3, S, S) uint8 RGB."""
        rows = np.asarray(rows)
        size = self.config.image_size
        result = np.empty((len(rows), 3, size, size), dtype=np.uint8)
        for start in range(0, len(rows), _DRAW_BATCH):
            batch = rows[start : start + _DRAW_BATCH]
            factors = {name: values[batch] for name, values in self.factors.items()}
            result[start : start + len(batch)] = draw_pictures(factors, self._uniform("nuisance", batch, 4), size)
        return result

    def titles(self, rows: np.ndarray) -> list[str | None]:
        """Some of the factors in random words and order, a filler or two, now and then a brand; some are None."""
        extra = self._uniform("title extras", rows, 5)
        result: list[str | None] = []
        for row, words, (missing, brand, filler, second, place) in zip(
            rows, self._mentions("title", rows), extra.tolist(), strict=True
        ):
            if missing < self.config.missing_title:
                result.append(None)
                continue
            words.insert(int(place * (len(words) + 1)), _pick(FILLERS, filler))
            if second < 0.4:
                words.append(_pick(FILLERS, second / 0.4))
            if brand < 0.4:
                words.insert(0, BRANDS[self.brand[row]])
            title = " ".join(words)
            result.append(title[0].upper() + title[1:])
        return result

    def descriptions(self, rows: np.ndarray) -> list[str | None]:
        """A sentence or two for about half of the items, with mentions of its own; None for the others."""
        result: list[str | None] = []
        extra = self._uniform("description extras", rows, 2)
        for words, (missing, filler) in zip(self._mentions("description", rows), extra.tolist(), strict=True):
            about = f"It is {', '.join(words)}." if words else "See the picture for details."
            result.append(None if missing < 0.5 else f"From our {_pick(FILLERS, filler)} range. {about}")
        return result

    def _mentions(self, purpose: str, rows: np.ndarray) -> Iterator[list[str]]:
        """For each item the words of the factors it mentions (each with probability 0.75), in random order."""
        draws = self._uniform(purpose, rows, 4 * len(WORDS)).reshape(len(rows), len(WORDS), 4)
        truth = np.stack([self.factors[name][rows] for name in WORDS], axis=1)
        counts = np.array([len(values) for values in WORDS.values()])
        wrong = draws[..., 1] < self.config.title_noise
        # given that it is wrong, the same number is uniform again and says which of the other values it is
        shift = 1 + (draws[..., 1] / max(self.config.title_noise, 1e-9) * (counts - 1)).astype(np.int64)
        told = np.where(wrong, (truth + np.minimum(shift, counts - 1)) % counts, truth)
        words = list(WORDS.values())
        for values, said, pick, order in zip(
            told.tolist(),
            (draws[..., 0] < 0.75).tolist(),
            draws[..., 2].tolist(),
            draws[..., 3].argsort(1),
            strict=True,
        ):
            yield [_pick(words[f][values[f]], pick[f]) for f in order.tolist() if said[f]]

    def items(self, rows: np.ndarray, images: list[str | None] | list[bytes | None]) -> pa.Table:
        """The rows of items.parquet of some items, given what goes into their image column."""
        names = FACTOR_VALUES.items()
        return pa.table(
            {
                "item_id": pa.array(self.item_ids[rows]),
                "title": pa.array(self.titles(rows), pa.string()),
                "description": pa.array(self.descriptions(rows), pa.string()),
                "category": pa.array(np.array(CATEGORIES)[self.factors["shape"][rows]]),
                "brand": pa.array(np.array(BRANDS)[self.brand[rows]]),
                "image": pa.array(images, pa.binary() if self.config.pictures == "bytes" else pa.string()),
            }
            | {f"factor_{name}": pa.array(np.array(values)[self.factors[name][rows]]) for name, values in names}
        )

    # Users and clicks -----------------------------------------------------------------------------------------------

    def users(self) -> pa.Table:
        """users.parquet: the age group leans a little on the taste, the region not at all."""
        rng = self._rng("users")
        lean = 0.3 * self.taste["colour"][:, 0, 0] + rng.standard_normal(self.config.num_users)
        ages = np.searchsorted([-1.0, -0.4, 0.1, 0.6, 1.2], lean)
        regions = rng.integers(0, len(REGIONS), self.config.num_users)
        return pa.table(
            {
                "user_id": pa.array(self.user_ids),
                "age_group": pa.array(np.array(AGE_GROUPS)[ages]),
                "region": pa.array(np.array(REGIONS)[regions]),
            }
        )

    def oracle(self, user_rows: np.ndarray, item_rows: np.ndarray, timestamps: np.ndarray) -> np.ndarray:
        """How much the users like the factors of the items at these times (seconds): (n,), of about unit variance.

        The ceiling of every model of content; `click_logits` adds what is not content.
        """
        progress = np.clip((np.asarray(timestamps) - START) / SPAN, 0.0, 1.0)
        angle = progress * self.config.drift * (math.pi / 2)
        total = np.zeros(len(angle))
        for name, weight in FACTOR_WEIGHTS.items():
            values = self.factors[name][item_rows]
            before, after = (self.taste[name][user_rows, which, values] for which in (0, 1))
            total += weight * (np.cos(angle) * before + np.sin(angle) * after)
        return total / math.sqrt(sum(weight**2 for weight in FACTOR_WEIGHTS.values()))

    def click_logits(
        self, user_rows: np.ndarray, item_rows: np.ndarray, timestamps: np.ndarray, positions: np.ndarray
    ) -> np.ndarray:
        """(n,) logits of a click, without the bias that all share."""
        logits = self.config.taste_strength * self.oracle(user_rows, item_rows, timestamps)
        logits += self.config.quality_strength * self.quality[item_rows]
        return logits - self.config.position_effect * np.log1p(positions)

    @cached_property
    def bias(self) -> float:
        """The bias of the click model for which the first users click at `click_rate`."""
        logits = self.click_logits(*self._exposures(0)[:4])
        low, high = -100.0, 100.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if _sigmoid(middle + logits).mean() > self.config.click_rate else (middle, high)
        return (low + high) / 2

    def _exposures(self, chunk: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """What one chunk of users is shown: user rows, item rows, timestamps, positions, and a uniform to click by."""
        config, rng = self.config, self._rng("log", chunk)
        users = np.arange(chunk * _USERS_PER_CHUNK, min((chunk + 1) * _USERS_PER_CHUNK, config.num_users))
        spread = rng.lognormal(-0.125, 0.5, len(users))  # of mean 1
        sessions = np.maximum(1, np.rint(spread * config.impressions_per_user / config.session_length)).astype(np.int64)
        sessions = np.minimum(sessions, SPAN // 2 // _SESSION_GAP)
        user = np.repeat(users, sessions)
        ordinal = _count_up(sessions)
        when = rng.random(len(user))
        when = when[np.lexsort((when, user))]
        free = SPAN - _SESSION_GAP * np.repeat(sessions, sessions)
        begin = START + ordinal * _SESSION_GAP + (when * free).astype(np.int64)

        spare = config.session_length // 2
        lengths = rng.integers(config.session_length - spare, config.session_length + spare + 1, len(user))
        session, position = np.repeat(np.arange(len(user)), lengths), _count_up(lengths)
        item = self._distinct_items(rng, session)
        # a session is one page: all its positions have one time. Were they seconds apart, the clicks above would stand
        # in the history of those below, and a ranker could read the position off it
        return user[session], item, begin[session], position, rng.random(len(session))

    def _distinct_items(self, rng: np.random.Generator, session: np.ndarray) -> np.ndarray:
        """An item for every impression, by popularity, none twice in one session."""
        item = np.searchsorted(self._exposure, rng.random(len(session)), side="right")
        attempt = 0
        while True:
            order = np.lexsort((item, session))
            again = (np.diff(session[order]) == 0) & (np.diff(item[order]) == 0)
            repeated = order[1:][again]
            if not len(repeated):
                return item
            draws = rng.random(len(repeated))
            # a steep popularity offers the same few items again and again: after some attempts any other will do
            steep = attempt >= 20
            item[repeated] = draws * len(self.quality) if steep else np.searchsorted(self._exposure, draws, "right")
            attempt += 1

    def _log_chunks(self) -> Iterator[pa.Table]:
        for chunk in range(math.ceil(self.config.num_users / _USERS_PER_CHUNK)):
            user, item, timestamp, position, draw = self._exposures(chunk)
            label = draw < _sigmoid(self.bias + self.click_logits(user, item, timestamp, position))
            yield pa.table(
                {
                    "user_id": pa.array(self.user_ids[user]),
                    "item_id": pa.array(self.item_ids[item]),
                    "timestamp": pa.array(timestamp, pa.int64()),
                    "label": pa.array(label.astype(np.int8)),
                    "position": pa.array(position.astype(np.int16)),
                }
            )

    def interactions(self) -> pa.Table:
        """interactions.parquet: user by user, in the order of time."""
        return pa.concat_tables(self._log_chunks())

    # Files ----------------------------------------------------------------------------------------------------------

    def write(self, folder: Path) -> Path:
        """Write the dataset folder, over an older one if there is one; returns it. Memory does not grow with items."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / "items.parquet", partial(_write_parquet, self._item_chunks(folder)))
        replace_file(folder / "interactions.parquet", partial(_write_parquet, self._log_chunks()))
        replace_file(folder / "users.parquet", partial(_write_parquet, iter([self.users()])))
        return folder

    def _item_chunks(self, folder: Path) -> Iterator[pa.Table]:
        for start in range(0, self.config.num_items, _BLOCK):
            rows = np.arange(start, min(start + _BLOCK, self.config.num_items))
            missing = self._uniform("missing picture", rows, 1)[:, 0] < self.config.missing_picture
            images: list = [None] * len(rows)
            shown = np.flatnonzero(~missing)
            for batch in np.split(shown, range(_DRAW_BATCH, len(shown), _DRAW_BATCH)):
                for at, pixels in zip(batch.tolist(), self.draw(rows[batch]), strict=True):
                    images[at] = encode_jpeg(pixels)
            if self.config.pictures == "files":
                for at in shown.tolist():
                    row = start + at
                    path = folder / "images" / f"{row // 1000:04d}" / f"{row:07d}.jpg"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(images[at])
                    images[at] = path.relative_to(folder).as_posix()
            yield self.items(rows, images)


def _write_parquet(tables: Iterator[pa.Table], path: Path) -> None:
    """One row group per table."""
    first = next(tables)
    with pq.ParquetWriter(path, first.schema) as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)


def _pick(words: Sequence[str], uniform: float) -> str:
    return words[min(int(uniform * len(words)), len(words) - 1)]


def _rows(ids: np.ndarray, base: int) -> np.ndarray:
    ids = np.asarray(ids)
    if ids.dtype.kind in "iu":
        return ids - base
    return np.array([int(name.rpartition("-")[2]) for name in ids.tolist()], dtype=np.int64)


def _count_up(counts: np.ndarray) -> np.ndarray:
    """0, 1, ... count-1 for each count, one after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -x))
