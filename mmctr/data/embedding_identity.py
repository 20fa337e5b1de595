"""EmbeddingIdentity: the run, data and options that produced the vectors of an embedding folder or an index."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

PATHS = ("run", "data")
"""fields that hold a folder"""


@dataclass(frozen=True)
class EmbeddingIdentity:
    """The run, data and options that produced the vectors of an embedding folder; None for an unknown fact.

    Two folders with equal identities hold the same vectors. An interrupted export continues only with an equal
    identity.

    Args:
        run: folder of the run whose encoder computed the vectors, kept as an absolute path.
        data: the dataset folder, kept as an absolute path.
        weights: fingerprint of the weights, as `RunFolder.weights_fingerprint` returns it.
        catalog: fingerprint of the item ids in catalog order.
        modality: `both`, `image` or `text`.
        item_vector: how the picture and text vectors of an item are combined: `PretrainTaskConfig.item_vector`.
        shard_size: number of items per shard.
        precision: floating-point precision of the towers; None: fp32.
        source: fingerprint of the pixels or tokens, for features computed by frozen towers.
        behavior_splits: the splits of logs whose training rows pretraining on behaviour has read, as
            [{"data": dataset folder, "split": the section `split`}, ...]; None without such pretraining.
        appended: whether items were added after the first export.
    """

    run: str | None = None
    data: str | None = None
    weights: str | None = None
    catalog: str | None = None
    modality: str | None = None
    item_vector: str | None = None
    shard_size: int | None = None
    precision: str | None = None
    source: str | None = None
    behavior_splits: list[dict[str, Any]] | None = None
    appended: bool = False

    def __post_init__(self) -> None:
        for name in PATHS:  # identities made in different working folders can be compared
            if getattr(self, name) is not None:
                object.__setattr__(self, name, os.path.abspath(getattr(self, name)))

    @classmethod
    def from_json(cls, values: Any, source: str = "manifest.json", folder: Path | None = None) -> EmbeddingIdentity:
        """The identity whose `to_json` gave `values`.

        Args:
            values: a mapping of field names to values.
            source: name of the file, for the error message.
            folder: the folder from which relative paths of `run` and `data` start; None: paths stay as they are.

        Raises:
            ValueError: `values` is not a mapping, or has an unknown key or a value of another type.
        """
        known = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or not set(values) <= known:
            unknown = sorted(set(values) - known) if isinstance(values, dict) else values
            raise ValueError(f"{source}: `identity` is none of `mmctr embed` ({unknown!r}); make the vectors again")
        for name in PATHS:
            if not isinstance(values.get(name), str | None):
                raise ValueError(f"{source}: `identity`: {name} is {values[name]!r}, but must be a path")
        if folder is not None:
            values = values | {
                name: os.path.normpath(folder.resolve() / values[name]) for name in PATHS if values.get(name)
            }
        return cls(**values)

    def to_json(self, folder: Path | None = None) -> dict[str, Any]:
        """The known facts by field name.

        Args:
            folder: the folder that gets the facts: `run` and `data` become paths that start there, so that folders can
                be moved together and shared without the paths of this machine; None: paths stay as they are.
        """
        facts = {name: value for name, value in asdict(self).items() if value not in (None, False)}
        if folder is not None:
            for name in PATHS:
                if name in facts:
                    with suppress(ValueError):  # another drive
                        facts[name] = Path(os.path.relpath(facts[name], folder.resolve())).as_posix()
        return facts

    def change_of_encoder(self, other: EmbeddingIdentity) -> str | None:
        """The name of the first field that shows that `other` has another encoder or other encoder options.

        The catalog may have grown, and the folders of the catalog and the run may have been moved.

        Returns:
            None when the vectors of both identities may be stored in one table.
        """
        may_differ = ("catalog", "data", "run", "shard_size", "behavior_splits", "appended")
        names = [field.name for field in fields(self) if field.name not in may_differ]
        return next((name for name in names if getattr(self, name) != getattr(other, name)), None)

    def after_appending(self, other: EmbeddingIdentity) -> EmbeddingIdentity:
        """The identity of a table to which vectors with the identity `other` were appended."""
        return replace(self, **(other.to_json() | {"appended": True}))
