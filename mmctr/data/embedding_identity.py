"""EmbeddingIdentity: what made the vectors of an embedding folder or an index."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class EmbeddingIdentity:
    """What made the vectors of an embedding folder; None where that is not known.

    Two folders of one identity hold the same vectors. An export that was killed goes on only under its own identity.

    Args:
        run: folder of the run whose encoder made the vectors.
        data: the dataset folder.
        weights: fingerprint of the weights, see `RunFolder.weights_fingerprint`.
        catalog: fingerprint of the item ids in catalog order.
        modality: `both`, `image` or `text`.
        item_vector: how picture and text are put together, see `PretrainTaskConfig.item_vector`.
        shard_size: items a shard.
        precision: of the towers; None: fp32.
        source: fingerprint of the pixels or tokens that were read, of features that frozen towers made.
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
    appended: bool = False

    @classmethod
    def from_json(cls, values: Any, source: str = "manifest.json") -> EmbeddingIdentity:
        """What `to_json` gave. Raises ValueError for anything else."""
        known = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or not set(values) <= known:
            unknown = sorted(set(values) - known) if isinstance(values, dict) else values
            raise ValueError(f"{source}: `identity` is none of `mmctr embed` ({unknown!r}); make the vectors again")
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """What is known, by name."""
        return {name: value for name, value in asdict(self).items() if value not in (None, False)}

    def change_of_encoder(self, other: EmbeddingIdentity) -> str | None:
        """The first field that says that `other` has another encoder, or options of it; None: vectors of both belong in
        one table. The catalog may have grown, and catalog and run may have been moved."""
        may_differ = ("catalog", "data", "run", "shard_size", "appended")
        names = [field.name for field in fields(self) if field.name not in may_differ]
        return next((name for name in names if getattr(self, name) != getattr(other, name)), None)

    def after_appending(self, other: EmbeddingIdentity) -> EmbeddingIdentity:
        """The identity of vectors of which some were made under this one, then further ones under `other`."""
        return replace(self, **(other.to_json() | {"appended": True}))
