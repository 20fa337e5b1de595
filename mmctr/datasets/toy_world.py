"""ToyWorld: a synthetic dataset with known ground truth for pictures, tastes and clicks.

ToyWorld is the default dataset of demos and tests. Items are coloured shapes with noisy titles. Users have a drifting
taste over the factors of a drawing, so content predicts clicks. Every item also has a hidden quality that no picture or
title reveals, so item ids predict a part of the clicks that content cannot predict.

The columns `factor_*` of items.parquet are ground truth for metrics and are not meant for training.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from mmctr.datasets.toy_config import ToyWorldConfig
from mmctr.datasets.toy_draws import count_up, row_numbers, sigmoid, word_at, write_parquet
from mmctr.datasets.toy_pictures import FACTOR_VALUES, draw_pictures, encode_jpeg
from mmctr.datasets.toy_words import BRANDS, FILLERS, WORDS
from mmctr.files import replace_file

# Weight of each factor in the taste of a user.
FACTOR_WEIGHTS = {"shape": 1.0, "colour": 1.0, "pattern": 0.7, "size": 0.4, "background": 0.3}
CATEGORIES = ["round", "round", "cornered", "cornered", "pointed", "pointed"]  # of each shape
AGE_GROUPS = ["18-24", "25-34", "35-44", "45-54", "55-64", "65+"]
REGIONS = ["north", "east", "south", "west", "centre", "coast", "islands", "abroad"]

START = 1_700_000_000  # seconds; the log begins here
SPAN = 90 * 86_400  # seconds; and is this long
_SESSION_GAP = 600  # seconds between the starts of a user's sessions, at least: sessions do not overlap
_ITEM_BASE, _USER_BASE = 7_000_000_000, 5_000_000_000  # integer ids beyond 32 bits, as many shops have
_BLOCK = 4096  # blocks of this many items share a random generator, so that draws do not depend on batches
_USERS_PER_CHUNK = 512
_DRAW_BATCH = 512


class ToyWorld:
    """A synthetic dataset of N items and U users, computed from a config.

    Equal configs give equal worlds, in whatever order and batches the parts of a world are computed.

    Args:
        config: size, noise and click model; None: the defaults.

    Attributes:
        config: the config.
        factors: factor name -> (N,) int64 true value of every item, as a position in `factor_values[name]`.
        brand: (N,) int64 brand of every item.
        taste: factor name -> (U, 2, V) float32 utility of each of the V values for a user at the begin and the end of a
            full drift, standardised over the values.
        quality: (N,) standard normal numbers that pictures and titles do not reveal.
        popularity: (N,) probability of exposure of every item.
        item_ids: (N,) raw ids as written to items.parquet.
        user_ids: (U,) raw ids as written to users.parquet.

    Example:
        ```python
        world = mmctr.ToyWorld(mmctr.ToyWorldConfig(num_items=100, num_users=20, image_size=32))
        pictures, titles = world.draw([0, 1]), world.titles([0, 1])  # (2, 3, 32, 32) uint8; strings or None
        log = world.interactions()  # the click log as a pyarrow table
        assert pictures.shape == (2, 3, 32, 32) and 0.1 < log["label"].to_numpy().mean() < 0.5
        ```
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
        """The (n,) int64 item rows of n raw item ids."""
        return row_numbers(item_ids, _ITEM_BASE)

    def user_rows(self, user_ids: np.ndarray) -> np.ndarray:
        """The (n,) int64 user rows of n raw user ids."""
        return row_numbers(user_ids, _USER_BASE)

    # Items ----------------------------------------------------------------------------------------------------------

    def draw(self, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        """Draw the pictures of some items.

        Args:
            rows: (n,) item rows.

        Returns:
            (n, 3, S, S) uint8 RGB, S being `config.image_size`.
        """
        rows = np.asarray(rows)
        size = self.config.image_size
        result = np.empty((len(rows), 3, size, size), dtype=np.uint8)
        for start in range(0, len(rows), _DRAW_BATCH):
            batch = rows[start : start + _DRAW_BATCH]
            factors = {name: values[batch] for name, values in self.factors.items()}
            result[start : start + len(batch)] = draw_pictures(factors, self._uniform("nuisance", batch, 4), size)
        return result

    def titles(self, rows: np.ndarray | Sequence[int]) -> list[str | None]:
        """The titles of some items: factors in random words and order, one or two filler words, and sometimes a brand.

        Args:
            rows: (n,) item rows.

        Returns:
            n titles, None for an item without a title.
        """
        rows = np.asarray(rows)
        extra = self._uniform("title extras", rows, 5)
        result: list[str | None] = []
        for row, words, (missing, brand, filler, second, place) in zip(
            rows, self._mentions("title", rows), extra.tolist(), strict=True
        ):
            if missing < self.config.missing_title:
                result.append(None)
                continue
            words.insert(int(place * (len(words) + 1)), word_at(FILLERS, filler))
            if second < 0.4:
                words.append(word_at(FILLERS, second / 0.4))
            if brand < 0.4:
                words.insert(0, BRANDS[self.brand[row]])
            title = " ".join(words)
            result.append(title[0].upper() + title[1:])
        return result

    def descriptions(self, rows: np.ndarray) -> list[str | None]:
        """The descriptions of n items: factors in random words and order, independent of the title; None for about half
        of the items."""
        result: list[str | None] = []
        extra = self._uniform("description extras", rows, 2)
        for words, (missing, filler) in zip(self._mentions("description", rows), extra.tolist(), strict=True):
            about = f"It is {', '.join(words)}." if words else "See the picture for details."
            result.append(None if missing < 0.5 else f"From our {word_at(FILLERS, filler)} range. {about}")
        return result

    def _mentions(self, purpose: str, rows: np.ndarray) -> Iterator[list[str]]:
        """For each item the words of the factors it mentions (each with probability 0.75), in random order."""
        draws = self._uniform(purpose, rows, 4 * len(WORDS)).reshape(len(rows), len(WORDS), 4)
        truth = np.stack([self.factors[name][rows] for name in WORDS], axis=1)
        counts = np.array([len(values) for values in WORDS.values()])
        wrong = draws[..., 1] < self.config.title_noise
        # given that the value is wrong, the same number is uniform again and selects one of the other values
        shift = 1 + (draws[..., 1] / max(self.config.title_noise, 1e-9) * (counts - 1)).astype(np.int64)
        named = np.where(wrong, (truth + np.minimum(shift, counts - 1)) % counts, truth)
        words = list(WORDS.values())
        for values, mentioned, pick, order in zip(
            named.tolist(),
            (draws[..., 0] < 0.75).tolist(),
            draws[..., 2].tolist(),
            draws[..., 3].argsort(1),
            strict=True,
        ):
            yield [word_at(words[f][values[f]], pick[f]) for f in order.tolist() if mentioned[f]]

    def items(self, rows: np.ndarray, images: list[str | None] | list[bytes | None]) -> pa.Table:
        """The rows of items.parquet of some items.

        Args:
            rows: (n,) item rows.
            images: n values of the column `image`: paths, JPEG bytes, or None for an item without a picture.
        """
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
        """The table users.parquet: the age group correlates weakly with the taste, the region is independent."""
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
        """The true utility of items for users, as far as pictures and titles reveal it.

        The AUC of these scores is the upper limit for every model of content; `click_logits` adds the hidden quality
        and the position.

        Args:
            user_rows: (n,) user rows.
            item_rows: (n,) item rows.
            timestamps: (n,) times in seconds.

        Returns:
            (n,) scores of about unit variance.
        """
        progress = np.clip((np.asarray(timestamps) - START) / SPAN, 0.0, 1.0)
        angle = progress * self.config.drift * (math.pi / 2)
        total = np.zeros(len(angle))
        for name, weight in FACTOR_WEIGHTS.items():
            values = self.factors[name][item_rows]
            before, after = (self.taste[name][user_rows, end, values] for end in (0, 1))
            total += weight * (np.cos(angle) * before + np.sin(angle) * after)
        return total / math.sqrt(sum(weight**2 for weight in FACTOR_WEIGHTS.values()))

    def click_logits(
        self, user_rows: np.ndarray, item_rows: np.ndarray, timestamps: np.ndarray, positions: np.ndarray
    ) -> np.ndarray:
        """The true logits of a click, without the common bias.

        Args:
            user_rows: (n,) user rows.
            item_rows: (n,) item rows.
            timestamps: (n,) times in seconds.
            positions: (n,) positions on the page, from 0.

        Returns:
            (n,) logits.
        """
        logits = self.config.taste_strength * self.oracle(user_rows, item_rows, timestamps)
        logits += self.config.quality_strength * self.quality[item_rows]
        return logits - self.config.position_effect * np.log1p(positions)

    @cached_property
    def bias(self) -> float:
        """The bias of the click model, for which the first 512 users have a mean label of `config.click_rate`."""
        logits = self.click_logits(*self._exposures(0)[:4])
        low, high = -100.0, 100.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if sigmoid(middle + logits).mean() > self.config.click_rate else (middle, high)
        return (low + high) / 2

    def _exposures(self, chunk: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The impressions of one chunk of users: user rows, item rows, timestamps, positions, and uniform numbers from
        which the labels follow."""
        config, rng = self.config, self._rng("log", chunk)
        users = np.arange(chunk * _USERS_PER_CHUNK, min((chunk + 1) * _USERS_PER_CHUNK, config.num_users))
        spread = rng.lognormal(-0.125, 0.5, len(users))  # of mean 1
        sessions = np.maximum(1, np.rint(spread * config.impressions_per_user / config.session_length)).astype(np.int64)
        sessions = np.minimum(sessions, SPAN // 2 // _SESSION_GAP)
        user = np.repeat(users, sessions)
        ordinal = count_up(sessions)
        when = rng.random(len(user))
        when = when[np.lexsort((when, user))]
        free = SPAN - _SESSION_GAP * np.repeat(sessions, sessions)
        begin = START + ordinal * _SESSION_GAP + (when * free).astype(np.int64)

        spare = config.session_length // 2
        lengths = rng.integers(config.session_length - spare, config.session_length + spare + 1, len(user))
        session, position = np.repeat(np.arange(len(user)), lengths), count_up(lengths)
        item = self._distinct_items(rng, session)
        # a session is one page, so all positions have the same time. With different times, clicks on upper positions
        # would be in the histories of lower positions, and a ranker could infer the position from the history
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
            label = draw < sigmoid(self.bias + self.click_logits(user, item, timestamp, position))
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
        """The table interactions.parquet: the click log, sorted by user and time."""
        return pa.concat_tables(self._log_chunks())

    # Files ----------------------------------------------------------------------------------------------------------

    def write(self, folder: Path) -> Path:
        """Write the world as a dataset folder, over an existing one. The memory needed does not grow with the catalog.

        Args:
            folder: the dataset folder.

        Returns:
            The folder, which `open_dataset` reads.

        Raises:
            OSError: a file cannot be written.

        Example:
            ```python
            import tempfile
            from pathlib import Path

            world = mmctr.ToyWorld(mmctr.ToyWorldConfig(num_items=100, num_users=20))
            folder = world.write(Path(tempfile.mkdtemp()) / "toy")
            assert len(mmctr.open_dataset(folder).catalog) == 100
            ```
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / "items.parquet", partial(write_parquet, self._item_chunks(folder)))
        replace_file(folder / "interactions.parquet", partial(write_parquet, self._log_chunks()))
        replace_file(folder / "users.parquet", partial(write_parquet, iter([self.users()])))
        return folder

    def _item_chunks(self, folder: Path) -> Iterator[pa.Table]:
        for start in range(0, self.config.num_items, _BLOCK):
            rows = np.arange(start, min(start + _BLOCK, self.config.num_items))
            missing = self._uniform("missing picture", rows, 1)[:, 0] < self.config.missing_picture
            images: list = [None] * len(rows)
            drawn = np.flatnonzero(~missing)
            for batch in np.split(drawn, range(_DRAW_BATCH, len(drawn), _DRAW_BATCH)):
                for at, pixels in zip(batch.tolist(), self.draw(rows[batch]), strict=True):
                    images[at] = encode_jpeg(pixels)
            if self.config.pictures == "files":
                for at in drawn.tolist():
                    row = start + at
                    path = folder / "images" / f"{row // 1000:04d}" / f"{row:07d}.jpg"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(images[at])
                    images[at] = path.relative_to(folder).as_posix()
            yield self.items(rows, images)
