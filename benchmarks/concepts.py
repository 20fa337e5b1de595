"""Heads beside PCA, ICA and an autoencoder on the same features: scores against a catalog's columns, and names.

    python benchmarks/concepts.py CONFIG DATASET --columns factor_shape factor_colour ... [--init-from RUN]
        [--seeds 0 1 2] [--heads beta_tcvae dip_vae] [--set task.head.dim=8 ...]

CONFIG is a pretraining config with a head behind frozen towers. Each head is trained by the recipe. A column counts
as named when a dimension that tells more of it than of any other column has a name, verified on held-out items, whose
words do too. Names come from titles alone, never from the columns. Prints a line of JSON for each method and seed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from sklearn.decomposition import PCA, FastICA

from mmctr.concepts.disentanglement import (
    active_dimensions,
    all_scores,
    chance_scores,
    entropy,
    equal_width_bins,
    mutual_information,
)
from mmctr.concepts.latents import encode_latents
from mmctr.concepts.naming import frequent_words, name_dimensions, read_attributes
from mmctr.evaluation.predict import embed_rows
from mmctr.runs.config import PretrainConfig
from mmctr.runs.content import item_content, open_data
from mmctr.runs.finished import load_encoder
from mmctr.runs.folder import data_config

HERE = Path(__file__).resolve().parent
HEADS = {
    "autoencoder": ["task.head={name: beta_vae, beta: 0}"],
    "beta_vae": ["task.head={name: beta_vae}"],
    "annealed_vae": ["task.head={name: annealed_vae}"],
    "beta_tcvae": ["task.head={name: beta_tcvae}"],
    "factor_vae": ["task.head={name: factor_vae}"],
    "dip_vae": ["task.head={name: dip_vae}"],
}


def train(config: str, dataset: str, run: Path, seed: int, more: list[str]) -> None:
    command = [sys.executable, "-m", "pretrain.train", config, f"data.path={dataset}", f"run_dir={run}", f"seed={seed}"]
    done = subprocess.run([*command, *more], cwd=HERE.parent, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")


def judged(mu: np.ndarray, codes: np.ndarray, columns: list[str], texts: list[str], seed: int) -> dict[str, Any]:
    """Scores, and the columns that a dimension is rightly named after."""
    entropies = [entropy(codes[:, k]) for k in range(codes.shape[1])]

    def column_of(values: np.ndarray) -> int:
        return int(np.argmax([mutual_information(values, codes[:, k]) / h for k, h in enumerate(entropies)]))

    has, words = frequent_words(texts)
    place = {word: number for number, word in enumerate(words)}
    binned, named = equal_width_bins(mu), []
    for j, name in enumerate(name_dimensions(mu, texts=texts, seed=seed)):
        if name is None or not name.verified:
            continue
        of_words = [column_of(has[:, place[word]].astype(np.int64)) for word in (*name.low, *name.high)]
        own = column_of(binned[:, j])
        if of_words.count(own) > len(of_words) / 2:
            named.append(columns[own])
    return {
        "active": int(active_dimensions(mu).sum()),
        **{name: round(value, 4) for name, value in all_scores(mu, codes, seed).items()},
        "named": sorted(set(named)),
        "share_named": len(set(named)) / len(columns),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("dataset")
    parser.add_argument("--columns", nargs="+", required=True)
    parser.add_argument("--init-from", help="run folder whose encoder the heads stand on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--set", nargs="+", default=[], help="further key=value for every head")
    options = parser.parse_args()
    # another kind of head would otherwise have its own default size, and sizes decide the scores
    size = f"task.head.dim={PretrainConfig.load(options.config).task.head.dim}"
    more = [size, *options.set, *([f"init_from={options.init_from}"] if options.init_from else [])]
    accelerator = Accelerator()
    with tempfile.TemporaryDirectory() as name:
        attributes = rows = texts = None
        for head in options.heads:
            for seed in options.seeds:
                run = Path(name) / f"{head}-{seed}"
                train(options.config, options.dataset, run, seed, [*HEADS[head], *more])
                task = load_encoder(run)
                config = data_config(run, None)
                dataset = open_data(config, accelerator)
                content = item_content(dataset, config, task, accelerator)
                latents = encode_latents(task, dataset.catalog, content, accelerator)
                if attributes is None:
                    attributes, _ = read_attributes(dataset.catalog.table, options.columns)
                    rows, every = latents.rows, dataset.catalog.texts(config.text)
                    texts = [every[row] for row in rows]
                    codes = np.stack([a.codes for a in attributes], 1)[rows]
                    features = np.concatenate(
                        [embed_rows(task, content, rows, accelerator, kind)[0] for kind in ("image", "text")], axis=1
                    )
                    features[features == 0] = np.nan  # a missing modality: its mean says nothing
                    features = np.where(np.isnan(features), np.nanmean(features, axis=0), features)
                    for method in ("pca", "ica"):
                        for other in options.seeds if method == "ica" else options.seeds[:1]:
                            print_line(
                                method,
                                other,
                                judged(
                                    linear(method, features, latents.mu.shape[1], other),
                                    codes,
                                    options.columns,
                                    texts,
                                    other,
                                ),
                            )
                    chance = chance_scores(
                        lambda mu, c: all_scores(mu, c), linear("pca", features, latents.mu.shape[1], 0), codes
                    )
                    print_line("chance", 0, {n: round(v, 4) for n, v in chance.items()})
                print_line(head, seed, judged(latents.mu, codes, options.columns, texts, seed))


def linear(method: str, features: np.ndarray, dim: int, seed: int) -> np.ndarray:
    if method == "pca":
        mu = PCA(dim, random_state=seed).fit_transform(features)
    else:
        mu = FastICA(dim, random_state=seed, max_iter=1000, whiten="unit-variance").fit_transform(features)
    return mu / mu.std()


def print_line(method: str, seed: int, numbers: dict[str, Any]) -> None:
    print(json.dumps({"method": method, "seed": seed, **numbers}), flush=True)


if __name__ == "__main__":
    main()
