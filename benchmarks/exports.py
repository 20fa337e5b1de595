"""Whether FuxiCTR and RecBole load what `mmctr export` writes for them: the same vector for every item.

    python benchmarks/exports.py fuxictr|recbole [--items 500] [--dim 24]

Runs in an environment that has the library; mmctr may be elsewhere on the path, of which only the writers are needed.
Integer ids and text ids, each by the library's own reading of a small log in which some items with a vector do not
occur and some that occur have none. Prints one line of JSON; fails when a number differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

TEXT_IDS = ["a b", "7'1", "007", "Müller", "x,y", "#1"]


def drawn_vectors(options: argparse.Namespace, text: bool) -> tuple[list, np.ndarray]:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((options.items, options.dim)).astype(np.float32)
    vectors *= 10.0 ** rng.integers(-6, 4, (options.items, 1))  # small and large ones: decimals must not cut them
    numbers = (rng.permutation(options.items * 3)[: options.items] + 1).tolist()
    return ([*TEXT_IDS, *(f"i{n}" for n in numbers[len(TEXT_IDS) :])] if text else numbers), vectors


def exported(python: str, ids: list, vectors: np.ndarray, form: str, folder: Path, name: str) -> str:
    """Write the vectors with `mmctr export`, run by the Python that has mmctr; returns the config lines."""
    source = folder / f"vectors-{form}.npz"
    np.savez(source, item_id=np.array(ids), vectors=vectors)
    command = [python, "-m", "mmctr", "export", str(source), "--format", form, "--out", str(folder / name)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return (folder / f"{name}.yaml").read_text(encoding="utf-8")


def fuxictr(python: str, ids: list, vectors: np.ndarray, folder: Path) -> int:
    """Its FeatureProcessor on a CSV and the embedding layer its models make."""
    import polars as pl
    import torch
    import yaml
    from fuxictr.preprocess import FeatureProcessor
    from fuxictr.pytorch.layers import FeatureEmbedding

    lines = yaml.safe_load(exported(python, ids, vectors, "fuxictr", folder, "items.npz"))
    stranger = "stranger" if isinstance(ids[0], str) else 10**9
    shown = [str(item) for item in [*ids[: len(ids) // 2], stranger]]
    numbers = range(len(shown))
    log = pl.DataFrame({"item_id": shown, "user_id": [f"u{n % 7}" for n in numbers], "label": [n % 2 for n in numbers]})
    user = {"name": "user_id", "active": True, "dtype": "str", "type": "categorical"}  # one feature alone does not load
    label = {"name": "label", "dtype": "float"}
    processor = FeatureProcessor([user, *lines["feature_cols"]], label, dataset_id="log", data_root=str(folder))
    processor.fit(processor.preprocess(log.lazy()), min_categr_count=1)
    layer = FeatureEmbedding(processor.feature_map, vectors.shape[1])
    vocabulary = json.loads((folder / "log" / "feature_vocab.json").read_text())["item_id"]
    rows = torch.tensor([vocabulary[str(item)] for item in [*ids, stranger]])
    with torch.no_grad():
        read = layer({"item_id": rows})[:, 0].numpy()
    np.testing.assert_array_equal(read[:-1], vectors)
    assert not read[-1].any(), "an item without a vector reads zeros"
    return len(ids)


def recbole(python: str, ids: list, vectors: np.ndarray, folder: Path) -> int:
    """Its Dataset on atomic files."""
    import yaml
    from recbole.config import Config
    from recbole.data import create_dataset

    (folder / "log").mkdir()
    lines = exported(python, ids, vectors, "recbole", folder / "log", "log.itememb")
    rows = [*ids[: len(ids) // 2], "stranger"]
    log = "".join(f"u{i % 7}\t{item}\t{i}\n" for i, item in enumerate(rows))
    (folder / "log" / "log.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\n" + log, encoding="utf-8")
    values = yaml.safe_load(lines) | {"data_path": str(folder), "load_col": None}
    sys.argv = sys.argv[:1]  # RecBole reads the command line too
    dataset = create_dataset(Config(model="BPR", dataset="log", config_dict=values))
    matrix = dataset.get_preload_weight("iid")
    read = matrix[dataset.token2id("iid", [str(item) for item in ids])]
    np.testing.assert_array_equal(read.astype(np.float32), vectors)
    assert not matrix[0].any() and not matrix[dataset.token2id("item_id", "stranger")].any()
    return len(ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("library", choices=["fuxictr", "recbole"])
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--dim", type=int, default=24)
    parser.add_argument("--python", default=sys.executable, help="a Python that has mmctr (default: this one)")
    options = parser.parse_args()
    check = {"fuxictr": fuxictr, "recbole": recbole}[options.library]
    equal = {}
    for kind in ("integers", "text"):
        ids, vectors = drawn_vectors(options, kind == "text")
        with tempfile.TemporaryDirectory() as folder:
            equal[kind] = check(options.python, ids, vectors, Path(folder))
    print(json.dumps({"library": options.library, "equal vectors": equal, "dim": options.dim}))


if __name__ == "__main__":
    main()
