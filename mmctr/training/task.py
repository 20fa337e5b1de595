"""Task: the protocol of a module that `fit` trains, such as PretrainTask and RankingTask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


class Task(Protocol):
    """A `torch.nn.Module` that turns a batch into named, weighted loss terms.

    `nn.Module` has the methods after `after_step`, so a subclass of `nn.Module` defines only the first three.
    """

    def __call__(self, batch: Any) -> dict[str, Tensor]:
        """Scalar loss terms by name, each already weighted: `fit` minimises the sum of the terms."""
        ...

    def parameter_parts(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by the part of the task, for optimizer settings by part; each trained parameter is in one part."""
        ...

    def after_step(self) -> None:
        """Called after each update: for example to clamp parameters, or to store features of the step."""
        ...

    def train(self, mode: bool = True) -> Any:
        """Set the training mode, as `nn.Module.train`."""
        ...

    def eval(self) -> Any:
        """Set the evaluation mode, as `nn.Module.eval`."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters with names."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """All modules, the task included."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Parameters and buffers by name."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any:
        """Set parameters and buffers by name."""
        ...


@runtime_checkable
class ChunkedTask(Task, Protocol):
    """A task whose loss reads features that can be encoded in chunks (`fit.chunk_size`)."""

    def chunks(self, batch: Any, size: int) -> Sequence[Any]:
        """The chunks of a batch, each with at most `size` items or queries to encode."""
        ...

    def encode_chunk(self, chunk: Any) -> dict[str, Tensor]:
        """Features (rows of the chunk, D) by name; the concatenation over all chunks gives the features of a batch."""
        ...

    def terms_of(self, features: dict[str, Tensor], batch: Any) -> dict[str, Tensor]:
        """The weighted loss terms of a batch by name, from the concatenated features of all chunks."""
        ...
