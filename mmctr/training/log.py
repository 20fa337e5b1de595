"""The log of a run: one JSON object per line, and the same numbers for a tracker."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmctr.files import replace_file
from mmctr.training.context import RunContext


class Log:
    """`log.jsonl`, one JSON object per line, written by the main process.

    Args:
        context: run folder and processes.
        step: the step at which training begins or resumes; later lines of the file are removed.
    """

    def __init__(self, context: RunContext, step: int):
        self.path, self.accelerator = context.folder.log, context.accelerator
        self.prefix, self.steps_before = f"{context.phase}/" if context.phase else "", context.steps_before
        path = self.path
        if context.is_main_process:
            lines = [line for line in _json_lines(path) if line["step"] <= step]
            replace_file(
                path, lambda temporary: temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
            )

    def write(self, values: dict[str, Any]) -> None:
        """Append a line, and give the numbers to the tracker.

        Args:
            values: the numbers by name, with "step", and with the metrics of an evaluation under "validation".
        """
        numbers = {f"validation/{k}": v for k, v in values["validation"].items()} if "validation" in values else values
        tracked = {self.prefix + name: value for name, value in numbers.items() if name != "step"}
        self.accelerator.log(tracked, step=self.steps_before + values["step"])
        if self.accelerator.is_main_process:
            with open(self.path, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(values) + "\n")


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a JSON lines file; an incomplete last line of a crash is left out."""
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return
