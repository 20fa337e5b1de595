"""Compiled versions of the slowest functions of DIN: `library()` is `native.cpp`, built once with the local compiler.

Without a compiler, or with `MMCTR_NATIVE=0`, torch computes the same functions. The results of both implementations
differ by rounding alone; two runs are equal bit for bit only if both runs use the same implementation.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mmctr.files import cache_folder, fingerprint, replace_file

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ["-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC"]
WIDTH = 16
"""number of floats of a vector register; sizes are padded to multiples of this number"""
MAX_HIDDEN, MAX_CHANNELS = 128, 1024


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library, built in the cache folder on first use; None where a build is impossible."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if os.environ.get("MMCTR_NATIVE") == "0" or compiler is None or sys.platform != "linux":
        return None
    key = fingerprint(SOURCE.read_text(encoding="utf-8"), FLAGS, compiler, platform.machine(), _processor())
    path = cache_folder() / "native" / f"{key[:16]}.so"
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(
                path,
                lambda out: subprocess.run(
                    [compiler, *FLAGS, "-o", str(out), str(SOURCE)], check=True, capture_output=True
                ),
            )
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        warnings.warn(f"{SOURCE.name} cannot be compiled or loaded ({error}); DIN goes on with torch", stacklevel=2)
        return None


def _processor() -> str:
    """The features of the processor, on which `-march=native` depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def usable(*tensors: Tensor) -> bool:
    """Whether the library exists and all tensors are float32 on a CPU."""
    return all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors) and library() is not None


def _call(name: str, *arguments: int | Tensor) -> None:
    """Call a function of the library with the number of threads, then integers and pointers to contiguous tensors."""
    converted: list[ctypes._SimpleCData] = [ctypes.c_int(torch.get_num_threads())]
    for x in arguments:
        if not isinstance(x, int) and (x.dtype not in (torch.float32, torch.int64) or not x.is_contiguous()):
            raise TypeError(f"{name} takes contiguous float32 and int64 tensors, not {x.dtype}")
        converted.append(ctypes.c_int64(x) if isinstance(x, int) else ctypes.c_void_p(x.data_ptr()))
    getattr(library(), name)(*converted)


def _padded(x: Tensor, rows: int, columns: int) -> Tensor:
    """A contiguous matrix of the given size, padded with zeros."""
    return F.pad(x, (0, columns - x.shape[1], 0, rows - x.shape[0])).contiguous()


def _round_up(size: int) -> int:
    return -(-size // WIDTH) * WIDTH


def _unit_inputs(
    query: Tensor, items: Tensor, dim: int, hidden: int, history: Tensor, offsets: Tensor
) -> tuple[int | Tensor, ...]:
    """The first arguments of both passes of the activation unit; `dim` and `hidden` are the padded sizes."""
    return (
        len(query),
        dim,
        hidden,
        offsets.long().contiguous(),
        history.long().contiguous(),
        _padded(items, len(items), dim),
        _padded(query, len(query), dim),
    )


def unit_forward(
    query: Tensor,
    items: Tensor,
    weight: Tensor,
    query_part: Tensor,
    key_weight: Tensor,
    history: Tensor,
    offsets: Tensor,
) -> Tensor:
    """The forward pass of `mmctr.layers.activation_unit.Interaction`.

    Args:
        query: (B, D) queries.
        items: (U, D) vectors of distinct items.
        weight: (hidden, D) weight of the products of query and key.
        query_part: (B, hidden) first layer applied to the queries.
        key_weight: (hidden, D) weight of the keys.
        history: (H,) positions of the keys in `items`.
        offsets: (B + 1,) offsets of the queries in `history`.

    Returns:
        (H, hidden).

    Raises:
        IndexError: a position is outside `items`.
    """
    if len(history) and not (int(history.min()) >= 0 and int(history.max()) < len(items)):
        raise IndexError(f"a history names an item outside the {len(items)} of its batch")
    dim, hidden = _round_up(items.shape[1]), _round_up(len(weight))
    out = query.new_empty((len(history), hidden))
    _call(
        "unit_forward",
        *_unit_inputs(query, items, dim, hidden, history, offsets),
        _padded(query_part, len(query), hidden),
        _padded(key_weight.T, dim, hidden),
        _padded(weight.T, dim, hidden),
        out,
    )
    return out if hidden == len(weight) else out[:, : len(weight)].contiguous()


def unit_backward(
    query: Tensor, items: Tensor, weight: Tensor, key_weight: Tensor, history: Tensor, offsets: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The backward pass of `unit_forward`, given the gradient (H, hidden) of the result.

    Returns:
        Gradients of query (B, D), query_part (B, hidden), the keys (H, D), weight and key_weight (hidden, D).
    """
    size, width = len(weight), items.shape[1]
    dim, hidden, threads = _round_up(width), _round_up(size), torch.get_num_threads()
    d_query, d_query_part = query.new_empty((len(query), dim)), query.new_empty((len(query), hidden))
    d_keys = query.new_empty((len(history), dim))
    d_key_weight, d_weight = query.new_zeros((2, threads, dim, hidden)).unbind()
    _call(
        "unit_backward",
        *_unit_inputs(query, items, dim, hidden, history, offsets),
        _padded(key_weight, hidden, dim),
        _padded(weight, hidden, dim),
        _padded(weight.T, dim, hidden),
        _padded(grad, len(grad), hidden),
        d_query,
        d_query_part,
        d_keys,
        d_key_weight,
        d_weight,
    )
    d_weight, d_key_weight = (part.sum(0)[:width, :size].T for part in (d_weight, d_key_weight))
    return d_query[:, :width], d_query_part[:, :size], d_keys[:, :width], d_weight, d_key_weight


def dice_squares(s: Tensor, mean: Tensor) -> Tensor:
    """The (C,) sums of the squared deviations of s (n, C) from mean (C,)."""
    squares = s.new_zeros((torch.get_num_threads(), s.shape[1]))
    _call("dice_squares", *s.shape, s, mean.contiguous(), squares)
    return squares.sum(0)


def dice_forward(s: Tensor, mean: Tensor, r: Tensor, alpha: Tensor) -> Tensor:
    """The (n, C) values s (alpha + (1 - alpha) sigmoid((s - mean) r)) for s (n, C) and mean, r, alpha (C,) each."""
    out = torch.empty_like(s)
    _call("dice_forward", *s.shape, s, mean.contiguous(), r.contiguous(), alpha.contiguous(), out)
    return out


def dice_backward(s: Tensor, grad: Tensor, mean: Tensor, r: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of s (n, C) for constant statistics, and the (4, C) sums from which the other gradients follow."""
    out, sums = torch.empty_like(s), s.new_zeros((torch.get_num_threads(), 4, s.shape[1]))
    _call("dice_backward", *s.shape, s, grad, mean.contiguous(), r.contiguous(), alpha.contiguous(), out, sums)
    return out, sums.sum(0)


def dice_finish(out: Tensor, s: Tensor, mean: Tensor, factor: Tensor, constant: Tensor) -> None:
    """Add (s - mean) * factor + constant to `out` (n, C) in place; mean, factor and constant are (C,) each."""
    _call("dice_finish", *s.shape, s, mean.contiguous(), factor.contiguous(), constant.contiguous(), out)
