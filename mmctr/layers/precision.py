"""Float32 arithmetic inside autocast, for losses and softmax."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def in_float32(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorate a function of tensors, at least one of them given by position: bfloat16 and float16 tensors among the
    arguments become float32, and autocast is off inside.

    Autocast computes matrix products in bfloat16 whatever the type of the factors, so that casting the factors alone
    does not suffice: a logit near 100 would be rounded to a multiple of 0.5.
    """

    @wraps(function)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        first = next(value for value in args if isinstance(value, Tensor))
        with torch.autocast(first.device.type, enabled=False):
            wide: Any = function
            return wide(*map(_wide, args), **{name: _wide(value) for name, value in kwargs.items()})

    return wrapped


def _wide(value: Any) -> Any:
    """A float32 copy of a tensor of a shorter floating type; other values as given."""
    is_short = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if is_short else value
