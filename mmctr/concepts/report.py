"""What `mmctr concepts` says of a run with a head: dimensions, their names and scores, what they do to clicks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from mmctr.concepts.click_effects import add_effects
from mmctr.concepts.disentanglement import active_dimensions, all_scores, dci, dependency, mig, shuffled, udr
from mmctr.concepts.latents import (
    STEPS,
    Latents,
    latents_of,
    prevalence,
    prompt_likeness,
    sampled_rows,
    standardised,
    traversal,
)
from mmctr.concepts.naming import Attribute, Name, attributes_of, name_dimensions
from mmctr.data.catalog import Catalog
from mmctr.files import write_json
from mmctr.run_folder import RunFolder
from mmctr.runs.content import item_content, open_data
from mmctr.runs.finished import load_encoder
from mmctr.runs.folder import data_config

MAX_SCORED = 10_000
"""items that scores are computed on"""


def concepts(
    runs: Sequence[str],
    out: Path,
    data: str | None = None,
    columns: Sequence[str] | None = None,
    prompts: Sequence[str] = (),
    ranker: str | None = None,
    user: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Describe the best of some runs in `out/concepts.json` and `out/concepts.html`; returns what the JSON holds.

    The best is the one whose latents go best with the catalog's columns (the mean of MIG and DCI disentanglement), or,
    where no column can be used, the one that agrees most with the others (UDR).

    Raises ValueError for runs without a head, of different catalogs, or columns that cannot name anything.
    """
    accelerator = Accelerator()
    config = data_config(Path(runs[0]), data)
    dataset = open_data(config, accelerator)
    catalog = dataset.catalog
    attributes, refused = attributes_of(catalog.table, columns)
    tasks, found = [], []
    for run in runs:
        task = load_encoder(Path(run)).to(accelerator.device)
        own = data_config(Path(run), data)
        if own.path != config.path:
            raise ValueError(f"{run}: trained on {own.path}, and {runs[0]} on {config.path}; give one --data to both")
        found.append(latents_of(task, catalog, item_content(dataset, own, task, accelerator), accelerator))
        tasks.append(task)
    ranking = _ranked(found, attributes, seed)
    best = int(np.argmax([entry["score"] for entry in ranking]))
    task, latents = tasks[best], found[best]
    own_attributes = [Attribute(a.name, a.codes[latents.rows], a.values) for a in attributes]
    texts = catalog.texts(config.text)
    alike = None
    if prompts and latents.images is not None:
        alike = prompt_likeness(task, latents.images, prompts, accelerator), list(prompts)
    names = name_dimensions(latents.mu, own_attributes, [texts[row] for row in latents.rows], alike, seed)
    report: dict[str, Any] = {
        "run": str(runs[best]),
        "data": config.path,
        "weights": RunFolder(Path(runs[best])).weights_fingerprint(),
    }
    report |= describe(latents, catalog, names, own_attributes, seed)
    report["columns set aside"] = refused
    report["spread"] = {"mean": latents.mu.mean(0).tolist(), "std": latents.mu.std(0).tolist()}
    if len(runs) > 1:
        report["runs"] = [{"run": str(run)} | entry for run, entry in zip(runs, ranking, strict=True)]
    if ranker is not None:
        add_effects(report, Path(ranker), latents, catalog.item_ids, user, accelerator)
    out.mkdir(parents=True, exist_ok=True)
    write_json(RunFolder(out).concepts, report)
    from mmctr.concepts.page import write_page

    write_page(report, catalog, out / "concepts.html")
    return report


def summary(report: dict[str, Any]) -> str:
    """The dimensions as lines of text."""
    varying = f"{report['active']} of {len(report['dimensions'])} dimensions vary over {report['items']} items"
    lines = [f"{report['run']}: {varying}"]
    if report.get("warning"):
        lines.append(f"warning: {report['warning']}")
    for entry in report["dimensions"]:
        if entry["active"]:
            name, said, score = entry["name"], "no candidate", ""
            if name is not None:
                low, high = name["interval"]
                said = name["text"] if name["verified"] else f"no name (not {name['text']})"
                score = f"  AUC {name['auc']:.3f} [{low:.3f}, {high:.3f}]"
            clicks = f"  clicks {entry['click_effect']:+.3f}" if "click_effect" in entry else ""
            lines.append(f"{entry['dimension']:3}  {said}{score}{clicks}")
    for name, value in report.get("scores", {}).items():
        lines.append(f"{name:22} {value:.3f}   by chance {report['chance'][name]:.3f}")
    for reason in report.get("user", {}).get("reasons", []):
        likes = ", ".join(reason["likes"] or [f"dimension {reason['dimension']}, its {reason['end']} end"])
        lines.append(f"because you like: {likes} ({reason['click_effect']:+.3f})")
    return "\n".join(lines)


def _ranked(found: Sequence[Latents], attributes: Sequence[Attribute], seed: int) -> list[dict[str, Any]]:
    """`score` of each run, and what it is."""
    if len(found) == 1:
        return [{"score": 0.0}]
    if attributes:
        result = []
        for latents in found:
            picked = sampled_rows(len(latents.mu), MAX_SCORED, seed)
            codes = np.stack([a.codes[latents.rows] for a in attributes], 1)[picked]
            mu = latents.mu[picked]
            parts = {"mig": mig(mu, codes), "dci_disentanglement": dci(mu, codes, seed)["disentanglement"]}
            result.append({"score": float(np.mean(list(parts.values()))), **parts})
        return result
    shared = np.arange(max(int(latents.rows.max()) for latents in found) + 1)
    for latents in found:
        shared = np.intersect1d(shared, latents.rows)
    scores = udr([latents.mu[np.searchsorted(latents.rows, shared)] for latents in found])
    return [{"score": score, "udr": score} for score in scores]


def describe(
    latents: Latents,
    catalog: Catalog,
    names: Sequence[Name | None],
    attributes: Sequence[Attribute],
    seed: int = 0,
) -> dict[str, Any]:
    """Dimensions, scores beside those of chance, and how the attributes hang together; ready for JSON."""
    mu, ids = latents.mu, catalog.item_ids
    active = active_dimensions(mu)
    z = standardised(mu)
    correlation = z.T @ z / len(z)
    dimensions = []
    for j, name in enumerate(names):
        entry: dict[str, Any] = {
            "dimension": j,
            "active": bool(active[j]),
            "variance": float(mu[:, j].var()),
            "name": name.as_dict() if name is not None else None,
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
        picked = sampled_rows(len(mu), MAX_SCORED, seed)
        codes = np.stack([a.codes for a in attributes], 1)[picked]
        result["scores"] = all_scores(mu[picked], codes, seed)
        result["chance"] = shuffled(all_scores, mu[picked], codes)
        result["dependency"] = {"columns": [a.name for a in attributes], "matrix": dependency(codes).round(4).tolist()}
    return result
