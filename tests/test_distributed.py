"""Two processes with the same global batch do what one process does: losses, gradients, weights, vectors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from mmctr.embeddings import EmbeddingTable
from mmctr.losses import clip_loss, siglip_loss
from mmctr.rankers.layers import Dice
from tests.tiny import CLONE, finetune_values, free_port, log_lines, losses, pretrain_values, start, write_config

pytestmark = pytest.mark.slow

WORKER = """
import sys, torch, torch.distributed as dist, torch.nn.functional as F
from mmctr.losses import clip_loss, siglip_loss, gather_rows
from mmctr.rankers.layers import Dice

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
given = torch.load(sys.argv[1], weights_only=True)
result = {}
rows = slice(rank * 5, rank * 5 + 5)
for name in ("clip", "siglip"):
    image, text = (given[part].clone().requires_grad_() for part in ("image", "text"))
    scale, bias = torch.tensor(7.0, requires_grad=True), torch.tensor(-3.0, requires_grad=True)
    pair = F.normalize(image[rows], dim=1), F.normalize(text[rows], dim=1)
    ids = given["ids"][rows]
    loss = clip_loss(*pair, scale, ids) if name == "clip" else siglip_loss(*pair, scale, bias, ids)
    loss.backward()
    # data-parallel training averages values and gradients over processes
    bias_grad = torch.zeros(()) if bias.grad is None else bias.grad
    for part, value in {"loss": loss.detach(), "image": image.grad, "text": text.grad, "scale": scale.grad,
                        "bias": bias_grad}.items():
        value = value.clone()
        dist.all_reduce(value)
        result[f"{name} {part}"] = value / world
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
result["gathered"] = gather_rows(given["ids"][rows])
if rank == 0:
    torch.save(result, sys.argv[2])
dist.destroy_process_group()
"""


def torchrun(*arguments: object) -> None:
    """Two processes, started as a user starts them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CLONE)}
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
    given = {name: torch.randn(10, 4, generator=generator) for name in ("image", "text", "x", "w")}
    given["ids"] = torch.tensor([0, 1, 2, 3, 4, 1, 6, 6, 8, 0])  # copies within and across processes
    torch.save(given, tmp_path / "given")
    (tmp_path / "worker.py").write_text(WORKER)
    torchrun(tmp_path / "worker.py", tmp_path / "given", tmp_path / "result")
    result = torch.load(tmp_path / "result", weights_only=True)
    assert result["gathered"].tolist() == given["ids"].tolist()
    for name in ("clip", "siglip"):
        image, text = (given[part].clone().requires_grad_() for part in ("image", "text"))
        scale, bias = torch.tensor(7.0, requires_grad=True), torch.tensor(-3.0, requires_grad=True)
        pair = F.normalize(image, dim=1), F.normalize(text, dim=1)
        ids = given["ids"]
        loss = clip_loss(*pair, scale, ids) if name == "clip" else siglip_loss(*pair, scale, bias, ids)
        loss.backward()
        expected = {"loss": loss.detach(), "image": image.grad, "text": text.grad, "scale": scale.grad}
        if name == "siglip":
            expected["bias"] = bias.grad
        for part, value in expected.items():
            torch.testing.assert_close(result[f"{name} {part}"], value, rtol=1e-5, atol=1e-6, msg=f"{name} {part}")
    dice = Dice(4)
    torch.nn.init.constant_(dice.alpha, 0.3)
    x = given["x"].clone().requires_grad_()
    (dice(x) * given["w"]).sum().backward()
    for share in (3, 10):
        expected = {"x": x.grad, "alpha": dice.alpha.grad, "mean": dice.running_mean, "var": dice.running_var}
        for part, value in expected.items():
            torch.testing.assert_close(result[f"dice {share} {part}"], value, rtol=1e-4, atol=1e-5)


def test_finetuning_under_torchrun_equals_one_process(toy_folder, tmp_path):
    config = write_config(tmp_path / "f.yaml", finetune_values(toy_folder))
    start(tmp_path, "finetune.train", config, f"run_dir={tmp_path / 'one'}").ok()
    torchrun("-m", "finetune.train", config, f"run_dir={tmp_path / 'two'}")
    check_same_run(tmp_path / "one", tmp_path / "two", count=22)


@pytest.mark.parametrize("rows", ["adam", "adagrad", "ftrl"])
def test_tables_trained_by_rows_on_two_processes_equal_one(toy_folder, tmp_path, rows):
    values = finetune_values(toy_folder, epochs=1)
    values["fit"]["optimizer"] |= {"rows": rows, "rows_from": 0, "weight_decay": 0.1}
    values["task"]["features"] = {"item": {"title": {"name": "multi_valued", "separator": " ", "dim": 4}}}
    config = write_config(tmp_path / "f.yaml", values)
    for count in (1, 2):
        start(tmp_path, "finetune.train", config, f"run_dir={tmp_path / str(count)}", processes=count).ok()
    check_same_run(tmp_path / "1", tmp_path / "2", count=11)


@pytest.mark.parametrize("rows_from", [0, 10**6])
def test_mini_batch_aware_l2_on_two_processes_equals_one(toy_folder, tmp_path, rows_from):
    """Most items and users of a batch are on both processes, and each counts once."""
    values = finetune_values(toy_folder, epochs=1)
    values["fit"]["optimizer"] |= {"rows_from": rows_from}
    values["task"]["mini_batch_l2"] = 30.0
    config = write_config(tmp_path / "f.yaml", values)
    for count in (1, 2):
        start(tmp_path, "finetune.train", config, f"run_dir={tmp_path / str(count)}", processes=count).ok()
    check_same_run(tmp_path / "1", tmp_path / "2", count=11)
    terms = [[line["mini_batch_l2"] for line in log_lines(tmp_path / n) if "loss" in line] for n in ("1", "2")]
    np.testing.assert_allclose(terms[1], terms[0], rtol=1e-4)
    assert min(terms[0]) > 0.01


def test_dien_with_its_auxiliary_loss_on_two_processes_equals_one(toy_folder, tmp_path):
    values = finetune_values(toy_folder, epochs=1)
    values["task"]["ranker"] = {"name": "dien", "mlp": [16], "activation": "dice"}
    config = write_config(tmp_path / "f.yaml", values)
    for count in (1, 2):
        start(tmp_path, "finetune.train", config, f"run_dir={tmp_path / str(count)}", processes=count).ok()
    check_same_run(tmp_path / "1", tmp_path / "2", count=11)
    assert all(line["auxiliary"] > 0 for line in log_lines(tmp_path / "1") if "loss" in line)


def test_gbdt_lr_on_two_processes_equals_one(toy_folder, tmp_path):
    """One process grows the trees for both. Weights start at zero, where many a gradient is a sum that cancels, and
    Adam makes a whole step of the rounding that is left: hence the small one."""
    values = finetune_values(toy_folder, epochs=1)
    values["fit"]["optimizer"] |= {"lr": 1e-3}
    values["task"]["ranker"] = {"name": "gbdt_lr", "trees": {"num_trees": 8, "min_rows": 5}}
    config = write_config(tmp_path / "f.yaml", values)
    for count in (1, 2):
        start(tmp_path, "finetune.train", config, f"run_dir={tmp_path / str(count)}", processes=count).ok()
    check_same_run(tmp_path / "1", tmp_path / "2", count=8)
    assert (tmp_path / "1" / "trees.json").read_bytes() == (tmp_path / "2" / "trees.json").read_bytes()


def test_pretraining_with_clip_on_two_processes_equals_one(toy_folder, tmp_path):
    config = write_config(tmp_path / "p.yaml", pretrain_values(toy_folder))
    for count in (1, 2):
        start(tmp_path, "pretrain.train", config, f"run_dir={tmp_path / str(count)}", processes=count).ok()
    check_same_run(tmp_path / "1", tmp_path / "2", count=12)


@pytest.fixture(scope="module")
def pretrained(toy_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    config = write_config(folder / "p.yaml", pretrain_values(toy_folder, loss={"name": "siglip"}))
    start(folder, "pretrain.train", config, f"run_dir={folder / 'run'}").ok()
    return folder / "run"


def test_siglip_on_two_processes_equals_one(pretrained, toy_folder, tmp_path):
    config = write_config(tmp_path / "p.yaml", pretrain_values(toy_folder, loss={"name": "siglip"}))
    start(tmp_path, "pretrain.train", config, f"run_dir={tmp_path / 'two'}", processes=2).ok()
    check_same_run(pretrained, tmp_path / "two", count=12)


@pytest.mark.parametrize("history", ["encoder", "table"])
def test_joint_training_on_two_processes_equals_one(pretrained, toy_folder, tmp_path, history):
    content = {"name": "encoder", "run": str(pretrained), "history": history, "dim": 8, "hidden": [8]}
    values = finetune_values(toy_folder, content, epochs=0.5, optimizer={"lr": 3e-3})
    config = write_config(tmp_path / "f.yaml", values)
    runs = {count: tmp_path / str(count) for count in (1, 2)}
    for count, run_dir in runs.items():
        start(tmp_path, "finetune.train", config, f"run_dir={run_dir}", processes=count).ok()
    check_same_run(runs[1], runs[2], count=6)


def test_embedding_on_two_processes_equals_one(pretrained, tmp_path):
    arguments = ("mmctr", "embed", pretrained, "--shard-size", 16, "--out")
    for count in (1, 2):
        start(tmp_path, *arguments, tmp_path / str(count), processes=count).ok()
    one, two = EmbeddingTable.read(tmp_path / "1"), EmbeddingTable.read(tmp_path / "2")
    assert one.ids.equals(two.ids) and one.titles == two.titles and len(one) > 100
    np.testing.assert_array_equal(one.vectors, two.vectors)
    assert len(list((tmp_path / "2").glob("vectors-*"))) == 8
