"""What `mmctr concepts` says of a run with a head: dimensions, their names and scores, what they do to clicks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator

from mmctr.concepts.disentanglement import active_dimensions, all_scores, dci, dependency, mig, shuffled, udr
from mmctr.concepts.naming import Attribute, Name, attributes_of, name_dimensions
from mmctr.data.batches import ItemBatch
from mmctr.data.catalog import Catalog
from mmctr.data.loaders import BehaviorCollator
from mmctr.data.tables import rows_of
from mmctr.evaluation.predict import embed_rows
from mmctr.files import write_json
from mmctr.runs.finished import data_config, load_encoder, ranked_impressions, weights_key
from mmctr.runs.launch import item_content, open_data
from mmctr.tasks import PretrainTask, RankingTask

MAX_SCORED = 10_000
"""items that scores are computed on"""
MAX_IMPRESSIONS = 10_000
"""impressions that the effect on clicks is averaged over"""
STEPS = (0.02, 0.25, 0.5, 0.75, 0.98)
"""quantiles of a dimension that its traversal stops at"""
PER_STEP = 2
"""items shown at each"""


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
    report: dict[str, Any] = {"run": str(runs[best]), "data": config.path, "weights": weights_key(Path(runs[best]))}
    report |= describe(latents, catalog, names, own_attributes, seed)
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


def _sample(count: int, limit: int, seed: int) -> np.ndarray:
    """`limit` of so many rows, or all of them, in order."""
    return np.sort(np.random.default_rng(seed).permutation(count)[:limit])


def _standardised(mu: np.ndarray) -> np.ndarray:
    return (mu - mu.mean(0)) / mu.std(0).clip(min=1e-12)


def _ranked(found: Sequence[Latents], attributes: Sequence[Attribute], seed: int) -> list[dict[str, Any]]:
    """`score` of each run, and what it is."""
    if len(found) == 1:
        return [{"score": 0.0}]
    if attributes:
        result = []
        for latents in found:
            picked = _sample(len(latents.mu), MAX_SCORED, seed)
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


@dataclass(frozen=True)
class Latents:
    """The latents of a catalog's items that have content."""

    rows: np.ndarray
    """(n,) catalog rows"""
    mu: np.ndarray
    """(n, Z)"""
    has_image: np.ndarray
    """(n,) bool"""
    images: np.ndarray | None
    """(n, D) picture features, zeros where there is none; None where texts cannot be compared with them"""


def latents_of(task: PretrainTask, catalog: Catalog, content: Any, accelerator: Accelerator) -> Latents:
    """Raises ValueError for a task without a head."""
    if task.head is None:
        raise ValueError(
            "this run has no head, so its dimensions have no meaning of their own: train one with task.head"
        )
    mu, has = embed_rows(task, content, np.arange(len(catalog)), accelerator)
    rows = np.flatnonzero(has)
    if len(rows) < 50:
        raise ValueError(f"{len(rows)} items have content; names need 50 or more")
    has_image = np.zeros(len(rows), bool) if content.has_image is None else np.asarray(content.has_image)[rows]
    images = None
    if has_image.any() and task.shares_space:
        images = embed_rows(task, content, rows, accelerator, "image")[0]
    return Latents(rows, mu[rows].astype(np.float64), has_image, images)


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
    z = _standardised(mu)
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
        picked = _sample(len(mu), MAX_SCORED, seed)
        codes = np.stack([a.codes for a in attributes], 1)[picked]
        result["scores"] = all_scores(mu[picked], codes, seed)
        result["chance"] = shuffled(all_scores, mu[picked], codes)
        result["dependency"] = {"columns": [a.name for a in attributes], "matrix": dependency(codes).round(4).tolist()}
    return result


def prevalence(latent: np.ndarray) -> dict[str, float]:
    """The shares of items more than a standard deviation below and above the mean."""
    z = (latent - latent.mean()) / latent.std()
    return {"low": float((z < -1).mean()), "high": float((z > 1).mean())}


def traversal(mu: np.ndarray, dimension: int, has_image: np.ndarray) -> list[np.ndarray]:
    """At each of `STEPS`, the rows of items that are there on one dimension and near the middle on the others; those
    with a picture first, where there are any."""
    z = _standardised(mu)
    others = np.delete(z, dimension, 1)
    off = (others**2).mean(1) if others.shape[1] else np.zeros(len(z))
    result, taken = [], ~has_image if has_image.sum() >= 20 * PER_STEP else np.zeros(len(z), bool)
    for q in STEPS:
        distance = (z[:, dimension] - np.quantile(z[:, dimension], q)) ** 2 * 4 + off
        rows = np.argsort(np.where(taken, np.inf, distance))[:PER_STEP]
        taken[rows] = True
        result.append(rows)
    return result


@torch.inference_mode()
def prompt_likeness(
    task: PretrainTask, images: np.ndarray, prompts: Sequence[str], accelerator: Accelerator
) -> np.ndarray:
    """(n, P) cosines of picture features and prompts."""
    there = torch.ones(len(prompts), dtype=torch.bool)
    tokens = task.encoder.tokenize(list(prompts)).long()
    items = ItemBatch(row=torch.zeros(len(prompts), dtype=torch.int64), input_ids=tokens, has_text=there)
    return images @ task.text_features(items.to(accelerator.device)).cpu().numpy().T


@torch.inference_mode()
def click_effects(
    ranker: RankingTask,
    collator: BehaviorCollator,
    sizes: np.ndarray,
    offset: int,
    accelerator: Accelerator,
) -> np.ndarray:
    """(Z,) how the predicted chance of a click changes, on average over impressions, when a target moves on a dimension
    from a standard deviation below to one above, its history staying as it is.

    Args:
        sizes: (Z,) standard deviations of the latents; 0 leaves one out.
        offset: where they begin in the ranker's content vectors.
    """
    ranker.eval()
    width, count = ranker.embedder.content_table.shape[1], len(collator.impressions)
    total = np.zeros(len(sizes))
    for start in range(0, count, 2048):
        batch = collator(np.arange(start, min(start + 2048, count))).to(accelerator.device)
        for j in np.flatnonzero(sizes > 0):
            shift = torch.zeros(width, device=accelerator.device)
            shift[offset + j] = float(sizes[j])
            up, down = (torch.sigmoid(ranker.logits(batch, sign * shift)[0].double()) for sign in (1, -1))
            total[j] += float((up - down).sum())
    return total / max(count, 1)


def add_effects(
    report: dict[str, Any],
    run: Path,
    latents: Latents,
    item_ids: pa.Array,
    user: str | None,
    accelerator: Accelerator,
) -> None:
    """Put into a report what each dimension does to the clicks a ranker predicts, overall and for one user.

    Raises:
        ValueError: the ranker does not read these latents, or does not know the user.
    """
    ranker = RankingTask.load(run)
    offset = _where(ranker, latents, item_ids, run)
    dataset, part, collate = ranked_impressions(run, ranker)
    ranker.to(accelerator.device)
    picked = _sample(len(part), MAX_IMPRESSIONS, 0)
    sizes = np.where(active_dimensions(latents.mu), latents.mu.std(0), 0.0)
    effects = click_effects(ranker, collate(part.take(picked)), sizes, offset, accelerator)
    for entry, effect in zip(report["dimensions"], effects, strict=True):
        entry["click_effect"] = float(effect)
    report["ranker"] = {"run": str(run), "impressions": len(picked)}
    if user is None:
        return
    row = dataset.user_row(user)
    rows = np.flatnonzero(np.asarray(part.user) == row)
    if not len(rows):
        raise ValueError(f"user {user!r} has no test impressions in {dataset.report['source']}; name another --user")
    own = part.take(rows)
    effects = click_effects(ranker, collate(own), sizes, offset, accelerator)
    latest = own.history[own.history_start[-1] : own.history_end[-1]]
    history = [dataset.catalog.item_ids[int(item)].as_py() for item in latest]
    report["user"] = {
        "user_id": dataset.users["user_id"][row].as_py(),
        "reasons": reasons(report, effects, latents, item_ids, history),
    }


def reasons(
    report: dict[str, Any],
    effects: np.ndarray,
    latents: Latents,
    item_ids: pa.Array,
    history: list[Any],
    count: int = 3,
) -> list[dict[str, Any]]:
    """What moves a user most: the end of a dimension, what it is called, and what of the history stands there."""
    place = {item_ids[int(row)].as_py(): position for position, row in enumerate(latents.rows)}
    seen = [item for item in history if item in place]
    z = _standardised(latents.mu)
    found = []
    for j in np.argsort(-np.abs(effects))[:count].tolist():
        if effects[j] == 0:
            break
        sign, name = (1 if effects[j] > 0 else -1), report["dimensions"][j]["name"]
        likes = None if name is None or not name["verified"] else name["high" if sign > 0 else "low"]
        ordered = sorted(seen, key=lambda item: -sign * z[place[item], j])
        because = [item for item in ordered if sign * z[place[item], j] > 0.5][:PER_STEP]
        end = "high" if sign > 0 else "low"
        found.append(
            {"dimension": j, "end": end, "likes": likes, "click_effect": float(effects[j]), "because_of": because}
        )
    return found


def _where(ranker: RankingTask, latents: Latents, item_ids: pa.Array, run: Path) -> int:
    """The first of the columns of the ranker's content vectors that are these latents."""
    width = latents.mu.shape[1]
    if ranker.embedder.adapter is not None and ranker.catalog_ids is not None:
        rows = rows_of(item_ids.take(pa.array(latents.rows)), ranker.catalog_ids, "the run's catalog and the ranker's")
        there = rows >= 0
        table = ranker.embedder.content_table[torch.from_numpy(rows[there])].numpy()
        for offset in range(table.shape[1] - width + 1) if there.any() else ():
            if np.allclose(table[:, offset : offset + width], latents.mu[there], atol=1e-3):
                return offset
    raise ValueError(
        f"{run}: this ranker does not read the latents of the run; embed it (`mmctr embed RUN --out EMB`), and train a "
        f"ranker with task.embedder.content.path=EMB"
    )
