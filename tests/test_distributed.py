"""Two processes with the same global batch do what one process does: losses, gradients, weights, vectors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file

from mmctr.data.embeddings import EmbeddingTable
from mmctr.encoders.variational_head import Standardise
from mmctr.layers.batch_norm import share_statistics
from mmctr.layers.dice import Dice
from mmctr.losses.contrastive import (
    QueuedCandidates,
    clip_loss,
    multi_positive_loss,
    pair_loss,
    siglip_loss,
    similarity_distillation_loss,
)
from mmctr.losses.variational import dip_penalties, kl_parts
from tests.helpers.tiny import (
    ARCHITECTURE,
    CLONE,
    all_ok,
    finetune_values,
    free_port,
    log_lines,
    losses,
    pretrain_values,
    start,
    write_config,
)

pytestmark = pytest.mark.slow

WORKER = """
import sys, torch, torch.distributed as dist, torch.nn.functional as F
from mmctr.distributed import gather_rows
from mmctr.embedders.memory_bank import MemoryBank
from mmctr.layers.dice import Dice
from tests.test_distributed import LOSSES, batch_norm, loss_and_gradients

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
given = torch.load(sys.argv[1], weights_only=True)
result = {}
rows = slice(rank * 5, rank * 5 + 5)
for name in LOSSES:
    result |= {f"{name} {part}": value for part, value in loss_and_gradients(name, given, rows).items()}
# unequal shares of the rows, none at all on the second process the second time
for share in (3, 10):
    dice = Dice(4)
    torch.nn.init.constant_(dice.alpha, 0.3)
    x = given["x"].clone().requires_grad_()
    mine = x[:share] if rank == 0 else x[share:]
    (dice(mine) * given["w"][:share] if rank == 0 else dice(mine) * given["w"][share:]).sum().backward()
    for part, value in {"x": x.grad, "alpha": dice.alpha.grad}.items():
        dist.all_reduce(value)
        result[f"dice {share} {part}"] = value
    result[f"dice {share} mean"], result[f"dice {share} var"] = dice.running_mean, dice.running_var
# the same for batch normalisation
for share in (3, 10):
    x = given["x"].clone().requires_grad_()
    norm = batch_norm()
    out = norm(x[:share] if rank == 0 else x[share:])
    (out * (given["w"][:share] if rank == 0 else given["w"][share:])).sum().backward()
    for part, value in {"x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}.items():
        dist.all_reduce(value)
        result[f"norm {share} {part}"] = value
    result[f"norm {share} mean"], result[f"norm {share} var"] = norm.running_mean, norm.running_var
result["gathered"] = gather_rows(given["ids"][rows])
# each process writes items of its own into a queue, and not as many
bank, table, has = MemoryBank(10, 4), torch.zeros(10, 4), torch.zeros(10, dtype=torch.bool)
for written in (([0, 1, 2, 3], [4]), ([5, 6], [1, 6, 7])):
    own = torch.tensor(written[rank])
    bank.step(table, has, own, None, given["x"][own] + 10 * rank, own > 2)
result["bank"] = gather_rows(torch.cat([table, has[:, None], bank.made_at[:, None]], dim=1))
if rank == 0:
    torch.save(result, sys.argv[2])
dist.destroy_process_group()
"""


LOSSES = ("clip", "siglip", "pairs", "multi_positive", "distillation", "kl_parts", "dip", "standardised")


def loss_and_gradients(name: str, given: dict[str, torch.Tensor], rows: slice) -> dict[str, torch.Tensor]:
    """A loss on some rows and its gradients for all, averaged over processes as data-parallel training does."""
    image, text, other = (given[part].clone().requires_grad_() for part in ("image", "text", "other"))
    scale, bias = torch.tensor(7.0, requires_grad=True), torch.tensor(-3.0, requires_grad=True)
    x, y, z = (F.normalize(part[rows], dim=1) for part in (image, text, other))
    ids, valid = given["ids"][rows], given["valid"][rows]
    kept, log_q = torch.tensor([True, True, False]), torch.tensor([0.2, 0.0, 0.0])
    past = QueuedCandidates(F.normalize(given["queue"], dim=1), torch.tensor([[100], [1], [101]]), kept, log_q)
    if name == "clip":
        loss = clip_loss(x, y, scale, ids, valid, past, past)
    elif name == "siglip":
        loss = siglip_loss(x, y, scale, bias, ids, valid, past)
    elif name == "pairs":
        loss = pair_loss(
            x,
            y,
            scale,
            anchor_keys=ids,
            positive_keys=given["others"][rows],
            valid=valid,
            log_q=given["log_q"][rows],
            negatives=z,
            has_negative=given["hard"][rows],
            queue=past,
        )
    elif name == "multi_positive":
        loss = multi_positive_loss(x, scale, given["groups"][rows], ids, valid)
    elif name == "kl_parts":
        parts = kl_parts(z, x, y, num_items=40)
        loss = scale * parts.mutual_information + 3 * parts.total_correlation + 2 * parts.dimension_wise_kl
    elif name == "dip":
        loss = scale * torch.stack(dip_penalties(x, y)).sum()
    elif name == "standardised":
        standard = Standardise(x.shape[1])
        standard.update(x, valid)
        standard.update(y, valid)
        loss = scale * standard(z).square().mean()
    else:
        loss = similarity_distillation_loss(x, y.detach(), scale, 5.0, ids, valid)
    loss.backward()
    values = {"loss": loss.detach(), "scale": scale.grad}
    values |= {part: p.grad for part, p in (("image", image), ("text", text), ("other", other), ("bias", bias))}
    found = {part: torch.zeros(()) if value is None else value.clone() for part, value in values.items()}
    if dist.is_initialized():
        for part, value in found.items():
            dist.all_reduce(value)
            found[part] = value / dist.get_world_size()
    return found


def batch_norm() -> torch.nn.BatchNorm1d:
    """A layer with statistics over processes, and scale and shift that are not 1 and 0."""
    norm = torch.nn.BatchNorm1d(4)
    share_statistics(norm)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 1.0, 2.0, -1.0]))
        norm.bias.copy_(torch.tensor([0.1, 0.0, -0.3, 0.2]))
    return norm


def one_and_two(folder: Path, recipe: str, config: Path) -> None:
    """The runs `1` and `2` of a config, on so many processes."""
    all_ok([start(folder, recipe, config, f"run_dir={folder / str(n)}", processes=n) for n in (1, 2)])


def torchrun(*arguments: object, **environ: str) -> None:
    """Two processes, started as a user starts them, with further variables of the environment."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CLONE)} | environ
    done = subprocess.run(
        [str(part) for part in (*command, *arguments)], cwd=CLONE, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def check_same_run(one: Path, two: Path, count: int) -> None:
    a, b = losses(one), losses(two)
    assert len(a) == count and len({round(loss, 4) for loss in a}) > 2
    np.testing.assert_allclose(b, a, rtol=0, atol=1e-5)
    weights, others = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert weights.keys() == others.keys()
    for name in weights:
        if name.endswith("attn.in_proj_bias"):
            # softmax ignores the bias of keys: its gradient is rounding noise, which Adam blows up
            third = len(weights[name]) // 3
            weights[name][third : 2 * third] = others[name][third : 2 * third] = 0
        np.testing.assert_allclose(others[name].float(), weights[name].float(), rtol=0, atol=1e-4, err_msg=name)


def test_losses_and_dice_on_two_processes_equal_one(tmp_path):
    generator = torch.Generator().manual_seed(0)
    given = {name: torch.randn(10, 4, generator=generator) for name in ("image", "text", "other", "x", "w")}
    given["ids"] = torch.tensor([0, 1, 2, 3, 4, 1, 6, 6, 8, 0])  # copies within and across processes
    given["others"] = torch.tensor([1, 9, 9, 0, 11, 12, 4, 13, 14, 15])
    given["groups"] = torch.tensor([0, 1, 0, 2, -1, 0, 1, 1, 2, -1])
    given["log_q"] = torch.randn(10, generator=generator)
    # other shares of valid rows on each process
    given["valid"] = torch.tensor([1, 1, 1, 1, 0, 1, 0, 1, 0, 1], dtype=torch.bool)
    given["hard"] = torch.tensor([1, 0, 1, 1, 1, 1, 0, 1, 1, 1], dtype=torch.bool)
    given["queue"] = torch.randn(3, 4, generator=generator)
    torch.save(given, tmp_path / "given")
    (tmp_path / "worker.py").write_text(WORKER)
    torchrun(tmp_path / "worker.py", tmp_path / "given", tmp_path / "result", ACCELERATE_USE_CPU="1")
    result = torch.load(tmp_path / "result", weights_only=True)
    assert result["gathered"].tolist() == given["ids"].tolist()
    writers, times = torch.tensor([0, 10, 0, 0, 10, 0, 10, 10, 0, 0]), torch.tensor([1, 2, 1, 1, 1, 2, 2, 2, 0, 0])
    places = torch.arange(10)
    table = torch.where((times > 0)[:, None], given["x"] + writers[:, None], 0.0)
    expected = torch.cat([table, ((places > 2) & (times > 0))[:, None], times[:, None]], dim=1)
    torch.testing.assert_close(result["bank"], expected.repeat(2, 1))  # the same in both processes
    for name in LOSSES:
        for part, value in loss_and_gradients(name, given, slice(None)).items():
            torch.testing.assert_close(result[f"{name} {part}"], value, rtol=1e-5, atol=1e-6, msg=f"{name} {part}")
        assert result[f"{name} scale"].abs() > 1e-3, name
    dice = Dice(4)
    torch.nn.init.constant_(dice.alpha, 0.3)
    x = given["x"].clone().requires_grad_()
    (dice(x) * given["w"]).sum().backward()
    for share in (3, 10):
        expected = {"x": x.grad, "alpha": dice.alpha.grad, "mean": dice.running_mean, "var": dice.running_var}
        for part, value in expected.items():
            torch.testing.assert_close(result[f"dice {share} {part}"], value, rtol=1e-4, atol=1e-5)

    norm = batch_norm()
    x = given["x"].clone().requires_grad_()
    (norm(x) * given["w"]).sum().backward()
    for share in (3, 10):
        expected = {"x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}
        expected |= {"mean": norm.running_mean, "var": norm.running_var}
        for part, value in expected.items():
            torch.testing.assert_close(result[f"norm {share} {part}"], value, rtol=1e-4, atol=1e-5)


def test_finetuning_under_torchrun_equals_one_process(toy_folder, tmp_path):
    config = write_config(tmp_path / "f.yaml", finetune_values(toy_folder))
    start(tmp_path, "finetune.train", config, f"run_dir={tmp_path / 'one'}").ok()
    # on a machine without a GPU nobody needs to say that the processes are to use the CPU
    cpu = {"ACCELERATE_USE_CPU": "1"} if torch.cuda.is_available() else {}
    torchrun("-m", "finetune.train", config, f"run_dir={tmp_path / 'two'}", **cpu)
    check_same_run(tmp_path / "one", tmp_path / "two", count=22)


@pytest.mark.parametrize("rows", ["adam", "adagrad", "ftrl"])
def test_tables_trained_by_rows_on_two_processes_equal_one(toy_folder, tmp_path, rows):
    values = finetune_values(toy_folder, epochs=1)
    values["fit"]["optimizer"] |= {"rows": rows, "rows_from": 0, "weight_decay": 0.1}
    values["task"]["features"] = {"item": {"title": {"name": "multi_valued", "separator": " ", "dim": 4}}}
    config = write_config(tmp_path / "f.yaml", values)
    one_and_two(tmp_path, "finetune.train", config)
    check_same_run(tmp_path / "1", tmp_path / "2", count=11)


@pytest.mark.parametrize("rows_from", [0, 10**6])
def test_mini_batch_aware_l2_on_two_processes_equals_one(toy_folder, tmp_path, rows_from):
    """Most items and users of a batch are on both processes, and each counts once."""
    values = finetune_values(toy_folder, epochs=1)
    values["fit"]["optimizer"] |= {"rows_from": rows_from}
    values["task"]["mini_batch_l2"] = 30.0
    config = write_config(tmp_path / "f.yaml", values)
    one_and_two(tmp_path, "finetune.train", config)
    check_same_run(tmp_path / "1", tmp_path / "2", count=11)
    terms = [[line["mini_batch_l2"] for line in log_lines(tmp_path / n) if "loss" in line] for n in ("1", "2")]
    np.testing.assert_allclose(terms[1], terms[0], rtol=1e-4)
    assert min(terms[0]) > 0.01


def test_dien_with_its_auxiliary_loss_on_two_processes_equals_one(toy_folder, tmp_path):
    values = finetune_values(toy_folder, epochs=1)
    values["task"]["ranker"] = {"name": "dien", "mlp": [16], "activation": "dice"}
    config = write_config(tmp_path / "f.yaml", values)
    one_and_two(tmp_path, "finetune.train", config)
    check_same_run(tmp_path / "1", tmp_path / "2", count=11)
    assert all(line["auxiliary"] > 0 for line in log_lines(tmp_path / "1") if "loss" in line)


def test_content_in_attention_tiers_and_gate_on_two_processes_equals_one(pretrained, toy_folder, tmp_path):
    """Compared by the queue of an encoder that is trained: each process reads what the others have written."""
    content = {"name": "encoder", "run": str(pretrained), "max_encoded": 1000, "dim": 8, "hidden": [8]}
    values = finetune_values(toy_folder, content, epochs=0.5, evaluations=2, optimizer={"lr": 3e-3})
    content["residual"] = True
    values["task"]["embedder"] |= {"fusion": "gate"}
    values["task"]["ranker"] |= {"weights": "softmax", "content_attention": True}
    values["task"]["simtier"] = {"tiers": 10}
    config = write_config(tmp_path / "f.yaml", values)
    one_and_two(tmp_path, "finetune.train", config)
    check_same_run(tmp_path / "1", tmp_path / "2", count=6)
    assert load_file(tmp_path / "1" / "model.safetensors")["ranker.content.log_tau"].item() != pytest.approx(
        np.log(0.1)
    )


def test_tables_drawn_anew_on_two_processes_equal_one(toy_folder, tmp_path):
    """Into the second epoch; another part, which is no table, has stopped before."""
    groups = {"id": {"redraw": True}, "ranker": {"to_epoch": 0.8}}
    optimizer = {"lr": 1e-2, "rows_from": 0, "groups": groups}
    config = write_config(tmp_path / "f.yaml", finetune_values(toy_folder, epochs=1.2, optimizer=optimizer))
    one_and_two(tmp_path, "finetune.train", config)
    check_same_run(tmp_path / "1", tmp_path / "2", count=13)


def test_gbdt_lr_on_two_processes_equals_one(toy_folder, tmp_path):
    """One process grows the trees for both. Weights start at zero, where many a gradient is a sum that cancels, and
    Adam makes a whole step of the rounding that is left: hence the small one."""
    values = finetune_values(toy_folder, epochs=1)
    values["fit"]["optimizer"] |= {"lr": 1e-3}
    values["task"]["ranker"] = {"name": "gbdt_lr", "trees": {"num_trees": 8, "min_rows": 5}}
    config = write_config(tmp_path / "f.yaml", values)
    one_and_two(tmp_path, "finetune.train", config)
    check_same_run(tmp_path / "1", tmp_path / "2", count=8)
    assert (tmp_path / "1" / "trees.json").read_bytes() == (tmp_path / "2" / "trees.json").read_bytes()


def test_generated_ids_and_stages_on_two_processes_equal_one(toy_folder, tmp_path):
    """Meta-Embedding differentiates inside of its forward pass, and shares the items of a step out; stages do all on
    each process."""
    values = finetune_values(toy_folder, epochs=1)
    values["split"] = {"name": "staged", "new": 0.3, "rows": 2, "test_rows": 2}
    values["task"]["features"] = {"item": {"brand": {"name": "categorical", "dim": 4}}}
    values["task"]["embedder"]["cold_ids"] = {"name": "meta_embedding", "rows": 2, "validation": 0.3, "hidden": [8]}
    values["cold_fit"] = {"epochs": 1, "batch_size": 48, "log_every": 1}
    config = write_config(tmp_path / "f.yaml", values)
    one_and_two(tmp_path, "finetune.train", config)
    check_same_run(tmp_path / "1", tmp_path / "2", count=13)
    one, two = ([line["loss"] for line in log_lines(tmp_path / n / "cold_ids") if "loss" in line] for n in ("1", "2"))
    assert len(one) > 4
    np.testing.assert_allclose(two, one, rtol=0, atol=1e-5)
    scores = [pyarrow.parquet.read_table(tmp_path / n / "stages.parquet")["warm_c"].to_numpy() for n in ("1", "2")]
    np.testing.assert_allclose(scores[1], scores[0], rtol=0, atol=1e-4)


def test_pretraining_with_clip_on_two_processes_equals_one(toy_folder, tmp_path):
    config = write_config(tmp_path / "p.yaml", pretrain_values(toy_folder))
    one_and_two(tmp_path, "pretrain.train", config)
    check_same_run(tmp_path / "1", tmp_path / "2", count=12)


def test_a_tower_with_batch_normalisation_on_two_processes_equals_one(toy_folder, tmp_path):
    """The tower of configs/pretrain/toy.yaml: weights, losses, and the running statistics that evaluations read."""
    values = pretrain_values(toy_folder)
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32, "patch_size": None}
    values["task"]["encoder"]["architecture"] = ARCHITECTURE | {"vision_cfg": vision}
    values["fit"] |= {"epochs": 2, "evaluations": 2, "optimizer": {"lr": 1e-4}}
    config = write_config(tmp_path / "p.yaml", values)
    one_and_two(tmp_path, "pretrain.train", config)
    check_same_run(tmp_path / "1", tmp_path / "2", count=8)
    assert any("running_var" in name for name in load_file(tmp_path / "1" / "model.safetensors"))
    one, two = ([line["validation"] for line in log_lines(tmp_path / n) if "validation" in line] for n in ("1", "2"))
    assert len(one) > 1
    for name in ("alignment", "uniformity"):
        np.testing.assert_allclose([v[name] for v in two], [v[name] for v in one], atol=1e-4)


@pytest.fixture(scope="module")
def pretrained(toy_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    config = write_config(folder / "p.yaml", pretrain_values(toy_folder, objectives={"siglip": {}}))
    start(folder, "pretrain.train", config, f"run_dir={folder / 'run'}").ok()
    return folder / "run"


def test_siglip_on_two_processes_equals_one(pretrained, toy_folder, tmp_path):
    config = write_config(tmp_path / "p.yaml", pretrain_values(toy_folder, objectives={"siglip": {}}))
    start(tmp_path, "pretrain.train", config, f"run_dir={tmp_path / 'two'}", processes=2).ok()
    check_same_run(pretrained, tmp_path / "two", count=12)


def test_joint_training_on_two_processes_equals_one(pretrained, toy_folder, tmp_path):
    content = {"name": "encoder", "run": str(pretrained), "dim": 8, "hidden": [8]}
    values = finetune_values(toy_folder, content, epochs=0.5, optimizer={"lr": 3e-3})
    config = write_config(tmp_path / "f.yaml", values)
    one_and_two(tmp_path, "finetune.train", config)
    check_same_run(tmp_path / "1", tmp_path / "2", count=6)


def test_embedding_on_two_processes_equals_one(pretrained, tmp_path):
    arguments = ("mmctr", "embed", pretrained, "--shard-size", 16, "--out")
    all_ok([start(tmp_path, *arguments, tmp_path / str(count), processes=count) for count in (1, 2)])
    one, two = EmbeddingTable.read(tmp_path / "1"), EmbeddingTable.read(tmp_path / "2")
    assert one.ids.equals(two.ids) and one.titles == two.titles and len(one) > 100
    np.testing.assert_array_equal(one.vectors, two.vectors)
    assert len(list((tmp_path / "2").glob("vectors-*"))) == 8


EVERYTHING = {
    "objectives": {
        "clip": {},
        "siglip": {"weight": 0.5},
        "behavior": {"hard_negatives": True, "window": 2},
        "query": {},
        "group": {"column": "factor_shape"},
        "distillation": {"path": "unset"},
    },
    "item_vector": "concat",
    "matryoshka": [8],
}


@pytest.fixture(scope="module")
def with_queries(toy_folder, pretrained, tmp_path_factory) -> tuple[Path, dict]:
    """The toy dataset with a query for every third click, and the settings of a task with every objective."""
    folder = tmp_path_factory.mktemp("queries")
    shutil.copytree(toy_folder, folder / "data")
    path = folder / "data" / "interactions.parquet"
    log = pyarrow.parquet.read_table(path)
    items = pyarrow.parquet.read_table(folder / "data" / "items.parquet")
    words = [(title or "thing").split()[-1] for title in items["title"].to_pylist()]
    word = dict(zip(items["item_id"].to_pylist(), words, strict=True))
    queries = [word[item] if row % 3 == 0 else None for row, item in enumerate(log["item_id"].to_pylist())]
    pyarrow.parquet.write_table(log.append_column("query", pa.array(queries, pa.string())), path)
    start(folder, "mmctr", "embed", pretrained, "--out", folder / "teacher").ok()
    task = json.loads(json.dumps(EVERYTHING))
    task["objectives"]["distillation"]["path"] = str(folder / "teacher")
    return folder / "data", task


@pytest.mark.parametrize("queue", [None, {"size": 40, "momentum": 0.5}], ids=["", "queue"])
def test_every_objective_on_two_processes_equals_one(with_queries, tmp_path, queue):
    data, task = with_queries
    values = pretrain_values(data, **task, queue=queue)
    values["same"] = ["text", "image", "factor_colour"]
    values["fit"] |= {"epochs": 1, "optimizer": {"lr": 1e-3}}
    config = write_config(tmp_path / "p.yaml", values)
    one_and_two(tmp_path, "pretrain.train", config)
    check_same_run(tmp_path / "1", tmp_path / "2", count=5)
    for one, two in zip(*(log_lines(tmp_path / name) for name in ("1", "2")), strict=True):
        for name in EVERYTHING["objectives"] if "loss" in one else ():
            assert one[name] > 0.01 and one[name] == pytest.approx(two[name], abs=1e-4), name


@pytest.mark.parametrize("processes", [1, 2])
def test_encoding_in_chunks_equals_the_whole_batch(with_queries, tmp_path, processes):
    """Gradients through the encoder a few items at a time, on one process and on two."""
    data, task = with_queries
    values = pretrain_values(data, **task, queue={"size": 40})
    values["fit"] |= {"epochs": 1, "optimizer": {"lr": 1e-3}}
    config = write_config(tmp_path / "p.yaml", values)
    chunked = ("fit.chunk_size=7", f"run_dir={tmp_path / 'chunks'}")
    whole = start(tmp_path, "pretrain.train", config, f"run_dir={tmp_path / 'whole'}")
    all_ok([whole, start(tmp_path, "pretrain.train", config, *chunked, processes=processes)])
    check_same_run(tmp_path / "whole", tmp_path / "chunks", count=5)
