"""The log of a run: one JSON object a line, and the same numbers to a tracker."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmctr.files import replace_file
from mmctr.training.context import RunContext


class Log:
    """`log.jsonl`: one JSON object a line, on the main process; lines after a resumed step are taken back."""

    def __init__(self, context: RunContext, step: int):
        self.path, self.accelerator = context.folder.log, context.accelerator
        self.prefix, self.steps_before = f"{context.phase}/" if context.phase else "", context.steps_before
        path = self.path
        if context.is_main_process:
            kept = [line for line in _json_lines(path) if line["step"] <= step]
            replace_file(
                path, lambda temporary: temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            )

    def write(self, values: dict[str, Any]) -> None:
        numbers = {f"validation/{k}": v for k, v in values["validation"].items()} if "validation" in values else values
        tracked = {self.prefix + name: value for name, value in numbers.items() if name != "step"}
        self.accelerator.log(tracked, step=self.steps_before + values["step"])
        if self.accelerator.is_main_process:
            with open(self.path, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(values) + "\n")


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a JSON lines file; a last line cut off by a crash is left out."""
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return
