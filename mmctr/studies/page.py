"""The results of a study as a text table and as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mmctr.files import write_text
from mmctr.reports.page import document, number, scrolling, spread, text
from mmctr.reports.plots import figure, line_label
from mmctr.reports.run import SPLITS
from mmctr.studies.plots import STAGE_METRICS, by_stage, pair, plots, stage_names, stage_plots
from mmctr.studies.table import SHOWN, cell_name, marked, mean_text, share_text

# The page ------------------------------------------------------------------------------------------------------------


def write_study_page(results: dict[str, Any], path: str | Path) -> None:
    """Write one HTML file that needs nothing else. It appears whole or not at all; OSError when it cannot be."""
    study = results["study"]
    sections = [f"<h1>Cold items: {text(study['data'])}</h1>\n<p class='lead'>{text(_lead(results))}</p>"]
    for cell in results["failed"]:
        sections.append(
            f"<h2>Failed: {text(cell_name(cell))}</h2>\n<p>{text(cell['log'])} ends with</p>"
            f"<pre tabindex='0'>{text(cell['said'])}</pre>"
        )
    for place, (name, protocol) in enumerate(results["protocols"].items()):
        heading = f"<h2>{text(name)}</h2>\n"
        if not protocol["methods"]:
            sections.append(f"{heading}<p class='empty'>No run is finished.</p>")
            continue
        sections.append(f"{heading}{_metrics(protocol)}{_differences(protocol, results)}")
        sections[-1] += _stages(place, protocol["methods"], study["baseline"]) + _plots(place, protocol)
    shown = yaml.safe_dump(study, sort_keys=False, allow_unicode=True)
    sections.append(f"<h2>The study</h2>\n<pre tabindex='0'>{text(shown)}</pre>")
    write_text(Path(path), document(f"Cold items: {study['data']}", sections))


def _lead(results: dict[str, Any]) -> str:
    """The result on cold items in a sentence or two a protocol."""
    study, words = results["study"], []
    for name, protocol in results["protocols"].items():
        outer = (study["baseline"], study["oracle"])
        known = {key: found["test"]["cold"]["gauc"] for key, found in protocol["methods"].items() if key not in outer}
        ranked = sorted((found["mean"], key) for key, found in known.items() if found)
        if not ranked:
            words.append(f"{name}: no gAUC on cold items to compare.")
            continue
        mean, best = ranked[-1]
        found = protocol["methods"][best]
        words.append(
            f"{name}: on {protocol['rows']['cold']:,} rows of cold items {best} has the highest gAUC, {mean:.4f}"
        )
        difference = found["difference"] and found["difference"]["cold"]
        if difference and difference["gauc"] is not None and difference["gauc_ci"]:
            low, high = difference["gauc_ci"]
            words[-1] += (
                f", {difference['gauc']:+.4f} against {study['baseline']} (95% interval {low:+.4f} to {high:+.4f})"
            )
            words[-1] += "" if marked(difference) else ", which does not tell the two apart"
        if found["gap_closed"]:
            words[-1] += f"; that is {share_text(found['gap_closed'])} of the way to {study['oracle']}"
        words[-1] += "."
    return " ".join(words)


def _metrics(protocol: dict[str, Any]) -> str:
    methods = protocol["methods"]
    best = {
        (split, metric): (min if metric == "log_loss" else max)(values)
        for split, metric in SHOWN.values()
        if (
            values := [
                found["test"][split][metric]["mean"] for found in methods.values() if found["test"][split][metric]
            ]
        )
    }
    rows = []
    for place, (name, found) in enumerate(methods.items()):
        cells = []
        for key in SHOWN.values():
            value = found["test"][key[0]][key[1]]
            shown = mean_text(value)
            shown = f"<strong>{shown}</strong>" if value and value["mean"] == best[key] and len(methods) > 1 else shown
            cells.append(shown + (_seed_spread(value)))
        rows.append(_row(line_label(place, name), [*cells, str(len(found["seeds"]))]))
    counts = protocol["rows"]
    note = (
        f"<p class='note'>{counts['all']:,} test rows, {counts['warm']:,} of warm items and {counts['cold']:,} of cold "
        f"ones. Mean over training seeds; in brackets the lowest and the highest seed. Bold: the best of a column.</p>"
    )
    table = _html_table(["Method", *SHOWN, "seeds"], rows)
    return scrolling("Test metrics", table) + note


def _seed_spread(found: dict[str, Any] | None) -> str:
    return spread((found["low"], found["high"])) if found and len(found["seeds"]) > 1 else ""


def _differences(protocol: dict[str, Any], results: dict[str, Any]) -> str:
    compared = {name: found for name, found in protocol["methods"].items() if found["difference"]}
    if not compared:
        return "<p class='empty'>Nothing to compare with the baseline.</p>"
    oracle, baseline = results["study"]["oracle"], results["study"]["baseline"]
    rows, by_seed = [], []
    for name, found in compared.items():
        label = line_label(list(protocol["methods"]).index(name), name)
        parts = [found["difference"][split] for split in SPLITS]
        cells = [_difference_cell(one) for one in parts]
        if oracle:
            closed = found["gap_closed"]
            cells.append(share_text(closed) + spread(pair(closed and closed["share_ci"]), ".0%"))
        rows.append(_row(label, cells))
        for place, one in enumerate(parts[0]["seeds"]):
            cells = [_difference_cell(part and part["seeds"][place]) for part in parts]
            by_seed.append(_row(f"{label} seed {one['seed']}", cells))
    closing = f" Gap closed: the difference on cold items as a share of that of {oracle}." if oracle else ""
    columns = ["Method", *SPLITS]
    return (
        f"<h3>gAUC minus the gAUC of {text(baseline)}</h3>\n"
        + scrolling("Differences", _html_table([*columns, "gap closed, cold"] if oracle else columns, rows))
        + f"<p class='note'>{text(results['rule'] + closing)}</p>\n"
        + "<details><summary>Seed by seed, with intervals over users</summary>"
        + scrolling("Differences seed by seed", _html_table(columns, by_seed))
        + "</details>\n"
    )


def _difference_cell(found: dict[str, Any] | None, metric: str = "gauc") -> str:
    if found is None:
        return "–"
    star = "&nbsp;*" if marked(found, metric) else ""
    return number(found[metric], "+.4f") + star + spread(pair(found[f"{metric}_ci"]), "+.4f")


def _stages(place: int, methods: dict[str, Any], baseline: str) -> str:
    """Warm-up curves of a `staged` protocol: values and paired differences by stage."""
    stages = stage_names(methods)
    if not stages:
        return ""
    drawn = "".join(figure(plot.caption, plot.svg) for plot in stage_plots(methods, place))
    tables = ""
    for metric, shown in STAGE_METRICS.items():
        rows, compared = [], []
        for style, (name, found) in enumerate(methods.items()):
            label = line_label(style, name)
            rows.append(_row(label, [number(mean) + spread(ends) for mean, ends in by_stage(found, metric)]))
            if name != baseline:
                differences = [one["difference"] for one in found["stages"].values()]
                compared.append(_row(label, [_difference_cell(one, metric) for one in differences]))
        columns = ["Method", *stages]
        tables += f"<h3>{shown} by stage</h3>\n" + scrolling(f"{shown} by stage", _html_table(columns, rows))
        if compared:
            tables += f"<h3>{shown} minus the {shown} of {text(baseline)}, by stage</h3>\n"
            tables += scrolling(f"Differences of {shown} by stage", _html_table(columns, compared))
    note = (
        "<p class='note'>All test rows are of new items: \"cold\" before any row of theirs was trained on, then after "
        "each stage of a few rows an item. Whiskers and brackets are intervals over users, averaged over seeds.</p>"
    )
    return f"<h3>Warm-up by stage</h3>\n<div class='pair'>{drawn}</div>\n{tables}{note}\n"


def _row(label: str, cells: Sequence[str]) -> str:
    return f"<tr><th scope='row'>{label}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _html_table(columns: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f"<th scope='col'>{text(name)}</th>" for name in columns)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _plots(place: int, protocol: dict[str, Any]) -> str:
    legend = "".join(f"<li>{line_label(style, name)}</li>" for style, name in enumerate(protocol["methods"]))
    drawn = "".join(figure(plot.caption, plot.svg) for plot in plots(protocol, place))
    note = (
        "<p class='note'>Whiskers go from the lowest to the highest seed. A method whose log loss rises, or whose AUC "
        "falls, from its first epoch on has begun to know the training rows by heart, as IDs do sooner than content. "
        "Test rows are scored with the weights of the best epoch.</p>"
    )
    return f"<ul class='legend'>{legend}</ul>\n<div class='pair'>{drawn}</div>\n{note}"
