"""The HTML page of `mmctr concepts`: each dimension with its name, how sure that is, and the items along it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmctr.data.catalog import Catalog
from mmctr.data.tables import as_text
from mmctr.files import replace_file
from mmctr.reports.gallery import Cards
from mmctr.reports.page import card, document, number, scrolling, text

SCORES = {
    "mig": "MIG",
    "mig_sup": "MIG-sup",
    "sap": "SAP",
    "dci_disentanglement": "DCI disentanglement",
    "dci_completeness": "DCI completeness",
    "dci_informativeness": "DCI informativeness",
    "factor_vae": "FactorVAE score",
}


def write_page(report: dict[str, Any], catalog: Catalog, path: Path) -> None:
    """Write the page of what `mmctr.concepts.report.concepts` found."""
    replace_file(path, lambda temporary: temporary.write_text(render(report, catalog), encoding="utf-8"))


def render(report: dict[str, Any], catalog: Catalog) -> str:
    titles = as_text(catalog.table.column("title")).to_pylist() if "title" in catalog.table.column_names else None
    cards = Cards(catalog)

    def picture(item_id: Any) -> str:
        title = titles[int(catalog.rows([item_id])[0])] if titles else None
        return card(cards(item_id, title))

    active = [entry for entry in report["dimensions"] if entry["active"]]
    named = [entry for entry in active if entry["name"] is not None and entry["name"]["verified"]]
    lead = (
        f"{report['items']} items, {len(report['dimensions'])} dimensions: {len(active)} vary over items, "
        f"{len(named)} have a name that held-out items confirm."
    )
    sections = [f"<h1>Concepts</h1>\n<p class='lead'>{text(lead)}</p>"]
    if report.get("warning"):
        sections[0] += f"\n<p class='lead'><strong>{text(report['warning'])}.</strong></p>"
    sections.append("<h2>Dimensions</h2>\n" + _overview(report))
    if report.get("user"):
        sections.append(_reasons(report["user"], picture))
    sections += [_dimension(entry, report, picture) for entry in sorted(active, key=lambda e: not _is_named(e))]
    if report.get("scores"):
        sections.append("<h2>Scores</h2>\n" + _scores(report))
    if report.get("runs"):
        sections.append("<h2>Runs</h2>\n" + _runs(report))
    return document("Concepts", sections)


def _is_named(entry: dict[str, Any]) -> bool:
    return entry["name"] is not None and entry["name"]["verified"]


def _label(entry: dict[str, Any]) -> str:
    return entry["name"]["text"] if _is_named(entry) else "no name that holds"


def _table(head: list[str], rows: list[list[str]], label: str) -> str:
    """Cells are HTML; the first of a row is its heading."""
    kind = [" class='words'" if name == "Name" else "" for name in head]
    columns = "".join(f"<th scope='col'{k}>{name}</th>" for name, k in zip(head, kind, strict=True))
    body = "".join(
        f"<tr><th scope='row'>{row[0]}</th>"
        f"{''.join(f'<td{k}>{cell}</td>' for cell, k in zip(row[1:], kind[1:], strict=True))}</tr>"
        for row in rows
    )
    return scrolling(label, f"<table><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table>")


def _overview(report: dict[str, Any]) -> str:
    with_clicks = "ranker" in report
    head = ["Dimension", "Name", "AUC on held-out items", *(["Clicks"] if with_clicks else [])]
    rows = []
    for entry in report["dimensions"]:
        name = entry["name"]
        score = "–"
        if name is not None:
            low, high = name["interval"]
            score = f"{number(name['auc'], '.3f')}<small>[{number(low, '.3f')}, {number(high, '.3f')}]</small>"
        label = text(_label(entry)) if entry["active"] else "<span class='empty'>does not vary</span>"
        row = [str(entry["dimension"]), label, score if entry["active"] else "–"]
        rows.append(row + ([number(entry.get("click_effect"), "+.3f")] if with_clicks else []))
    note = (
        "<p class='note'>AUC: the chance that an item of the right end stands higher than one of the left end, with a "
        "95 % interval, on items that took no part in finding the name."
    )
    if with_clicks:
        note += (
            " Clicks: what moving a target from a standard deviation below to one above adds to the predicted chance "
            f"of a click, on average over {report['ranker']['impressions']} test impressions."
        )
    return _table(head, rows, "Dimensions") + note + "</p>\n"


def _dimension(entry: dict[str, Any], report: dict[str, Any], picture: Any) -> str:
    facts = []
    name = entry["name"]
    if name is not None:
        low, high = name["interval"]
        said = "holds" if name["verified"] else f"does not hold ({name['text']} was the best candidate)"
        facts.append(
            f"The name {said}: AUC {name['auc']:.3f} [{low:.3f}, {high:.3f}] on {sum(name['num_items'])} held-out "
            f"items, from {'the column ' + name['column'] if name['column'] else 'a ' + name['source']}."
        )
        share = entry["prevalence"]
        facts.append(f"{share['low']:.0%} of items stand clearly at the left end, {share['high']:.0%} at the right.")
    if entry.get("correlates"):
        other = entry["correlates"]
        facts.append(f"Goes most with dimension {other['dimension']} (r = {other['r']:+.2f}).")
    if "click_effect" in entry:
        facts.append(f"From left to right the predicted chance of a click changes by {entry['click_effect']:+.3f}.")
    steps = "".join(
        f"<div><h3>{step['quantile']:.0%}</h3><div class='cards'>{''.join(map(picture, step['items']))}</div></div>"
        for step in entry["traversal"]
    )
    shown = scrolling(f"Items along dimension {entry['dimension']}", f"<div class='walk'>{steps}</div>")
    heading = f"<h2>{entry['dimension']}: {text(_label(entry))}</h2>"
    return f"{heading}\n<p class='note'>{text(' '.join(facts))}</p>\n{_histogram(entry['histogram'])}{shown}"


def _histogram(histogram: dict[str, Any]) -> str:
    counts = histogram["counts"]
    top = max(counts)
    width = 300 / len(counts)
    bars = "".join(
        f"<rect x='{place * width:.1f}' y='{40 - 40 * count / top:.1f}' width='{width - 1:.1f}' "
        f"height='{40 * count / top:.1f}' fill='var(--p0)'/>"
        for place, count in enumerate(counts)
    )
    label = f"Items by value, from {histogram['from']:.2f} to {histogram['to']:.2f}"
    return f"<svg viewBox='0 0 300 40' width='300' height='40' role='img' aria-label='{label}'>{bars}</svg>\n"


def _reasons(user: dict[str, Any], picture: Any) -> str:
    parts = [f"<h2>Why user {text(user['user_id'])} is shown what is shown</h2>"]
    for reason in user["reasons"]:
        likes = ", ".join(reason["likes"]) if reason["likes"] else f"the {reason['end']} end of dimension"
        what = likes if reason["likes"] else f"{likes} {reason['dimension']}, which has no name"
        parts.append(
            f"<h3>Because you like: {text(what)}</h3>\n<p class='note'>Dimension {reason['dimension']}: from one end "
            f"to the other the predicted chance of a click changes by {reason['click_effect']:+.3f}.</p>"
        )
        if reason["because_of"]:
            cards = "".join(map(picture, reason["because_of"]))
            parts.append(scrolling("Items of the history", f"<div class='cards'>{cards}</div>"))
    if len(parts) == 1:
        parts.append("<p>No dimension changes what this user is predicted to click.</p>")
    return "\n".join(parts)


def _scores(report: dict[str, Any]) -> str:
    rows = [
        [label, number(report["scores"].get(name), ".3f"), number(report["chance"].get(name), ".3f")]
        for name, label in SCORES.items()
    ]
    found = _table(["Score", "Here", "Chance"], rows, "Scores")
    columns = report["dependency"]["columns"]
    matrix = [
        [text(columns[i]), *(number(value, ".2f") for value in row)]
        for i, row in enumerate(report["dependency"]["matrix"])
    ]
    depends = _table(["Column", *map(text, columns)], matrix, "Dependency of columns")
    note = (
        "<p class='note'>Against the columns of the catalog, 1 is best. Chance: the same with items dealt out anew. "
        "Where columns depend on each other, as below (1: one gives the other away), no score can reach 1.</p>"
    )
    return found + note + depends


def _runs(report: dict[str, Any]) -> str:
    names = [name for name in report["runs"][0] if name != "run"]
    rows = [[text(entry["run"]), *(number(entry[name], ".3f") for name in names)] for entry in report["runs"]]
    return _table(["Run", *map(text, names)], rows, "Runs") + "<p class='note'>This page is of the best one.</p>"
