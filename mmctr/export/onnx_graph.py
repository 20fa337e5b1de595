"""Writing of ONNX graphs, each of which is compared with torch.

`onnx_encoder` and `onnx_ranker` define the graphs of the two kinds of runs. A folder of graphs has a manifest,
`onnx.json`, with all facts that a server in another language needs.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

FORMAT = 1
"""version of the manifest"""
OPSET = 20
TOLERANCE = 1e-4
"""largest accepted difference between the outputs of a graph and of torch"""
INT8_COSINE, INT8_PROBABILITY = 0.99, 0.02
"""smallest cosine and largest difference of probabilities of a quantised graph without a warning"""
LARGEST_FILE = 1 << 30
"""largest number of bytes of weights inside the .onnx file; larger weights are a separate file, as the format ends at
2 GB"""
Inputs = dict[str, Tensor]
"""inputs of a graph by name"""


@dataclass(frozen=True)
class Axis:
    """A dynamic dimension of a graph, by name; any size from 0 is allowed."""

    name: str


@dataclass(frozen=True)
class Port:
    """An input or output of a graph."""

    shape: Sequence[Axis | int]
    dtype: str
    meaning: str

    def described(self) -> dict[str, Any]:
        """The entry of the manifest."""
        return {"shape": [getattr(size, "name", size) for size in self.shape], "dtype": self.dtype, "is": self.meaning}


@dataclass(frozen=True)
class Graph:
    """A module from a dictionary of tensors to a dictionary of tensors, with the descriptions for the manifest."""

    name: str
    """name of the file, without .onnx"""
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
    """Write a graph, run it in onnxruntime, and compare the outputs with torch.

    Args:
        graph: the graph.
        folder: folder of the file.
        checks: inputs, also of other sizes than the example, and the outputs of torch; only these are compared.
        difference: function from an output and the expected output to a number; None: the largest absolute difference.

    Returns:
        The entry of the graph in the manifest.

    Raises:
        ValueError: torch cannot export the graph, onnxruntime cannot run the graph, or an output differs by more than
            `TOLERANCE`.
    """
    path = folder / f"{graph.name}.onnx"
    _export(graph, path)
    worst = _worst_difference(graph, path, checks, difference or _largest)
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


def _export(graph: Graph, path: Path) -> None:
    """Write the file of a graph; ValueError where torch cannot export the module."""
    trained = [p for p in graph.module.parameters() if p.requires_grad]
    for p in trained:  # a loop with trained weights cannot be exported with a dynamic batch size
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
        _forget_sources(program.model)
        weights = sum(x.numel() * x.element_size() for x in graph.module.state_dict().values())
        program.save(str(path), external_data=weights > LARGEST_FILE)
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ValueError(f"{path.name}: torch cannot export this model ({reason})") from error
    finally:
        for p in trained:
            p.requires_grad_(True)


def _forget_sources(model: Any) -> None:
    """Remove the source lines from an `onnx_ir.Model`, which name files and folders of this machine."""
    for graph in (model.graph, *model.functions.values()):
        graph.metadata_props.clear()
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None


def _worst_difference(
    graph: Graph,
    path: Path,
    checks: Sequence[tuple[Inputs, dict[str, Tensor]]],
    difference: Callable[[np.ndarray, np.ndarray], float],
) -> float:
    """The largest difference between outputs of onnxruntime and of torch; ValueError for wrong shapes."""
    run = Session(path)
    worst = 0.0
    for inputs, expected in checks:
        try:
            outputs = run(inputs)
        except Exception as error:  # the classes of errors of onnxruntime are not public
            sizes = sizes_of(graph.inputs, inputs)
            raise ValueError(f"{path.name}: onnxruntime cannot run it on sizes {sizes} ({error})") from error
        for name, values in expected.items():
            torch_output = values.numpy()
            if outputs[name].shape != torch_output.shape:
                raise ValueError(
                    f"{path.name}: {name} has shape {outputs[name].shape}, torch gives {torch_output.shape}"
                )
            if torch_output.size:
                worst = max(worst, difference(outputs[name], torch_output))
    return worst


def sizes_of(ports: dict[str, Port], inputs: Inputs) -> dict[str, int]:
    """The sizes of the dynamic dimensions of inputs, by the name of the dimension."""
    return {
        axis.name: inputs[name].shape[dimension]
        for name, port in ports.items()
        for dimension, axis in enumerate(port.shape)
        if isinstance(axis, Axis)
    }


def megabytes(path: Path) -> float:
    """The size in MB of the file of a graph and of the separate file of weights, if there is one."""
    return round(sum(p.stat().st_size for p in (path, Path(f"{path}.data")) if p.is_file()) / 1e6, 2)


def _largest(output: np.ndarray, expected: np.ndarray) -> float:
    """The largest absolute difference."""
    return float(np.abs(output.astype(np.float64) - expected.astype(np.float64)).max())


def _dynamic(ports: dict[str, Port]) -> dict[str, dict[int, Any]]:
    """The dynamic dimensions of inputs as `torch.onnx.export` takes them."""
    axes: dict[str, Any] = {}
    for port in ports.values():
        for axis in port.shape:
            if isinstance(axis, Axis):
                axes.setdefault(axis.name, torch.export.Dim(axis.name))
    return {
        name: {dim: axes[axis.name] for dim, axis in enumerate(port.shape) if isinstance(axis, Axis)}
        for name, port in ports.items()
    }


class Session:
    """A graph in onnxruntime, on a CPU.

    Args:
        path: the .onnx file.
    """

    def __init__(self, path: Path):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._names = [output.name for output in self._session.get_outputs()]

    def __call__(self, inputs: Inputs) -> dict[str, np.ndarray]:
        """The outputs of the graph by name."""
        feed = {name: value.numpy() for name, value in inputs.items()}
        outputs: list[Any] = list(self._session.run(None, feed))
        return dict(zip(self._names, outputs, strict=True))


def quantise(path: Path) -> Path:
    """Write a copy of a graph with int8 weights, and scales of activations computed at run time.

    Only matrix products are quantised: on most CPUs int8 convolutions are slower than float convolutions, and less
    accurate.

    Args:
        path: the .onnx file.

    Returns:
        The path of the copy.
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
    """The entry of a quantised graph in the manifest.

    Args:
        path: the .onnx file with int8 weights.
        differences: differences to the fp32 graph by name.
        warning: a warning for the user; empty: none.
    """
    import onnx

    nodes = onnx.load(str(path), load_external_data=False).graph.node
    products = sum(node.op_type == "MatMulInteger" for node in nodes)
    if not products:
        warning = "the graph has no matrix product that could be int8 (convolutions stay fp32), so nothing is gained"
    return {
        "file": path.name,
        "megabytes": megabytes(path),
        "int8_products": products,
        "differences": differences,
        "warning": warning,
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the context the warnings and log lines of the exporters are suppressed."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
