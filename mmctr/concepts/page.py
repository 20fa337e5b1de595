"""The HTML page of `mmctr concepts`: each latent dimension with its name, the name's score, and items along it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mmctr.concepts.report_types import ClickReason, ConceptsReport, Dimension, Variation
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
class StepCards:
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
    steps: list[StepCards]


@dataclass(frozen=True)
class ReasonSection:
    """A latent dimension that changes the clicks predicted for a user."""

    dimension: int
    liked: str
    click_effect: float
    cards: list[ItemCard]
    """Items of the user's history at the end of the dimension that the user likes."""


def write_page(report: ConceptsReport, catalog: Catalog, path: Path) -> None:
    """Write the HTML page of a report; the file appears whole or not at all."""
    write_text(path, render_concepts(report, catalog))


def render_concepts(report: ConceptsReport, catalog: Catalog) -> str:
    """The HTML page of a report; titles and pictures of items are those of the catalog."""
    titles = as_text(catalog.table.column("title")).to_pylist() if "title" in catalog.table.column_names else None
    maker = CardMaker(catalog)

    def make_cards(item_ids: Sequence[Any]) -> list[ItemCard]:
        rows = catalog.rows(item_ids) if titles and item_ids else ()
        item_titles = [titles[int(row)] for row in rows] if titles else [None] * len(item_ids)
        return [maker.card(item_id, title) for item_id, title in zip(item_ids, item_titles, strict=True)]

    description = report.description
    # dimensions with a verified name come first
    ordered = sorted(description.active, key=lambda dimension: dimension.verified_name is None)
    return render_page(
        "concepts.html",
        "mmctr.concepts",
        report=report,
        num_named=sum(dimension.verified_name is not None for dimension in description.active),
        rows=[_dimension_row(dimension) for dimension in description.dimensions],
        reasons=[_reason_section(reason, make_cards) for reason in report.user.reasons] if report.user else [],
        sections=[
            _dimension_section(dimension, dimension.variation, make_cards)
            for dimension in ordered
            if dimension.variation is not None
        ],
        score_names=SCORE_NAMES,
        score_parts=list(report.runs[0].parts) if report.runs else [],
    )


def _label(dimension: Dimension) -> str:
    """The verified name of a dimension, or words for its absence."""
    name = dimension.verified_name
    return "no name that holds" if name is None else name.text


def _dimension_row(dimension: Dimension) -> DimensionRow:
    """A row of the overview table."""
    name, active = dimension.name, dimension.variation is not None
    auc = Estimate(name.auc, name.interval) if name is not None and active else Estimate(None)
    return DimensionRow(dimension.number, active, _label(dimension), auc, dimension.click_effect)


def _dimension_section(dimension: Dimension, variation: Variation, make_cards: MakeCards) -> DimensionSection:
    """The section of an active dimension."""
    sentences = []
    name = dimension.name
    if name is not None:
        low, high = name.interval
        verdict = "holds" if name.verified else f"does not hold ({name.text} was the best candidate)"
        source = f"the column {name.column}" if name.column else f"a {name.source}"
        sentences.append(
            f"The name {verdict}: AUC {name.auc:.3f} [{low:.3f}, {high:.3f}] on {sum(name.num_items)} other "
            f"items, from {source}."
        )
    if variation.prevalence is not None:
        low, high = variation.prevalence["low"], variation.prevalence["high"]
        sentences.append(f"{low:.0%} of items stand clearly at the left end, {high:.0%} at the right.")
    other = variation.most_correlated
    if other is not None:
        sentences.append(f"Goes most with dimension {other.dimension} (r = {other.r:+.2f}).")
    if dimension.click_effect is not None:
        sentences.append(
            f"From left to right the predicted chance of a click changes by {dimension.click_effect:+.3f}."
        )
    return DimensionSection(
        dimension=dimension.number,
        label=_label(dimension),
        sentences=sentences,
        histogram=histogram(variation.histogram.counts, variation.histogram.low, variation.histogram.high),
        steps=[StepCards(step.quantile, make_cards(step.item_ids)) for step in variation.traversal],
    )


def _reason_section(reason: ClickReason, make_cards: MakeCards) -> ReasonSection:
    """The section of a dimension that changes the clicks predicted for a user."""
    unnamed = f"the {reason.end} end of dimension {reason.dimension}, which has no name"
    liked = ", ".join(reason.likes) if reason.likes else unnamed
    return ReasonSection(reason.dimension, liked, reason.click_effect, make_cards(reason.because_of))
