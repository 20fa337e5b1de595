"""The HTML page of `mmctr concepts`: each latent dimension with its name, the name's score, and items along it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mmctr.data.catalog import Catalog
from mmctr.data.tables import as_text
from mmctr.files import write_text
from mmctr.reports.gallery import CardMaker
from mmctr.reports.page import ItemCard, render_page
from mmctr.reports.plots import histogram
from mmctr.reports.run import Estimate

SCORE_NAMES = {
    "mig": "MIG",
    "mig_sup": "MIG-sup",
    "sap": "SAP",
    "dci_disentanglement": "DCI disentanglement",
    "dci_completeness": "DCI completeness",
    "dci_informativeness": "DCI informativeness",
    "factor_vae": "FactorVAE score",
}

MakeCards = Callable[[Sequence[Any]], list[ItemCard]]
"""raw item ids -> cards"""


@dataclass(frozen=True)
class DimensionRow:
    """One latent dimension in the overview table."""

    dimension: int
    active: bool
    label: str
    auc: Estimate
    click_effect: float | None


@dataclass(frozen=True)
class TraversalStep:
    """The items of a quantile of a latent dimension."""

    quantile: float
    cards: list[ItemCard]


@dataclass(frozen=True)
class DimensionSection:
    """One active latent dimension with sentences about it and the items along it."""

    dimension: int
    label: str
    sentences: list[str]
    histogram: Markup
    steps: list[TraversalStep]


@dataclass(frozen=True)
class ReasonSection:
    """A latent dimension that changes the clicks predicted for a user."""

    dimension: int
    liked: str
    click_effect: float
    cards: list[ItemCard]
    """Items of the user's history at the end of the dimension that the user likes."""


@dataclass(frozen=True)
class ScoreRow:
    """A disentanglement score beside the score of shuffled items."""

    label: str
    value: float | None
    chance: float | None


def write_page(report: dict[str, Any], catalog: Catalog, path: Path) -> None:
    """Write the page of a report of `mmctr.concepts.report.write_concepts`; the file appears whole or not at all."""
    write_text(path, render_concepts(report, catalog))


def render_concepts(report: dict[str, Any], catalog: Catalog) -> str:
    """The HTML page of a report of `mmctr.concepts.report.write_concepts`; titles and pictures are of the catalog."""
    titles = as_text(catalog.table.column("title")).to_pylist() if "title" in catalog.table.column_names else None
    maker = CardMaker(catalog)

    def make_cards(item_ids: Sequence[Any]) -> list[ItemCard]:
        rows = catalog.rows(item_ids) if titles and item_ids else ()
        item_titles = [titles[int(row)] for row in rows] if titles else [None] * len(item_ids)
        return [maker.card(item_id, title) for item_id, title in zip(item_ids, item_titles, strict=True)]

    active = [entry for entry in report["dimensions"] if entry["active"]]
    user = report.get("user")
    return render_page(
        "concepts.html",
        "mmctr.concepts",
        num_items=report["items"],
        num_dimensions=len(report["dimensions"]),
        num_active=len(active),
        num_named=sum(map(_has_verified_name, active)),
        warning=report.get("warning"),
        num_impressions=report["ranker"]["impressions"] if "ranker" in report else None,
        rows=[_dimension_row(entry) for entry in report["dimensions"]],
        user_id=user and user["user_id"],
        reasons=[_reason_section(reason, make_cards) for reason in user["reasons"]] if user else None,
        sections=[
            _dimension_section(entry, make_cards)
            for entry in sorted(active, key=lambda entry: not _has_verified_name(entry))
        ],
        scores=[
            ScoreRow(label, report["scores"].get(name), report["chance"].get(name))
            for name, label in SCORE_NAMES.items()
        ]
        if report.get("scores")
        else None,
        dependency=report.get("dependency"),
        run_columns=[name for name in report["runs"][0] if name != "run"] if report.get("runs") else [],
        runs=report.get("runs"),
    )


def _has_verified_name(entry: dict[str, Any]) -> bool:
    """Whether a dimension has a name that verification items confirm."""
    return entry["name"] is not None and entry["name"]["verified"]


def _label(entry: dict[str, Any]) -> str:
    """The verified name of a dimension, or words for its absence."""
    return entry["name"]["text"] if _has_verified_name(entry) else "no name that holds"


def _dimension_row(entry: dict[str, Any]) -> DimensionRow:
    """A row of the overview table."""
    name = entry["name"] if entry["active"] else None
    auc = Estimate(None) if name is None else Estimate(name["auc"], tuple(name["interval"]))
    return DimensionRow(entry["dimension"], entry["active"], _label(entry), auc, entry.get("click_effect"))


def _dimension_section(entry: dict[str, Any], make_cards: MakeCards) -> DimensionSection:
    """The section of an active dimension."""
    sentences = []
    name = entry["name"]
    if name is not None:
        low, high = name["interval"]
        verdict = "holds" if name["verified"] else f"does not hold ({name['text']} was the best candidate)"
        source = f"the column {name['column']}" if name["column"] else f"a {name['source']}"
        sentences.append(
            f"The name {verdict}: AUC {name['auc']:.3f} [{low:.3f}, {high:.3f}] on {sum(name['num_items'])} held-out "
            f"items, from {source}."
        )
        share = entry["prevalence"]
        sentences.append(
            f"{share['low']:.0%} of items stand clearly at the left end, {share['high']:.0%} at the right."
        )
    if entry.get("correlates"):
        other = entry["correlates"]
        sentences.append(f"Goes most with dimension {other['dimension']} (r = {other['r']:+.2f}).")
    if "click_effect" in entry:
        sentences.append(f"From left to right the predicted chance of a click changes by {entry['click_effect']:+.3f}.")
    return DimensionSection(
        dimension=entry["dimension"],
        label=_label(entry),
        sentences=sentences,
        histogram=histogram(entry["histogram"]["counts"], entry["histogram"]["from"], entry["histogram"]["to"]),
        steps=[TraversalStep(step["quantile"], make_cards(step["items"])) for step in entry["traversal"]],
    )


def _reason_section(reason: dict[str, Any], make_cards: MakeCards) -> ReasonSection:
    """The section of a dimension that changes the clicks predicted for a user."""
    dimension = reason["dimension"]
    unnamed = f"the {reason['end']} end of dimension {dimension}, which has no name"
    liked = ", ".join(reason["likes"]) if reason["likes"] else unnamed
    return ReasonSection(dimension, liked, reason["click_effect"], make_cards(reason["because_of"]))
