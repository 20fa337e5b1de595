"""Graphs of finished runs in the ONNX format, checked against torch before they are called done.

What both kinds of runs share is here; `onnx_encoder` and `onnx_ranker` say which graphs a run has. A folder of graphs
holds `onnx.json`, which says all that a server in another language has to know.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

FORMAT = 1
OPSET = 20
TOLERANCE = 1e-4
"""largest difference to torch with which a graph counts as the same model"""
INT8_COSINE, INT8_PROBABILITY = 0.99, 0.02
"""a quantised graph that is farther from fp32 than this is said to be"""
LARGEST_FILE = 1 << 30
"""bytes of weights up to which they are inside the .onnx file: the format ends at 2 GB"""
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Axis:
    """A size that is an input of the graph, by name; 1 and less are sizes too."""

    name: str


@dataclass(frozen=True)
class Port:
    """An input or output of a graph, as the manifest has it."""

    shape: Sequence[Axis | int]
    dtype: str
    meaning: str

    def described(self) -> dict[str, Any]:
        return {"shape": [getattr(size, "name", size) for size in self.shape], "dtype": self.dtype, "is": self.meaning}


@dataclass(frozen=True)
class Graph:
    """A module of one argument, a dict of tensors, which gives a dict of tensors; and how it is described."""

    name: str
    """of the file, without .onnx"""
    module: nn.Module
    example: Inputs
    inputs: dict[str, Port]
    outputs: dict[str, Port]


def write_graph(
    graph: Graph,
    folder: Path,
    checks: Sequence[tuple[Inputs, dict[str, Tensor]]],
    difference: Callable[[np.ndarray, np.ndarray], float] | None = None,
) -> dict[str, Any]:
    """Export, run, compare; returns the graph's entry of the manifest.

    Args:
        checks: inputs, of other sizes than the example too, and what torch gives for them; outputs that are left out
            are not compared.
        difference: of an output to what is expected (default: the largest absolute one).

    Raises ValueError when an output differs by more than `TOLERANCE`.
    """
    path = folder / f"{graph.name}.onnx"
    frozen = [p for p in graph.module.parameters() if p.requires_grad]
    for p in frozen:  # a loop whose weights want gradients cannot be exported with a dynamic batch
        p.requires_grad_(False)
    try:
        with _quiet():
            program = torch.onnx.export(
                graph.module.eval(),
                kwargs={"inputs": {name: graph.example[name] for name in graph.inputs}},
                dynamo=True,
                dynamic_shapes={"inputs": _dynamic(graph.inputs)},
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                opset_version=OPSET,
                verbose=False,
            )
        assert program is not None
        weights = sum(x.numel() * x.element_size() for x in graph.module.state_dict().values())
        program.save(str(path), external_data=weights > LARGEST_FILE)
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ValueError(f"{path.name}: torch cannot export this model ({reason})") from error
    finally:
        for p in frozen:
            p.requires_grad_(True)
    run = Session(path)
    worst = 0.0
    for inputs, expected in checks:
        try:
            found = run(inputs)
        except Exception as error:  # onnxruntime's own classes, which are not public
            sizes = sizes_of(graph.inputs, inputs)
            raise ValueError(f"{path.name}: onnxruntime cannot run it on sizes {sizes} ({error})") from error
        for name, values in expected.items():
            want = values.numpy()
            if found[name].shape != want.shape:
                raise ValueError(f"{path.name}: {name} has shape {found[name].shape}, torch gives {want.shape}")
            if want.size:
                worst = max(worst, (difference or _largest)(found[name], want))
    if not worst < TOLERANCE:
        raise ValueError(
            f"{path.name}: differs from torch by {worst:.2e}, more than {TOLERANCE}; nothing was written. Another "
            f"version of onnxruntime may help"
        )
    return {
        "inputs": {name: port.described() for name, port in graph.inputs.items()},
        "outputs": {name: port.described() for name, port in graph.outputs.items()},
        "max_difference": worst,
        "checked_sizes": [sizes_of(graph.inputs, inputs) for inputs, _ in checks],
        "megabytes": megabytes(path),
    }


def sizes_of(ports: dict[str, Port], inputs: Inputs) -> dict[str, int]:
    """The dynamic sizes of some inputs."""
    return {
        axis.name: inputs[name].shape[place]
        for name, port in ports.items()
        for place, axis in enumerate(port.shape)
        if isinstance(axis, Axis)
    }


def megabytes(path: Path) -> float:
    """Of a graph and the weights beside it."""
    return round(sum(p.stat().st_size for p in (path, Path(f"{path}.data")) if p.is_file()) / 1e6, 2)


def _largest(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found.astype(np.float64) - expected.astype(np.float64)).max())


def _dynamic(ports: dict[str, Port]) -> dict[str, dict[int, Any]]:
    axes: dict[str, Any] = {}
    for port in ports.values():
        for axis in port.shape:
            if isinstance(axis, Axis):
                axes.setdefault(axis.name, torch.export.Dim(axis.name))
    return {
        name: {place: axes[axis.name] for place, axis in enumerate(port.shape) if isinstance(axis, Axis)}
        for name, port in ports.items()
    }


class Session:
    """A graph in onnxruntime, on a CPU."""

    def __init__(self, path: Path):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._names = [output.name for output in self._session.get_outputs()]

    def __call__(self, inputs: Inputs) -> dict[str, np.ndarray]:
        feed = {name: value.numpy() for name, value in inputs.items()}
        return dict(zip(self._names, self._session.run(None, feed), strict=True))  # type: ignore[arg-type]


def quantise(path: Path) -> Path:
    """Write the graph with int8 weights beside it, scales of activations found at run time; returns its path.

    Matrix products alone: int8 convolutions are slower than float ones on most CPUs and lose more.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    out = path.with_name(f"{path.stem}.int8.onnx")
    with _quiet():
        quantize_dynamic(
            path,
            out,
            weight_type=QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=["MatMul", "Gemm"],
            use_external_data_format=Path(f"{path}.data").is_file(),
            extra_options={"DefaultTensorType": 1},  # float, where the shape inference does not say
        )
    return out


def int8_entry(path: Path, differences: dict[str, float], warning: str) -> dict[str, Any]:
    """What the manifest says of a quantised graph."""
    import onnx

    nodes = onnx.load(str(path), load_external_data=False).graph.node
    products = sum(node.op_type == "MatMulInteger" for node in nodes)
    if not products:
        warning = "it has no matrix product that could be int8 (convolutions stay fp32), so nothing is gained"
    return {
        "file": path.name,
        "megabytes": megabytes(path),
        "int8_products": products,
        "differences": differences,
        "warning": warning,
    }


@contextmanager
def _quiet():
    """The exporters speak of their own insides."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
