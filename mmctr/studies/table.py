"""The results of a study as text tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from mmctr.reports.compare import plain_text
from mmctr.reports.page import number_text
from mmctr.reports.run import SPLITS
from mmctr.studies.config import StudyConfig
from mmctr.studies.plots import STAGE_METRICS
from mmctr.studies.result_types import Difference, GapClosed, ProtocolResults, SeedSummary, StudyResults

TEST_COLUMNS = {
    "gAUC all": ("all", "gauc"),
    "gAUC warm": ("warm", "gauc"),
    "gAUC cold": ("cold", "gauc"),
    "AUC all": ("all", "auc"),
    "log loss": ("all", "log_loss"),
}
"""column of the test metrics -> (split, metric)"""
MAX_EPOCHS = 8
"""epochs that fit the width of a table"""


def study_table(results: StudyResults) -> str:
    """The results as plain text, 100 columns wide: per protocol the metrics, the differences, validation by epoch."""
    blocks: list[Table | Text] = []
    for name, protocol in results.protocols.items():
        for title, table in _protocol_tables(name, protocol, results.study):
            blocks += [Text(title), table]
    blocks.append(Text(results.rule))
    blocks += [Text(f"\nFAILED: {cell.name}; {cell.log} ends with\n{cell.reason}") for cell in results.failed]
    return plain_text(blocks)


def _protocol_tables(name: str, protocol: ProtocolResults, study: StudyConfig) -> Iterator[tuple[str, Table | Text]]:
    """(title, table) of one protocol, one after another."""
    methods, num_rows = protocol.methods, protocol.num_rows
    if not methods:
        yield name, Text("no run is finished\n")
        return
    table = _table([*TEST_COLUMNS, "seeds"])
    for method, results in methods.items():
        cells = [_summary_text(results.test[split][metric]) for split, metric in TEST_COLUMNS.values()]
        table.add_row(Text(method), *cells, str(len(results.seeds)))
    counts = (
        f"{num_rows['all']:,} test rows, {num_rows['cold']:,} of them of cold items; users with both labels: "
        + ", ".join(f"{split} {count:,}" for split, count in protocol.num_users.items())
    )
    yield f"{name}: {counts}; mean over seeds, lowest–highest", table
    compared = {method: results for method, results in methods.items() if results.difference}
    if compared:
        table = _table([*SPLITS, *(["gap closed"] if study.oracle else [])])
        for method, results in compared.items():
            cells = [_difference_text(results.split_difference(split)) for split in SPLITS]
            table.add_row(Text(method), *cells, *([share_text(results.gap_closed)] if study.oracle else []))
        yield f"{name}: gAUC minus the gAUC of {study.baseline} (95% interval)", table
    yield from _stage_tables(name, protocol, study)
    epochs = protocol.epochs[:MAX_EPOCHS]
    if epochs:
        part = ", the first eight" if len(protocol.epochs) > MAX_EPOCHS else ""
        table = _table([f"{epoch:g}" for epoch in epochs])
        for method, results in methods.items():
            curve = {point.epoch: point.metrics["gauc"] for point in results.validation}
            table.add_row(Text(method), *(mean_text(curve.get(epoch)) for epoch in epochs))
        yield f"{name}: validation gAUC by epoch{part}", table


def _stage_tables(name: str, protocol: ProtocolResults, study: StudyConfig) -> Iterator[tuple[str, Table]]:
    """(title, table) of the warm-up stages of a `staged` protocol, none for other protocols."""
    stages = protocol.stage_names
    compared = {method: results for method, results in protocol.methods.items() if results.difference}
    for metric, metric_name in (STAGE_METRICS if stages else {}).items():
        table = _table(stages)
        for method, results in protocol.methods.items():
            table.add_row(Text(method), *(_summary_text(results.stages[stage].metrics[metric]) for stage in stages))
        yield f"{name}: {metric_name} of the test rows before and after each stage", table
        table = _table(stages)
        for method, results in compared.items():
            cells = [_difference_text(results.stages[stage].difference, metric) for stage in stages]
            table.add_row(Text(method), *cells)
        if compared:
            yield f"{name}: {metric_name} minus the {metric_name} of {study.baseline}, by stage (95% interval)", table


def _table(columns: Sequence[str]) -> Table:
    """An empty table with a column of methods and columns of numbers."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _summary_text(summary: SeedSummary | None) -> str:
    """The mean over seeds, and the range of several seeds on a second line."""
    if summary is None:
        return "–"
    ends = summary.range
    return f"{summary.mean:.4f}" + (f"\n{_short(ends[0], '')}–{_short(ends[1], '')}" if ends else "")


def _difference_text(difference: Difference | None, metric: str = "gauc") -> Text:
    """A difference with a star where it is marked, and the interval on a second line."""
    value, interval = difference.estimate(metric) if difference else (None, None)
    if difference is None or value is None:
        return Text("–")
    star = " *" if difference.is_marked(metric) else "  "
    return Text(_short(value) + star + (f"\n[{_short(interval[0])}, {_short(interval[1])}]" if interval else ""))


def _short(value: float, sign: str = "+") -> str:
    """+.1234: without the leading zero, so that the columns fit."""
    digits = f"{value:{sign}.4f}"
    return digits.replace("+0.", "+.").replace("-0.", "-.") if sign else digits.removeprefix("0")


def mean_text(summary: SeedSummary | None) -> str:
    """The mean over seeds with four decimals, a dash without any value."""
    return number_text(summary.mean if summary else None)


def share_text(gap_closed: GapClosed | None) -> str:
    """The share of the gap that is closed in percent, a dash where it is not defined."""
    return number_text(gap_closed.share if gap_closed else None, ".0%")
