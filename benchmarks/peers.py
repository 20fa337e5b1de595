"""DIN and DIEN of other libraries on the log of `ctr_log`, each by its own loader, loop and evaluation.

    python benchmarks/peers.py fuxictr|deepctr|rechub din|dien LOG [--activation dice] [--batch-size 2048] [--epochs 1]

Runs in an environment that has them: `torch fuxictr torch-rechub` and, without its pins, `deepctr-torch`. Prints one
line of JSON. `benchmarks/rankers.py` calls it.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from ctr_log import MAX_HISTORY, NUM_CATEGORIES, NUM_ITEMS, NUM_USERS, padded, read_log
from stopwatch import Stopwatch

DIM, ATTENTION, MLP, LR = 64, [80, 40], [200, 80], 1e-3


def fuxictr(options: argparse.Namespace) -> None:
    """Its LongCTR model zoo, from Parquet files and with the loader made for it.

    fit() is kept from evaluating and saving, unless LOG holds validation rows: then it stops early and keeps the best
    weights, as a user would have it. DIEN has no working auxiliary loss there.
    """
    import model_zoo
    import pandas as pd

    sys.path.insert(0, str(Path(next(iter(model_zoo.__path__))) / "LongCTR"))
    from DIEN import DIEN
    from DIN import DIN
    from fuxictr.features import FeatureMap
    from fuxictr.pytorch.dataloaders import RankDataLoader
    from fuxictr.pytorch.torch_utils import seed_everything
    from longctr_dataloader import LongCTRDataLoader

    logging.disable(logging.INFO)
    seed_everything(seed=options.seed)
    folder = Path(tempfile.mkdtemp()) / "log"
    folder.mkdir()
    histories: list[np.ndarray] = []
    early_stopping = (options.log / "validation.npz").is_file()
    for name in ("train", "validation", "eval") if early_stopping else ("train", "eval"):
        log = read_log(options.log, name)
        rows = len(histories) + np.arange(len(log["label"]))
        columns = {
            "user_id": log["user"],
            "user_index": rows,
            "seq_len": np.diff(log["offsets"]),
            "item_index": log["item"],
            "label": log["label"].astype(np.int64),
        }
        pd.DataFrame(columns).to_parquet(folder / f"{name}.parquet")
        histories += np.split(log["history"], log["offsets"][1:-1])
    pd.DataFrame({"user_index": np.arange(len(histories)), "full_item_seq": histories}).to_parquet(
        folder / "users.parquet"
    )
    num_users, num_items, num_categories, max_history = map(int, log["sizes"])
    item = np.arange(num_items + 1)
    pd.DataFrame({"item_index": item, "item_id": item, "cate_id": log["category"]}).to_parquet(folder / "items.parquet")
    sizes = {"user_id": (num_users, "user"), "item_id": (num_items, "item"), "cate_id": (num_categories, "item")}
    features: list[dict] = [{name: {"type": "meta"}} for name in ("user_index", "seq_len", "item_index")]
    for name, (size, source) in sizes.items():
        features.append({name: {"type": "categorical", "padding_idx": 0, "vocab_size": size + 1, "source": source}})
    described = {"dataset_id": "log", "num_fields": 3, "total_features": 3, "input_length": 3, "labels": ["label"]}
    (folder / "feature_map.json").write_text(json.dumps({**described, "features": features}))
    (folder / "runs" / "log").mkdir(parents=True)

    unit = {"dice": "Dice", "relu": "ReLU"}[options.activation]
    settings = {
        "model_id": "m",
        "dataset_id": "log",
        "model_root": str(folder / "runs"),
        "gpu": -1,
        "verbose": 0,
        "metrics": ["AUC", "logloss"],
        "monitor": "AUC",
        "monitor_mode": "max",
        "loss": "binary_crossentropy",
        "optimizer": "adam",
        "task": "binary_classification",
        "learning_rate": LR,
        "embedding_dim": options.dim,
        "embedding_regularizer": options.l2 or None,
        "net_dropout": options.dropout,
        "attention_dropout": options.dropout,
        "seed": options.seed,
        "batch_norm": False,
        "dnn_hidden_units": MLP,
        "dnn_activations": "ReLU",
        "attention_hidden_units": ATTENTION,
        "early_stop_patience": 2,
        "batch_size": options.batch_size,
        "shuffle": True,
        "num_workers": options.workers,
        "max_len": max_history,
        "padding": "post",
        "train_data": str(folder / "train.parquet"),
        "valid_data": str(folder / ("validation.parquet" if early_stopping else "eval.parquet")),
        "test_data": str(folder / "eval.parquet"),
        "user_info": str(folder / "users.parquet"),
        "item_info": str(folder / "items.parquet"),
        "data_loader": LongCTRDataLoader,
        "data_format": "parquet",
        "epochs": options.epochs,
    }
    if options.model == "din":
        settings |= {"attention_hidden_activations": unit}
    else:
        settings |= {"attention_activation": unit, "gru_type": "AUGRU", "attention_type": options.attention}
    feature_map = FeatureMap("log", str(folder))
    feature_map.load(str(folder / "feature_map.json"), settings)
    model = {"din": DIN, "dien": DIEN}[options.model](feature_map, **settings)
    train, validation = RankDataLoader(feature_map, stage="train", **settings)
    evaluation = RankDataLoader(feature_map, stage="test", **settings) if early_stopping else validation
    if not early_stopping:
        model.eval_step, model.load_weights = lambda: None, lambda *_: None
    clock = Stopwatch(options.batch_size)
    model.fit(train, validation_data=validation, **settings)
    more = {"validation_auc": round(model.evaluate(validation)["AUC"], 5)} if early_stopping else {}
    clock.report(evaluation.num_samples, lambda: model.evaluate(evaluation)["AUC"], **named(options), **more)
    if options.predictions:
        np.save(options.predictions, model.predict(evaluation))


def deepctr(options: argparse.Namespace) -> None:
    """Penalties on the embeddings, which would read the whole tables twice a step, are off. DIEN has its auxiliary
    network; DIN and DIEN take the log's own negatives."""
    from deepctr_torch.inputs import SparseFeat, VarLenSparseFeat, get_feature_names
    from deepctr_torch.models import DIEN, DIN

    torch.manual_seed(0)
    sizes = {"item_id": NUM_ITEMS, "cate_id": NUM_CATEGORIES}
    columns = [SparseFeat(name, size + 1, DIM) for name, size in {"user_id": NUM_USERS, **sizes}.items()]
    for prefix in ["hist_"] if options.model == "din" else ["hist_", "neg_hist_"]:
        for name, size in sizes.items():
            feature = SparseFeat(prefix + name, size + 1, DIM, embedding_name=name)
            columns.append(VarLenSparseFeat(feature, maxlen=MAX_HISTORY, length_name="seq_length"))

    def inputs(name: str) -> tuple[dict, np.ndarray]:
        log = read_log(options.log, name)
        history, negatives = (padded(log[part], log["offsets"]) for part in ("history", "negatives"))
        category = log["category"]
        values = {
            "user_id": log["user"],
            "item_id": log["item"],
            "cate_id": category[log["item"]],
            "hist_item_id": history,
            "hist_cate_id": category[history],
            "neg_hist_item_id": negatives,
            "neg_hist_cate_id": category[negatives],
            "seq_length": np.diff(log["offsets"]),
        }
        return {name: values[name] for name in get_feature_names(columns)}, log["label"]

    common = {"dnn_hidden_units": MLP, "att_activation": options.activation, "l2_reg_embedding": 0, "device": "cpu"}
    if options.model == "din":
        model = DIN(columns, list(sizes), att_hidden_size=ATTENTION, **common)
    else:
        common |= {"gru_type": "AUGRU", "use_negsampling": True, "att_weight_normalization": True}
        model = DIEN(columns, list(sizes), att_hidden_units=ATTENTION, **common)
    model.compile(torch.optim.Adam(model.parameters(), lr=LR), "binary_crossentropy", metrics=["auc"])
    x, y = inputs("train")
    x_eval, y_eval = inputs("eval")
    clock = Stopwatch(options.batch_size)
    model.fit(x, y, batch_size=options.batch_size, epochs=options.epochs, verbose=0, shuffle=True)
    clock.report(
        len(y_eval), lambda: model.evaluate(x_eval, y_eval, batch_size=options.batch_size)["auc"], **named(options)
    )


def rechub(options: argparse.Namespace) -> None:
    """Its attention sees padding and has one unit of width 64 a field; its DIEN has an auxiliary loss."""
    from torch_rechub.basic.features import SequenceFeature, SparseFeature
    from torch_rechub.models.ranking import DIEN, DIN
    from torch_rechub.trainers import CTRTrainer
    from torch_rechub.utils.data import DataGenerator

    torch.manual_seed(0)
    sizes = {"item_id": NUM_ITEMS, "cate_id": NUM_CATEGORIES}

    def inputs(name: str) -> tuple[dict, np.ndarray]:
        log = read_log(options.log, name)
        history, negatives = (padded(log[part], log["offsets"]) for part in ("history", "negatives"))
        category = log["category"]
        values = {"user_id": log["user"], "item_id": log["item"], "cate_id": category[log["item"]]}
        values |= {"hist_item_id": history, "hist_cate_id": category[history]}
        if options.model == "dien":
            values |= {"neg_item_id": negatives, "neg_cate_id": category[negatives]}
        return values, log["label"]

    def sequences(prefix: str) -> list:
        return [
            SequenceFeature(prefix + n, size + 1, DIM, pooling="concat", shared_with=n, padding_idx=0)
            for n, size in sizes.items()
        ]

    user = [SparseFeature("user_id", NUM_USERS + 1, DIM)]
    target = [SparseFeature(name, size + 1, DIM, padding_idx=0) for name, size in sizes.items()]
    if options.model == "din":
        unit = {"dims": ATTENTION, "activation": options.activation}
        model = DIN(user, sequences("hist_"), target, mlp_params={"dims": MLP}, attention_mlp_params=unit)
    else:
        model = DIEN(user, sequences("hist_"), sequences("neg_"), target, mlp_params={"dims": MLP})
    x, y = inputs("train")
    x_eval, y_eval = inputs("eval")
    one = {name: column[:1] for name, column in x_eval.items()}
    train, evaluation, _ = DataGenerator(x, y).generate_dataloader(
        x_val=x_eval, y_val=y_eval, x_test=one, y_test=y_eval[:1], batch_size=options.batch_size, num_workers=0
    )
    trainer = CTRTrainer(
        model,
        optimizer_params={"lr": LR},
        n_epoch=options.epochs,
        loss_mode=options.model == "din",
        device="cpu",
        model_path=tempfile.mkdtemp(),
    )
    clock = Stopwatch(options.batch_size)
    trainer.fit(train)
    clock.report(len(y_eval), lambda: trainer.evaluate(model, evaluation), **named(options))


LIBRARIES = {"fuxictr": fuxictr, "deepctr": deepctr, "rechub": rechub}


def named(options: argparse.Namespace) -> dict:
    from importlib.metadata import version

    package = {"fuxictr": "fuxictr", "deepctr": "deepctr-torch", "rechub": "torch-rechub"}[options.library]
    return {"library": f"{package} {version(package)}", "model": options.model, "activation": options.activation}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("model", choices=["din", "dien"])
    parser.add_argument("log", type=Path)
    parser.add_argument("--activation", choices=["dice", "relu"], default="dice", help="of the attention unit")
    parser.add_argument("--attention", default="bilinear_attention", help="of its DIEN")
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--dim", type=int, default=DIM, help="this and the following: of FuxiCTR")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--l2", type=float, default=0.0, help="of embeddings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--predictions", type=Path, help="write those of the eval rows to this .npy file")
    parser.add_argument("--workers", type=int, default=1, help="loader processes; 1 is its default")
    options = parser.parse_args()
    LIBRARIES[options.library](options)


if __name__ == "__main__":
    main()
