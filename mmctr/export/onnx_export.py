"""`mmctr export RUN --format onnx`: the ONNX graphs of a finished run, checked against torch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmctr.export.onnx_graph import FORMAT, OPSET
from mmctr.files import replace_folder, write_json
from mmctr.tasks.folder import task_kind


def export_run(source: str, out: str, data: str | None = None, int8: bool = False) -> list[str]:
    """Write the graphs of a run folder of either kind into the folder `out`; returns what there is to say.

    Raises ValueError when the run is not finished, when onnx is not installed, for a ranker that has no graph, and when
    a graph differs from torch.
    """
    require_onnx()
    folder = Path(source)
    kind = task_kind(folder)
    if Path(out).exists() and not (Path(out) / "onnx.json").is_file():
        raise ValueError(f"{out}: exists and holds no earlier ONNX export; choose another --out")
    lines: list[str] = []

    def write(temporary: Path) -> None:
        if kind == "pretrain":
            from mmctr.export.onnx_encoder import export_encoder

            manifest = export_encoder(folder, temporary, data, int8)
        else:
            from mmctr.export.onnx_ranker import export_ranker

            manifest = export_ranker(folder, temporary, data, int8)
        write_json(temporary / "onnx.json", {"format": FORMAT, "kind": kind, "opset": OPSET, **manifest})
        lines.extend(_summary(out, manifest))

    replace_folder(Path(out), write)
    return lines


def _summary(out: str, manifest: dict[str, Any]) -> list[str]:
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
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX export needs {', '.join(missing)}: pip install 'mmctr[onnx]'")
