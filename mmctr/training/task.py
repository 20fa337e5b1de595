"""Task: the protocol of a module that `fit` trains, such as PretrainTask, RankingTask, or one of yours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


class Task(Protocol):
    """A `torch.nn.Module` that turns a batch into named, weighted loss terms.

    The methods below `after_step` are those of `nn.Module`, so a subclass of it writes the first three alone.
    """

    def __call__(self, batch: Any) -> dict[str, Tensor]:
        """Scalar loss terms by name, each already weighted: `fit` minimises the sum of the terms."""
        ...

    def parameter_parts(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by the part of the task they belong to, for optimiser settings by part. Each trained parameter is
        in one part."""
        ...

    def after_step(self) -> None:
        """Called after each update: put constraints on parameters back in force, store features of the step."""
        ...

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...


@runtime_checkable
class ChunkedTask(Task, Protocol):
    """A task whose loss reads features that can be encoded in chunks (`fit.chunk_size`)."""

    def chunks(self, batch: Any, size: int) -> Sequence[Any]:
        """The parts of a batch, each with at most `size` pictures, texts or queries to encode."""
        ...

    def encode_chunk(self, chunk: Any) -> dict[str, Tensor]:
        """(rows of the chunk, D) features by name. The features of a batch are those of the chunks, concatenated."""
        ...

    def terms_of(self, features: dict[str, Tensor], batch: Any) -> dict[str, Tensor]:
        """The named, weighted loss terms of a whole batch, from the features of all of its chunks."""
        ...
