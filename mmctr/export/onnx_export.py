"""`mmctr export RUN --format onnx`: the ONNX graphs of a finished run, checked against torch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmctr.export.onnx_graph import FORMAT, OPSET
from mmctr.files import replace_folder
from mmctr.manifests import require_replaceable, write_manifest
from mmctr.tasks.folder import task_kind

MANIFEST = "onnx.json"
EXPORTED = ("*.onnx", "*.onnx.data", "*.safetensors", "*.parquet", "*.json", "*.txt", "vocabulary", "tokenizer")
"""names of the other files and folders of an ONNX export"""


def export_run(source: str, out: str, data: str | None = None, int8: bool = False) -> list[str]:
    """Write the ONNX graphs of a run into a folder.

    Args:
        source: run folder of either kind.
        out: folder to write, new or of an earlier ONNX export.
        data: dataset folder whose item vectors are written; None: the dataset of the run.
        int8: whether to write graphs with int8 weights as well.

    Returns:
        Lines for the user.

    Raises:
        ValueError: the run is not finished, onnx is not installed, the ranker has no graph, or a graph differs from
            torch.
    """
    require_onnx()
    folder = Path(source)
    kind = task_kind(folder)
    require_replaceable(Path(out), MANIFEST, EXPORTED, "ONNX export")
    lines: list[str] = []

    def write(temporary: Path) -> None:
        if kind == "pretrain":
            from mmctr.export.onnx_encoder import export_encoder

            manifest = export_encoder(folder, temporary, data, int8)
        else:
            from mmctr.export.onnx_ranker import export_ranker

            manifest = export_ranker(folder, temporary, data, int8)
        files = [path.relative_to(temporary).as_posix() for path in temporary.rglob("*") if path.is_file()]
        write_manifest(temporary / MANIFEST, {"format": FORMAT, "kind": kind, "opset": OPSET, **manifest}, files)
        lines.extend(_summary(out, manifest))

    replace_folder(Path(out), write)
    return lines


def _summary(out: str, manifest: dict[str, Any]) -> list[str]:
    """Lines for the user on the graphs of a manifest."""
    lines = []
    for name, graph in manifest["graphs"].items():
        lines.append(f"{out}/{name}: differs from torch by {graph['max_difference']:.1e} at most")
        if "int8" in graph:
            facts = graph["int8"]
            numbers = ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in facts["differences"].items())
            lines.append(f"{out}/{facts['file']}: {facts['megabytes']} MB instead of {graph['megabytes']}; {numbers}")
            if facts["warning"]:
                lines.append(f"warning: {facts['file']}: {facts['warning']}")
    return [*lines, *(f"no {name}: {reason}" for name, reason in manifest.get("left_out", {}).items())]


def require_onnx() -> None:
    """Raise ValueError where a package for the ONNX export is not installed."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX export needs {', '.join(missing)}: pip install 'mmctr[onnx]'")
