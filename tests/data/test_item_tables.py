from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune.train import main
from mmctr.data.item_tables import described, join_item_tables
from mmctr.data.prepare import open_dataset
from mmctr.files import read_json
from mmctr.retrieval.semantic_ids import semantic_ids
from mmctr.runs.config import DataConfig, FinetuneConfig
from mmctr.runs.evaluate import evaluate_run
from tests.helpers.tiny import pretrain_values, start, write_config
from tests.helpers.worlds import log_columns, write_dataset, write_table

ITEMS = {"item_id": ["a", "b", "c"], "title": ["x", None, "z"]}
LOG = log_columns([(1, "a", 1, 1), (1, "b", 2, 0), (2, "c", 3, 1)])


def test_columns_are_joined_by_id_and_what_does_not_fit_is_counted(tmp_path):
    dataset = open_dataset(write_dataset(tmp_path / "d", ITEMS, LOG))
    before = dataset.catalog.table
    one = write_table(
        tmp_path / "one.parquet", {"item_id": ["c", "new", "a"], "sid": [7, 8, 9], "w": [1.5, 2.0, np.nan]}
    )
    two = write_table(tmp_path / "two.csv", {"item_id": ["b", "c"], "prefix": ["1-2", "3-4"]})
    joined = join_item_tables(dataset, [str(one), str(two)])
    table = joined.catalog.table
    assert table.column_names == ["item_id", "title", "sid", "w", "prefix"]
    assert table["sid"].to_pylist() == [9, None, 7] and table["w"].to_pylist() == [None, None, 1.5]
    assert table["prefix"].to_pylist() == [None, "1-2", "3-4"]
    assert joined.report["item_tables"] == {
        "columns": ["sid", "w", "prefix"],
        "tables": {
            str(one): {"rows": 3, "items without a row": 1, "unknown ids": {"count": 1, "examples": ["new"]}},
            str(two): {"rows": 2, "items without a row": 1, "unknown ids": {"count": 0, "examples": []}},
        },
    }
    assert described(joined.report)[0] == f"{one}: 3 rows, 1 items without one, 1 of unknown items ('new')"
    # the dataset itself and its caches are what they were
    assert dataset.catalog.table.equals(before) and "item_tables" not in dataset.report
    assert joined.catalog.folder == dataset.catalog.folder and len(joined.interactions) == 3
    assert open_dataset(tmp_path / "d").catalog.table.equals(before)


def test_caches_follow_the_columns_they_are_made_of(tmp_path):
    dataset = open_dataset(write_dataset(tmp_path / "d", ITEMS, LOG))
    source = write_table(tmp_path / "t.parquet", {"item_id": ["a", "b"], "more": ["one", "two"]})
    joined = join_item_tables(dataset, [str(source)]).catalog
    calls: list[list[str]] = []

    def tokenize(texts):
        import torch

        calls.append(texts)
        return torch.zeros(len(texts), 2, dtype=torch.int64)

    dataset.catalog.tokens(["title"], tokenize, "k")
    joined.tokens(["title"], tokenize, "k")
    assert calls == [["x", "", "z"]]  # the title's tokens are found again
    joined.tokens(["title", "more"], tokenize, "k")
    write_table(source, {"item_id": ["a", "b"], "more": ["one", "three"]})
    join_item_tables(dataset, [str(source)]).catalog.tokens(["title", "more"], tokenize, "k")
    assert calls[1:] == [["x. one", "two", "z"], ["x. one", "three", "z"]]


def test_mistakes_name_the_file(tmp_path):
    dataset = open_dataset(write_dataset(tmp_path / "d", ITEMS, LOG))
    tables = {
        "clash": ({"item_id": ["a"], "title": ["t"]}, "have a column 'title' already"),
        "twice": ({"item_id": ["a", "b", "a"], "s": [1, 2, 3]}, "item id 'a' repeats"),
        "kind": ({"item_id": [1, 2], "s": [1, 2]}, "ids are string on one side and int64 on the other"),
        "column": ({"item": ["a"], "s": [1]}, "column 'item_id' is missing"),
        "empty": ({"item_id": pa.array([], pa.string()), "s": pa.array([], pa.int64())}, "holds no rows"),
    }
    for name, (columns, message) in tables.items():
        path = write_table(tmp_path / f"{name}.parquet", columns)
        with pytest.raises(ValueError, match=rf"{name}\.parquet.*{message}"):
            join_item_tables(dataset, [str(path)])
    write_table(tmp_path / "one.parquet", {"item_id": ["a"], "s": [1]})
    for paths, message in (
        (["one.parquet", "one.parquet"], "have a column 's' already"),
        (["none.parquet"], "no such file"),
        (["d"], "no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            join_item_tables(dataset, [str(tmp_path / name) for name in paths])
    with pytest.raises(ValueError, match="put the columns of item_tables into the shards"):
        DataConfig.parse({"path": "p", "stream": {}, "item_tables": ["x.parquet"]})


@pytest.fixture(scope="module")
def styled(tmp_path_factory) -> Path:
    """Users like one of six styles. Nothing in the items says which an item has; its vector does."""
    folder = tmp_path_factory.mktemp("styled")
    rng = np.random.default_rng(0)
    users, moments, styles, each, dim = 400, 40, 6, 10, 16
    style = np.repeat(np.arange(styles), each)
    likes = rng.integers(0, styles, users)
    liked = likes[:, None] * each + rng.integers(0, each, (users, moments))
    item = np.where(rng.random((users, moments)) < 0.4, liked, rng.integers(0, styles * each, (users, moments)))
    label = rng.random((users, moments)) < np.where(style[item] == likes[:, None], 0.9, 0.1)
    interactions = {
        "user_id": np.repeat(np.arange(users), moments),
        "item_id": item.ravel(),
        "timestamp": np.tile(np.arange(moments), users),
        "label": label.ravel().astype(np.int64),
    }
    items = {"item_id": np.arange(len(style)), "title": ["thing"] * len(style)}
    write_dataset(folder / "data", items, interactions)
    vectors = rng.standard_normal((styles, dim))[style] + 0.1 * rng.standard_normal((len(style), dim))
    np.savez(folder / "vectors.npz", item_id=np.arange(len(style)), vectors=vectors)
    semantic_ids([str(folder / "vectors.npz")], folder / "sid.parquet", levels=2, codes=styles)
    return folder


def values(folder: Path, **features) -> dict:
    return {
        "data": {"path": str(folder / "data"), "item_tables": [str(folder / "sid.parquet")] if features else []},
        "split": {"name": "cold_items", "cold": 0.25, "test": 0.2},
        "task": {
            "embedder": {"id_dim": 8, "id_dropout": 0.3, "init_std": 0.1},
            "features": {"item": features},
            "ranker": {"name": "din", "attention": [16], "mlp": [32, 16], "activation": "relu"},
            "user_dim": 8,
        },
        "fit": {"epochs": 4, "batch_size": 256, "optimizer": {"lr": 1e-2}},
        "run_dir": str(folder / f"run-{'sid' if features else 'id'}"),
    }


@pytest.mark.slow
def test_cold_items_are_ranked_by_their_semantic_ids(styled, tmp_path):
    features = {"sid_prefixes": {"name": "multi_valued", "dim": 8, "min_count": 2}}
    cold = {}
    for chosen in ({}, features):
        config = FinetuneConfig.parse(values(styled, **chosen))
        main(config)
        cold[bool(chosen)] = read_json(Path(config.run_dir) / "metrics.json")["test"]["cold"]["gauc"]
    assert cold[False] < 0.58 and cold[True] > 0.75

    # the run folder is enough: what it was trained on is in it, whatever becomes of the file
    run, source = Path(config.run_dir), styled / "sid.parquet"
    metrics = read_json(run / "metrics.json")
    kept = source.read_bytes()
    source.unlink()
    assert json.loads(json.dumps(evaluate_run(str(run), None))) == {n: metrics[n] for n in ("validation", "test")}

    # other codes are other features: the run does not go on with them
    table = pq.read_table(pa.BufferReader(kept))
    at, anywhere = table.column_names.index("sid_prefixes"), np.random.default_rng(0).permutation(len(table))
    mixed = table.set_column(at, "sid_prefixes", table["sid_prefixes"].take(pa.array(anywhere)))
    pq.write_table(mixed, source)
    with pytest.raises(ValueError, match=r"run-sid: holds a run with other item tables"):
        main(config)
    wrong = evaluate_run(str(run), str(styled / "data"), [str(source)])["test"]["cold"]["gauc"]
    right = evaluate_run(str(run), str(styled / "data"))["test"]["cold"]["gauc"]
    assert wrong < 0.6 and right > 0.75
    with pytest.raises(ValueError, match="column 'sid_prefixes' is missing"):
        evaluate_run(str(run), str(styled / "data"), [])
    source.write_bytes(kept)
    main(config)  # finished, and with the same tables nothing to say


@pytest.mark.slow
def test_pretraining_reads_and_keeps_joined_columns(toy_folder, tmp_path):
    factors = pq.read_table(toy_folder / "items.parquet", columns=["item_id", "factor_colour"])
    source = tmp_path / "more.parquet"
    pq.write_table(factors.rename_columns(["item_id", "paint"]), source)
    config = pretrain_values(toy_folder)
    config["data"]["item_tables"] = [str(source)]
    config["fit"]["epochs"], config["attributes"] = 1, ["paint", "factor_colour"]
    run = tmp_path / "run"
    start(tmp_path, "pretrain.train", write_config(tmp_path / "p.yaml", config), f"run_dir={run}").ok()
    metrics = read_json(run / "metrics.json")["validation"]
    paint = {name.replace("paint", "factor_colour"): value for name, value in metrics.items() if "paint" in name}
    assert paint == {name: metrics[name] for name in paint} and paint
    source.unlink()
    again = evaluate_run(str(run), None)["validation"]
    assert again == {name: metrics[name] for name in again} and paint.keys() <= {*metrics}
    with pytest.raises(ValueError, match="--item-tables is for rankers"):
        evaluate_run(str(run), None, ["x.parquet"])
