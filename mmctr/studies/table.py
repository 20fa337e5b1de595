"""The results of a study as a table in the terminal."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmctr.reports.page import number
from mmctr.reports.run import SPLITS
from mmctr.studies.plots import STAGE_METRICS, epochs_of, pair, stage_names
from mmctr.studies.results import MIN_USERS

SHOWN = {"gAUC all": ("all", "gauc"), "gAUC warm": ("warm", "gauc"), "gAUC cold": ("cold", "gauc")} | {
    "AUC all": ("all", "auc"),
    "log loss": ("all", "log_loss"),
}
"""column -> (split, metric)"""


def study_table(results: dict[str, Any]) -> str:
    """The results as plain text, 100 columns wide: per protocol the metrics, the differences, validation by epoch."""
    console = Console(width=100, file=io.StringIO(), color_system=None, highlight=False)
    for name, protocol in results["protocols"].items():
        for title, table in _tables(name, protocol, results["study"]):
            console.print(Text(title))
            console.print(table)
    console.print(Text(results["rule"]))
    for cell in results["failed"]:
        console.print(Text(f"\nFAILED: {cell_name(cell)}; {cell['log']} ends with\n{cell['said']}"))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in lines).strip("\n")


def _tables(name: str, protocol: dict[str, Any], study: dict[str, Any]) -> Iterator[tuple[str, Table | str]]:
    """(title, table) one after another."""
    methods, rows = protocol["methods"], protocol["rows"]
    if not methods:
        yield name, "no run is finished\n"
        return
    counts = f"{rows['all']:,} test rows, {rows['cold']:,} of them of cold items"
    table = _table([*SHOWN, "seeds"])
    for method, found in methods.items():
        cells = [_text_summary(found["test"][split][metric]) for split, metric in SHOWN.values()]
        table.add_row(Text(method), *cells, str(len(found["seeds"])))
    yield f"{name}: {counts}; mean over seeds, lowest–highest", table
    compared = {method: found for method, found in methods.items() if found["difference"]}
    if compared:
        columns = [*SPLITS, *(["gap closed"] if study["oracle"] else [])]
        table = _table(columns)
        for method, found in compared.items():
            cells = [_text_difference(found["difference"][split]) for split in SPLITS]
            table.add_row(Text(method), *cells, *([share_text(found["gap_closed"])] if study["oracle"] else []))
        yield f"{name}: gAUC minus the gAUC of {study['baseline']} (95% interval)", table
    for metric, shown in (STAGE_METRICS if (stages := stage_names(methods)) else {}).items():
        table = _table(stages)
        for method, found in methods.items():
            table.add_row(Text(method), *(_text_summary(found["stages"][stage][metric]) for stage in stages))
        yield f"{name}: {shown} of the test rows before and after each stage", table
        table = _table(stages)
        for method, found in compared.items():
            table.add_row(Text(method), *(_text_difference(found["stages"][s]["difference"], metric) for s in stages))
        if compared:
            yield f"{name}: {shown} minus the {shown} of {study['baseline']}, by stage (95% interval)", table
    epochs = epochs_of(methods)
    if epochs:
        part = ", the first eight" if len(epochs) > 8 else ""
        table = _table([f"{epoch:g}" for epoch in epochs[:8]])
        for method, found in methods.items():
            curve = {point["epoch"]: point["gauc"] for point in found["validation"]}
            table.add_row(Text(method), *(mean_text(curve.get(epoch)) for epoch in epochs[:8]))
        yield f"{name}: validation gAUC by epoch{part}", table


def _table(columns: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _text_summary(found: dict[str, Any] | None) -> str:
    if found is None:
        return "–"
    both = "" if len(found["seeds"]) == 1 else f"\n{_bare(found['low'], '')}–{_bare(found['high'], '')}"
    return f"{found['mean']:.4f}{both}"


def _text_difference(found: dict[str, Any] | None, metric: str = "gauc") -> Text:
    if found is None or found[metric] is None:
        return Text("–")
    ends = found[f"{metric}_ci"]
    star = " *" if marked(found, metric) else "  "
    return Text(_bare(found[metric]) + star + (f"\n[{_bare(ends[0])}, {_bare(ends[1])}]" if ends else ""))


def _bare(value: float, sign: str = "+") -> str:
    """+.1234: without the leading zero, so that the columns fit."""
    shown = f"{value:{sign}.4f}"
    return shown.replace("+0.", "+.").replace("-0.", "-.") if sign else shown.removeprefix("0")


def marked(found: dict[str, Any] | None, metric: str = "gauc") -> bool:
    """Whether the interval of a difference holds no zero, and is of users enough to say so."""
    ends = pair(found[f"{metric}_ci"]) if found and found["num_users"] >= MIN_USERS else None
    return ends is not None and not ends[0] <= 0 <= ends[1]


def mean_text(found: dict[str, Any] | None) -> str:
    return number(found and found["mean"])


def share_text(found: dict[str, Any] | None) -> str:
    return "–" if found is None else number(found["share"], ".0%")


def cell_name(cell: dict[str, Any]) -> str:
    return f"{cell['protocol']} / {cell['method']} / seed {cell['seed']}"
