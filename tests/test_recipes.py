"""Killed and started again, a run ends bit for bit where it would have ended; mistakes are one line on stderr."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from mmctr.data.embeddings import EmbeddingTable
from mmctr.locks import LOCK
from tests.helpers.tiny import Run, all_ok, finetune_values, log_lines, losses, pretrain_values, start, write_config
from tests.helpers.worlds import log_columns, write_dataset

pytestmark = pytest.mark.slow

FILES = ("model.safetensors", "metrics.json", "config.yaml")


@pytest.fixture(scope="module")
def done(toy_folder, tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Recipe name -> its config and the folder of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("done")
    result = {}
    joint = {"name": "encoder", "run": str(folder / "pretrain"), "max_encoded": 9, "dim": 8, "hidden": [8]}
    rows = finetune_values(toy_folder, optimizer={"lr": 1e-2, "rows_from": 0})
    behavior = pretrain_values(
        toy_folder,
        objectives={"clip": {}, "behavior": {"hard_negatives": True}},
        queue={"size": 40, "momentum": 0.5},
        matryoshka=[8],
    )
    behavior["data"]["text_fields"] = {"description": 0.5}
    configs = {
        "pretrain": pretrain_values(toy_folder),
        "behavior": behavior,
        "stream": streamed(toy_folder, folder / "shards"),
        "id": finetune_values(toy_folder),
        "rows": rows | {"task": rows["task"] | {"ranker": {"name": "dien", "mlp": [16]}}},
        "joint": comparing(finetune_values(toy_folder, joint, epochs=1, evaluations=2)),
        "trees": rows
        | {"task": rows["task"] | {"ranker": {"name": "gbdt_lr", "trees": {"num_trees": 8, "min_rows": 5}}}},
    }
    for part in (("pretrain", "behavior"), ("stream", "id"), ("rows", "joint"), ("trees",)):  # joint reads pretrain
        running = []
        for name in part:
            config = write_config(folder / f"{name}.yaml", configs[name])
            running.append(start(folder, recipe(name), config, f"run_dir={folder / name}"))
            result[name] = (config, folder / name)
        all_ok(running)
    return result


def comparing(values: dict) -> dict:
    """With every other way to use content: each keeps something outside of its weights, or reads the kept table."""
    values["task"]["embedder"] |= {"fusion": "gate"}
    values["task"]["ranker"] |= {"weights": "softmax", "content_attention": True}
    values["task"]["simtier"] = {"tiers": 10}
    return values


def streamed(dataset: Path, folder: Path) -> dict:
    """The config of a run on the same items in three shards of small row groups, windows of a few of them."""
    items = pyarrow.parquet.read_table(dataset / "items.parquet")
    pictures = [
        (dataset / path).read_bytes() if path and (dataset / path).is_file() else None
        for path in items["image"].to_pylist()
    ]
    items = items.set_column(items.column_names.index("image"), "image", pa.array(pictures, pa.binary()))
    folder.mkdir()
    for number, first in enumerate(range(0, len(items), 45)):
        pyarrow.parquet.write_table(items.slice(first, 45), folder / f"{number}.parquet", row_group_size=12)
    values = pretrain_values(folder)
    values["data"]["stream"] = {"buffer_rows": 30}
    values["task"]["head"] = {"name": "factor_vae", "dim": 4, "hidden": [8], "discriminator": [8]}
    return values


def test_a_streamed_run_embeds_all_its_shards(done, tmp_path):
    """Vectors of every item by its id, those of the run's encoder on the prepared dataset."""
    _, run = done["stream"]
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["items"] == 120 and "no picture" in metrics["rejected_pictures"]
    assert {"text_to_image_R@1", "neighbours_share_factor_shape"} <= metrics["validation"].keys()
    data = json.loads(done["pretrain"][0].read_text())["data"]["path"]
    embed = ("mmctr", "embed", run, "--out")
    streamed = start(tmp_path, *embed, tmp_path / "streamed", "--shard-size", 50)
    all_ok([streamed, start(tmp_path, *embed, tmp_path / "prepared", "--data", data)])
    one, two = EmbeddingTable.read(tmp_path / "streamed"), EmbeddingTable.read(tmp_path / "prepared")
    assert one.ids.equals(two.ids) and len(one) > 110
    np.testing.assert_allclose(one.vectors, two.vectors, atol=1e-6)
    again = start(tmp_path, "mmctr", "evaluate", run).ok()
    assert json.loads(again)["validation"] == pytest.approx(metrics["validation"], abs=1e-6)


def recipe(name: str) -> str:
    return "pretrain.train" if name in ("pretrain", "behavior", "stream") else "finetune.train"


def check_same_files(run: Path, reference: Path) -> None:
    for name in FILES[:2]:
        assert (run / name).read_bytes() == (reference / name).read_bytes(), name
    steps = [line["step"] for line in log_lines(run) if "loss" in line]
    assert steps == [line["step"] for line in log_lines(reference) if "loss" in line]
    assert losses(run) == losses(reference)  # every step is logged
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert len(left) == 2 and left[0] == "best", left


def wait_until(condition: Callable[[], bool], run: Run) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, run.text
        assert run.processes[0].is_alive(), run.text
        time.sleep(0.001)


# the 4th rename is in the first checkpoints, the 9th amid training, the last ones at its end
@pytest.mark.parametrize(
    ("name", "rename"),
    [
        *((name, rename) for name in ("pretrain", "id", "rows", "joint") for rename in (4, 9, 16)),
        ("behavior", 9),
        ("stream", 9),
    ],
)
def test_a_killed_run_started_again_ends_bit_for_bit_the_same(done, tmp_path, name, rename):
    config, reference = done[name]
    arguments = (recipe(name), config, f"run_dir={tmp_path / 'run'}")
    first = start(tmp_path, *arguments, kill_at_rename=rename)
    assert first.wait() == -9, first.text
    assert not (tmp_path / "run" / "metrics.json").exists()
    start(tmp_path, *arguments).ok()
    check_same_files(tmp_path / "run", reference)


@pytest.mark.parametrize("name", ["pretrain", "joint"])
def test_a_run_killed_again_and_again_gets_there(done, tmp_path, name):
    config, reference = done[name]
    codes = []
    while not codes or codes[-1]:
        # later and later, because the end of a run takes more renames than a step
        arguments = (recipe(name), config, f"run_dir={tmp_path / 'run'}")
        run = start(tmp_path, *arguments, kill_at_rename=8 + 2 * len(codes))
        codes.append(run.wait())
        assert codes[-1] in (0, -9) and len(codes) < 12, run.text
    assert len(codes) > 2
    check_same_files(tmp_path / "run", reference)


def test_a_run_killed_between_two_steps_resumes(done, tmp_path):
    """The clock decides where: somewhere after the sixth logged step."""
    config, reference = done["id"]
    arguments = ("finetune.train", config, f"run_dir={tmp_path / 'run'}")
    log, run = tmp_path / "run" / "log.jsonl", start(tmp_path, *arguments)
    wait_until(lambda: log.is_file() and log.read_text().count("\n") >= 6, run)
    run.kill()
    start(tmp_path, *arguments).ok()
    check_same_files(tmp_path / "run", reference)


def test_a_run_killed_after_its_trees_were_grown_keeps_them(done, tmp_path):
    config, reference = done["trees"]
    arguments = ("finetune.train", config, f"run_dir={tmp_path / 'run'}")
    assert start(tmp_path, *arguments, kill_at_rename=4).wait() == -9
    grown = (tmp_path / "run" / "trees.json").stat().st_mtime_ns
    start(tmp_path, *arguments).ok()
    assert (tmp_path / "run" / "trees.json").stat().st_mtime_ns == grown
    check_same_files(tmp_path / "run", reference)


def test_a_run_killed_while_it_learns_cold_ids_or_warms_items_up_goes_on(toy_folder, tmp_path):
    values = finetune_values(toy_folder, epochs=0.5, checkpoint_every=50)
    values["split"] = {"name": "staged", "new": 0.3, "rows": 2, "test_rows": 2}
    values["task"]["features"] = {"item": {"brand": {"name": "categorical", "dim": 4}}}
    values["task"]["embedder"]["cold_ids"] = {"name": "mwuf", "hidden": [8], "validation": 0.3}
    values["cold_fit"] = {"epochs": 1, "batch_size": 96, "checkpoint_every": 2, "log_every": 1}
    config = write_config(tmp_path / "config.yaml", values)
    start(tmp_path, "finetune.train", config, f"run_dir={tmp_path / 'whole'}").ok()
    arguments, log = (
        ("finetune.train", config, f"run_dir={tmp_path / 'run'}"),
        tmp_path / "run" / "cold_ids" / "log.jsonl",
    )
    run = start(tmp_path, *arguments)
    wait_until(lambda: log.is_file() and log.read_text().count("\n") >= 3, run)
    run.kill()
    run = start(tmp_path, *arguments)
    wait_until(lambda: (tmp_path / "run" / "checkpoints" / "warm_a").is_dir(), run)
    run.kill()
    start(tmp_path, *arguments).ok()
    for name in ("model.safetensors", "metrics.json", "stages.parquet"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize("name", ["pretrain", "behavior", "stream", "joint", "trees"])
def test_a_run_with_workers_killed_between_two_steps_resumes(done, tmp_path, name):
    """Processes that collate ahead change no number, and what they had ready is made again."""
    config, reference = done[name]
    arguments = (recipe(name), config, f"run_dir={tmp_path / 'run'}", "fit.num_workers=2")
    log, run = tmp_path / "run" / "log.jsonl", start(tmp_path, *arguments)
    wait_until(lambda: log.is_file() and log.read_text().count("\n") >= 4, run)
    run.kill()
    start(tmp_path, *arguments).ok()
    check_same_files(tmp_path / "run", reference)


def test_a_run_killed_while_preparing_its_data_goes_on(done, tmp_path, monkeypatch):
    """Tables, pictures and tokens are made once into the cache; each is there whole or not at all."""
    config, reference = done["pretrain"]
    monkeypatch.setenv("MMCTR_CACHE", str(tmp_path / "cache"))
    arguments = ("pretrain.train", config, f"run_dir={tmp_path / 'run'}")
    made = []
    for rename in range(1, 6):
        killed = start(tmp_path, *arguments, kill_at_rename=rename)
        assert killed.wait() == -9, killed.text
        made.append(sorted(p.name for p in (tmp_path / "cache").rglob("*") if not p.name.startswith(".")))
    assert not (tmp_path / "run" / "checkpoints").exists() and len(made[0]) < len(made[-1])
    start(tmp_path, *arguments).ok()
    check_same_files(tmp_path / "run", reference)


@pytest.mark.parametrize("name", ["pretrain", "id"])
def test_a_finished_run_started_again_ends_the_same(done, tmp_path, name):
    config, reference = done[name]
    shutil.copytree(reference, tmp_path / "run")
    for file in FILES[:2]:
        (tmp_path / "run" / file).unlink()
    start(tmp_path, recipe(name), config, f"run_dir={tmp_path / 'run'}").ok()
    check_same_files(tmp_path / "run", reference)


def test_a_killed_export_goes_on(done, tmp_path):
    _, run = done["pretrain"]
    arguments = ("mmctr", "embed", run, "--shard-size", 16, "--out")
    renames = (1, 4, 9, 10)  # begun.json, a shard, the last shard, items.parquet
    outs = [tmp_path / f"killed-{rename}" for rename in renames]
    start(tmp_path, *arguments, tmp_path / "whole").ok()  # first, so that the caches are there for the others
    killed = [start(tmp_path, *arguments, out, kill_at_rename=n) for n, out in zip(renames, outs, strict=True)]
    assert [run.wait() for run in killed] == [-9] * 4
    times = [{path: path.stat().st_mtime_ns for path in out.glob("vectors-*")} for out in outs]
    for out in outs:
        with pytest.raises(ValueError, match="not a finished embedding folder"):
            EmbeddingTable.read(out)
    all_ok([start(tmp_path, *arguments, out) for out in outs])
    names = {path.name for path in (tmp_path / "whole").iterdir() if path.name != LOCK}
    for rename, out, before in zip(renames, outs, times, strict=True):
        assert {path: path.stat().st_mtime_ns for path in before} == before and len(before) == max(rename - 2, 0)
        assert names <= {path.name for path in out.iterdir()} and len(names) == 10
        for file in names:
            assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


def check_mistake(run: Run, *words: str) -> None:
    """One line of `error: ...` on stderr and exit code 1."""
    assert run.wait() == 1, run.text
    assert "Traceback" not in run.text
    assert len(run.errors) == 1 and run.errors[0].startswith("error: "), run.text
    for word in words:
        assert word in run.errors[0], run.errors[0]


def test_the_folder_of_another_config_is_refused(done, tmp_path):
    for name, key in (("pretrain", "fit.optimizer.lr"), ("id", "task.embedder.id_dropout")):
        config, run = done[name]
        before = {file: (run / file).read_bytes() for file in FILES}
        refused = start(tmp_path, recipe(name), config, f"run_dir={run}", f"{key}=0.3")
        check_mistake(refused, key, "0.3 now", "run_dir")
        assert {file: (run / file).read_bytes() for file in FILES} == before


def test_a_checkpoint_of_another_config_is_refused(done, tmp_path):
    config, run = done["id"]
    shutil.copytree(run / "checkpoints", tmp_path / "run" / "checkpoints")
    refused = start(tmp_path, "finetune.train", config, f"run_dir={tmp_path / 'run'}", "seed=5")
    check_mistake(refused, "checkpoint", "another config or dataset", str(tmp_path / "run"))


def test_a_moved_run_goes_on(done, tmp_path):
    config, run = done["id"]
    shutil.copytree(run, tmp_path / "moved")
    start(tmp_path, "finetune.train", config, f"run_dir={tmp_path / 'moved'}").ok()
    check_same_files(tmp_path / "moved", run)


def test_mistakes_are_one_line(done, toy_folder, tmp_path):
    config, _ = done["id"]
    run_dir = f"run_dir={tmp_path / 'run'}"
    mistakes = {
        ("finetune.train", config, run_dir, "task.ranker.atention=[4]"): ("task.ranker.atention", "'attention'"),
        ("finetune.train", config, run_dir, "fit.batch_size=0"): ("fit.batch_size", "given 0"),
        ("finetune.train", tmp_path / "none.yaml"): ("none.yaml", "no such config file"),
        ("pretrain.train", config, run_dir): ("unknown key 'task.embedder'",),
    }
    for number, (command, words) in enumerate(mistakes.items()):
        if command[0] == "pretrain.train":
            run = start(tmp_path / str(number), *command)
            assert run.wait() == 1 and words[0] in run.text and "Traceback" not in run.text
        else:
            check_mistake(start(tmp_path / str(number), *command), *words)
    assert not (tmp_path / "run").exists()
    values = json.loads(config.read_text())
    late = {
        ("data.path=/nowhere",): ("/nowhere",),
        ("fit.batch_size=100000",): ("batch_size=100000", "training rows"),
        ("fit.optimizer.groups.rankr.lr=1",): ("rankr", "ranker"),
        ("task.embedder.fusion=sum", "task.embedder.content={name: table, path: /no.npz}"): ("/no.npz",),
        ("task.embedder.content={name: encoder, run: /nowhere}",): ("/nowhere", "task.json"),
        ("primary=gauc_cold", "split={name: temporal}"): ("gauc_cold",),
    }
    assert values["fit"]["batch_size"] == 96
    for number, (overrides, words) in enumerate(late.items()):
        folder = tmp_path / f"late-{number}"
        check_mistake(start(folder, "finetune.train", config, f"run_dir={folder / 'run'}", *overrides), *words)


@pytest.mark.parametrize("label", [0, 1])
def test_labels_of_one_kind_are_refused(tmp_path, label):
    rows = [(user, item, user + 20 * time, label) for user in range(20) for time, item in enumerate("abcdefgh")]
    data = write_dataset(tmp_path / "d", {"item_id": list("abcdefgh"), "title": ["x"] * 8}, log_columns(rows))
    config = write_config(tmp_path / "c.yaml", finetune_values(data, batch_size=16) | {"split": {"name": "temporal"}})
    run = start(tmp_path, "finetune.train", config, f"run_dir={tmp_path / 'run'}")
    check_mistake(run, f"all training labels are {label}", "clicks", str(data))


@pytest.mark.parametrize("name", ["pretrain", "id"])
def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_goes_on(done, tmp_path, name):
    config, reference = done[name]
    arguments = (recipe(name), config, f"run_dir={tmp_path / 'run'}")
    killed = start(tmp_path, *arguments, kill_at_rename=11)
    assert killed.wait() == -9
    checkpoints = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert len(checkpoints) >= 1
    before = {path.name: path.read_bytes() for path in checkpoints[-1].iterdir()}
    size = max(len(content) for content in before.values())
    full = start(tmp_path, *arguments, file_limit=size // 2)
    check_mistake(full, "cannot ", str(tmp_path / "run" / "checkpoints"), "Free some space")
    assert {path.name: path.read_bytes() for path in checkpoints[-1].iterdir()} == before
    start(tmp_path, *arguments).ok()
    check_same_files(tmp_path / "run", reference)


def test_the_run_folder_says_all(done):
    for name in ("pretrain", "id", "joint"):
        _, run = done[name]
        metrics = json.loads((run / "metrics.json").read_text())
        assert metrics["training"]["steps"] == log_lines(run)[-1]["step"] > 5
        assert (run / "checkpoints" / "best" / "task.safetensors").is_file()
    predictions = pyarrow.parquet.read_table(done["id"][1] / "predictions.parquet")
    metrics = json.loads((done["id"][1] / "metrics.json").read_text())
    assert len(predictions) == metrics["test"]["all"]["num_impressions"] > 100
    assert sum(predictions["cold"].to_pylist()) == metrics["test"]["cold"]["num_impressions"] > 10
