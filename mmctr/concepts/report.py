"""The report of `mmctr concepts` on a pretraining run with a head: latent dimensions, names, scores, click effects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmctr.concepts.click_effects import with_click_effects
from mmctr.concepts.disentanglement import active_dimensions, all_scores, chance_scores, dci, dependency, mig, udr
from mmctr.concepts.latents import (
    STEPS,
    Latents,
    encode_latents,
    prevalence,
    prompt_similarity,
    sample_rows,
    standardize,
    traversal,
)
from mmctr.concepts.naming import Attribute, Name, name_dimensions, read_attributes
from mmctr.concepts.page import write_page
from mmctr.concepts.report_types import (
    ConceptsReport,
    Correlation,
    Description,
    Dimension,
    Histogram,
    RunScore,
    Scores,
    TraversalStep,
    Variation,
)
from mmctr.data.catalog import Catalog
from mmctr.distributed import start_processes
from mmctr.files import write_json
from mmctr.run_folder import RunFolder
from mmctr.runs.content import item_content, open_data
from mmctr.runs.finished import load_encoder
from mmctr.runs.folder import data_config

MAX_SCORED = 10_000
"""items that scores are computed on, at most"""
NUM_HISTOGRAM_BINS = 24


def write_concepts(
    runs: Sequence[str],
    out: Path,
    data: str | None = None,
    columns: Sequence[str] | None = None,
    prompts: Sequence[str] = (),
    ranker: str | None = None,
    user: str | None = None,
    seed: int = 0,
) -> ConceptsReport:
    """Write `concepts.json` and `concepts.html` of the best of several runs; returns the report.

    The best run has the highest mean of MIG and DCI disentanglement against the catalog's columns; where no column can
    be an attribute, it has the highest UDR.

    Args:
        runs: run folders of pretraining.
        data: dataset folder, default that of the run.
        columns: catalog columns to name dimensions by, default all that can be used.
        prompts: texts to name dimensions by, where the encoder compares texts with pictures.
        ranker: run folder of a ranker on the latents, to add effects on predicted clicks.
        user: raw id of a user, to add the reasons of the ranker's predictions for that user.
        seed: chooses naming half and samples of items.

    Raises:
        ValueError: a run without a head, runs on different catalogs, or a column that cannot be an attribute.
    """
    accelerator = start_processes()
    config = data_config(Path(runs[0]), data)
    dataset = open_data(config, accelerator)
    catalog = dataset.catalog
    all_attributes, refused = read_attributes(catalog.table, columns)
    tasks, latents_of_runs = [], []
    for run in runs:
        task = load_encoder(Path(run)).to(accelerator.device)
        run_config = data_config(Path(run), data)
        if run_config.path != config.path:
            raise ValueError(
                f"{run}: trained on {run_config.path}, and {runs[0]} on {config.path}; give one --data to both"
            )
        content = item_content(dataset, run_config, task, accelerator)
        latents_of_runs.append(encode_latents(task, catalog, content, accelerator))
        tasks.append(task)
    run_scores = _score_runs(runs, latents_of_runs, all_attributes, seed)
    best = int(np.argmax([one.score for one in run_scores]))
    task, latents = tasks[best], latents_of_runs[best]
    attributes = [Attribute(a.name, a.codes[latents.rows], a.values) for a in all_attributes]
    texts = catalog.texts(config.text)
    similarity = None
    if prompts and latents.images is not None:
        similarity = prompt_similarity(task, latents.images, prompts, accelerator), list(prompts)
    names = name_dimensions(latents.mu, attributes, [texts[row] for row in latents.rows], similarity, seed)
    report = ConceptsReport(
        run=str(runs[best]),
        data=data or RunFolder(Path(runs[best])).read_config()["data"]["path"],  # as given: no path of this machine
        weights=RunFolder(Path(runs[best])).weights_fingerprint(),
        description=describe_latents(latents, catalog, names, attributes, seed),
        refused_columns=refused,
        mean=latents.mu.mean(0).tolist(),
        std=latents.mu.std(0).tolist(),
        runs=run_scores if len(runs) > 1 else [],
    )
    if ranker is not None:
        report = with_click_effects(report, Path(ranker), latents, catalog.item_ids, user, accelerator)
    out.mkdir(parents=True, exist_ok=True)
    write_json(RunFolder(out).concepts, report.to_json())
    write_page(report, catalog, out / "concepts.html")
    return report


def concepts_text(report: ConceptsReport) -> str:
    """A report as lines of text: dimensions with names, scores, reasons."""
    description = report.description
    num_active, num_dimensions = len(description.active), len(description.dimensions)
    lines = [f"{report.run}: {num_active} of {num_dimensions} dimensions vary over {description.num_items} items"]
    if description.warning:
        lines.append(f"warning: {description.warning}")
    for dimension in description.active:
        name, label, score = dimension.name, "no candidate", ""
        if name is not None:
            low, high = name.interval
            label = name.text if name.verified else f"no name (not {name.text})"
            score = f"  AUC {name.auc:.3f} [{low:.3f}, {high:.3f}]"
        clicks = "" if dimension.click_effect is None else f"  clicks {dimension.click_effect:+.3f}"
        lines.append(f"{dimension.number:3}  {label}{score}{clicks}")
    if description.scores is not None:
        chance = description.scores.chance
        for name, value in description.scores.scores.items():
            lines.append(f"{name:22} {value:.3f}   by chance {chance[name]:.3f}")
    for reason in report.user.reasons if report.user else []:
        likes = ", ".join(reason.likes or [f"dimension {reason.dimension}, its {reason.end} end"])
        lines.append(f"because you like: {likes} ({reason.click_effect:+.3f})")
    return "\n".join(lines)


def _score_runs(
    runs: Sequence[str], latents_of_runs: Sequence[Latents], attributes: Sequence[Attribute], seed: int
) -> list[RunScore]:
    """The score of each run; 0 for a single run."""
    if len(runs) == 1:
        return [RunScore(str(runs[0]), 0.0, {})]
    if attributes:
        result = []
        for run, latents in zip(runs, latents_of_runs, strict=True):
            sample = sample_rows(len(latents.mu), MAX_SCORED, seed)
            codes = np.stack([a.codes[latents.rows] for a in attributes], 1)[sample]
            mu = latents.mu[sample]
            parts = {"mig": mig(mu, codes), "dci_disentanglement": dci(mu, codes, seed)["disentanglement"]}
            result.append(RunScore(str(run), float(np.mean(list(parts.values()))), parts))
        return result
    shared = np.arange(max(int(latents.rows.max()) for latents in latents_of_runs) + 1)
    for latents in latents_of_runs:
        shared = np.intersect1d(shared, latents.rows)
    scores = udr([latents.mu[np.searchsorted(latents.rows, shared)] for latents in latents_of_runs])
    return [RunScore(str(run), score, {"udr": score}) for run, score in zip(runs, scores, strict=True)]


def describe_latents(
    latents: Latents,
    catalog: Catalog,
    names: Sequence[Name | None],
    attributes: Sequence[Attribute],
    seed: int = 0,
) -> Description:
    """Dimensions with names and traversals, scores with scores by chance, and the dependency of attributes.

    Args:
        names: of the Z dimensions, as `name_dimensions` returns them.
        attributes: of the n items of the latents.
    """
    mu = latents.mu
    active = active_dimensions(mu)
    z = standardize(mu)
    correlation = z.T @ z / len(z)
    dimensions = []
    for j, name in enumerate(names):
        variation = None
        if active[j]:
            others = np.flatnonzero(active & (np.arange(len(active)) != j))
            nearest = int(others[np.argmax(np.abs(correlation[j, others]))]) if len(others) else None
            variation = Variation(
                histogram=_histogram(mu[:, j]),
                traversal=_traversal_steps(latents, catalog, j),
                most_correlated=None if nearest is None else Correlation(nearest, float(correlation[j, nearest])),
                prevalence=None if name is None else prevalence(mu[:, j]),
            )
        dimensions.append(Dimension(j, float(mu[:, j].var()), name, variation))
    scores = None
    if attributes and active.any():
        sample = sample_rows(len(mu), MAX_SCORED, seed)
        codes = np.stack([a.codes for a in attributes], 1)[sample]
        scores = Scores(
            scores=all_scores(mu[sample], codes, seed),
            chance=chance_scores(all_scores, mu[sample], codes),
            columns=[a.name for a in attributes],
            dependency=dependency(codes).round(4).tolist(),
        )
    return Description(len(mu), dimensions, scores)


def _histogram(values: np.ndarray) -> Histogram:
    """The histogram of (n,) values in `NUM_HISTOGRAM_BINS` bins."""
    counts, edges = np.histogram(values, NUM_HISTOGRAM_BINS)
    return Histogram(counts.tolist(), float(edges[0]), float(edges[-1]))


def _traversal_steps(latents: Latents, catalog: Catalog, dimension: int) -> list[TraversalStep]:
    """The items along a dimension by raw id."""
    steps = traversal(latents.mu, dimension, latents.has_image)
    return [
        TraversalStep(quantile, [catalog.item_ids[int(latents.rows[row])].as_py() for row in rows])
        for quantile, rows in zip(STEPS, steps, strict=True)
    ]
