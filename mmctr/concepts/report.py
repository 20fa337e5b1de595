"""The report of `mmctr concepts` on a pretraining run with a head: latent dimensions, names, scores, click effects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from mmctr.concepts.click_effects import add_effects
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
from mmctr.data.catalog import Catalog
from mmctr.files import write_json
from mmctr.runs.content import item_content, open_data
from mmctr.runs.finished import load_encoder
from mmctr.runs.folder import data_config, weights_key

MAX_SCORED = 10_000
"""items that scores are computed on, at most"""


def write_concepts(
    runs: Sequence[str],
    out: Path,
    data: str | None = None,
    columns: Sequence[str] | None = None,
    prompts: Sequence[str] = (),
    ranker: str | None = None,
    user: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Write `concepts.json` and `concepts.html` of the best of several runs; returns the content of the JSON file.

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
    accelerator = Accelerator()
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
    ranking = _score_runs(latents_of_runs, all_attributes, seed)
    best = int(np.argmax([entry["score"] for entry in ranking]))
    task, latents = tasks[best], latents_of_runs[best]
    attributes = [Attribute(a.name, a.codes[latents.rows], a.values) for a in all_attributes]
    texts = catalog.texts(config.text)
    similarity = None
    if prompts and latents.images is not None:
        similarity = prompt_similarity(task, latents.images, prompts, accelerator), list(prompts)
    names = name_dimensions(latents.mu, attributes, [texts[row] for row in latents.rows], similarity, seed)
    report: dict[str, Any] = {"run": str(runs[best]), "data": config.path, "weights": weights_key(Path(runs[best]))}
    report |= describe_latents(latents, catalog, names, attributes, seed)
    report["columns set aside"] = refused
    report["spread"] = {"mean": latents.mu.mean(0).tolist(), "std": latents.mu.std(0).tolist()}
    if len(runs) > 1:
        report["runs"] = [{"run": str(run)} | entry for run, entry in zip(runs, ranking, strict=True)]
    if ranker is not None:
        add_effects(report, Path(ranker), latents, catalog.item_ids, user, accelerator)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "concepts.json", report)
    from mmctr.concepts.page import write_page

    write_page(report, catalog, out / "concepts.html")
    return report


def concepts_text(report: dict[str, Any]) -> str:
    """A report as lines of text: dimensions with names, scores, reasons."""
    varying = f"{report['active']} of {len(report['dimensions'])} dimensions vary over {report['items']} items"
    lines = [f"{report['run']}: {varying}"]
    if report.get("warning"):
        lines.append(f"warning: {report['warning']}")
    for entry in report["dimensions"]:
        if entry["active"]:
            name, label, score = entry["name"], "no candidate", ""
            if name is not None:
                low, high = name["interval"]
                label = name["text"] if name["verified"] else f"no name (not {name['text']})"
                score = f"  AUC {name['auc']:.3f} [{low:.3f}, {high:.3f}]"
            clicks = f"  clicks {entry['click_effect']:+.3f}" if "click_effect" in entry else ""
            lines.append(f"{entry['dimension']:3}  {label}{score}{clicks}")
    for name, value in report.get("scores", {}).items():
        lines.append(f"{name:22} {value:.3f}   by chance {report['chance'][name]:.3f}")
    for reason in report.get("user", {}).get("reasons", []):
        likes = ", ".join(reason["likes"] or [f"dimension {reason['dimension']}, its {reason['end']} end"])
        lines.append(f"because you like: {likes} ({reason['click_effect']:+.3f})")
    return "\n".join(lines)


def _score_runs(latents_of_runs: Sequence[Latents], attributes: Sequence[Attribute], seed: int) -> list[dict[str, Any]]:
    """{"score", and the scores that "score" is computed from} of each run; 0 for a single run."""
    if len(latents_of_runs) == 1:
        return [{"score": 0.0}]
    if attributes:
        result = []
        for latents in latents_of_runs:
            sample = sample_rows(len(latents.mu), MAX_SCORED, seed)
            codes = np.stack([a.codes[latents.rows] for a in attributes], 1)[sample]
            mu = latents.mu[sample]
            parts = {"mig": mig(mu, codes), "dci_disentanglement": dci(mu, codes, seed)["disentanglement"]}
            result.append({"score": float(np.mean(list(parts.values()))), **parts})
        return result
    shared = np.arange(max(int(latents.rows.max()) for latents in latents_of_runs) + 1)
    for latents in latents_of_runs:
        shared = np.intersect1d(shared, latents.rows)
    scores = udr([latents.mu[np.searchsorted(latents.rows, shared)] for latents in latents_of_runs])
    return [{"score": score, "udr": score} for score in scores]


def describe_latents(
    latents: Latents,
    catalog: Catalog,
    names: Sequence[Name | None],
    attributes: Sequence[Attribute],
    seed: int = 0,
) -> dict[str, Any]:
    """Dimensions with names and traversals, scores with scores by chance, and the dependency of attributes, for JSON.

    Args:
        names: of the Z dimensions, as `name_dimensions` returns them.
        attributes: of the n items of the latents.
    """
    mu, ids = latents.mu, catalog.item_ids
    active = active_dimensions(mu)
    z = standardize(mu)
    correlation = z.T @ z / len(z)
    dimensions = []
    for j, name in enumerate(names):
        entry: dict[str, Any] = {
            "dimension": j,
            "active": bool(active[j]),
            "variance": float(mu[:, j].var()),
            "name": name.to_json() if name is not None else None,
        }
        if active[j]:
            counts, edges = np.histogram(mu[:, j], 24)
            others = np.flatnonzero(active & (np.arange(len(active)) != j))
            nearest = others[np.argmax(np.abs(correlation[j, others]))] if len(others) else None
            entry |= {
                "histogram": {"counts": counts.tolist(), "from": float(edges[0]), "to": float(edges[-1])},
                "traversal": [
                    {"quantile": q, "items": [ids[int(latents.rows[r])].as_py() for r in rows]}
                    for q, rows in zip(STEPS, traversal(mu, j, latents.has_image), strict=True)
                ],
                "correlates": None
                if nearest is None
                else {"dimension": int(nearest), "r": float(correlation[j, nearest])},
            }
            if name is not None:
                entry["prevalence"] = prevalence(mu[:, j])
        dimensions.append(entry)
    result: dict[str, Any] = {"items": len(mu), "active": int(active.sum()), "dimensions": dimensions}
    if not active.any():
        result["warning"] = (
            "posterior collapse: no dimension varies over items. Lower beta (or gamma), or raise the capacity"
        )
    if attributes and active.any():
        sample = sample_rows(len(mu), MAX_SCORED, seed)
        codes = np.stack([a.codes for a in attributes], 1)[sample]
        result["scores"] = all_scores(mu[sample], codes, seed)
        result["chance"] = chance_scores(all_scores, mu[sample], codes)
        result["dependency"] = {"columns": [a.name for a in attributes], "matrix": dependency(codes).round(4).tolist()}
    return result
