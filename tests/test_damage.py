"""Every file that mmctr writes, damaged in every way: one line that names the file, or the same answer as before."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from mmctr.data.embeddings import EmbeddingTable
from mmctr.data.prepare import open_dataset, prepare
from mmctr.files import fingerprint
from mmctr.reports.run import read_predictions
from mmctr.retrieval.codebooks import Codebooks
from mmctr.retrieval.index import ItemIndex
from mmctr.retrieval.semantic_ids import semantic_ids
from mmctr.run_folder import RunFolder
from mmctr.tasks import PretrainTask, RankingTask
from mmctr.training.checkpoints import Checkpoints
from mmctr.training.optimizers import OptimizerConfig, make_optimizer
from tests.helpers.damage import rewrite
from tests.helpers.training import Slope, run_fit


def _tensors(state: dict[str, Any]) -> str:
    return fingerprint(*(part for name, value in sorted(state.items()) for part in (name, value.numpy().tobytes())))


def read_prepared(folder: Path) -> Any:
    dataset = open_dataset(folder)
    log = dataset.interactions
    columns = [getattr(log, name).tobytes() for name in log.NAMES]
    tables = [dataset.catalog.table, dataset.users, dataset.context]
    return fingerprint(*columns, *(table.to_pydict() for table in tables), dataset.report, str(dataset.catalog.root))


def read_embeddings(folder: Path) -> Any:
    table = EmbeddingTable.read(folder)
    return fingerprint(table.vectors.tobytes(), table.ids.to_pylist(), table.titles, table.identity.to_json())


def read_index(folder: Path) -> Any:
    index = ItemIndex.load(folder)
    scores, rows = index.nearest(index.vectors(np.arange(5)), k=5)
    found = index.items.take(rows[0]).to_pylist()
    return fingerprint(scores.tobytes(), rows.tobytes(), found, index.measured, index.identity.to_json())


def read_pretrain(folder: Path) -> Any:
    run = RunFolder(folder)
    task = PretrainTask.load(folder)
    return fingerprint(
        _tensors(task.state_dict()),
        task.config.model_dump(mode="json"),
        task.encoder.tokenize(["red shoe"]).tolist(),
        run.read_config(),
        run.read_metrics(),
    )


def read_ranker(folder: Path) -> Any:
    run = RunFolder(folder)
    task = RankingTask.load(folder)
    vocabulary = task.vocabulary
    predictions = read_predictions(folder)
    return fingerprint(
        _tensors(task.state_dict()),
        task.config.model_dump(mode="json"),
        [vocabulary.item_ids.to_pylist(), vocabulary.user_ids.to_pylist(), vocabulary.clicks.tolist()],
        None if vocabulary.trees is None else vocabulary.trees.model,
        None if task.catalog_ids is None else task.catalog_ids.to_pylist(),
        None if predictions is None else predictions.to_pydict(),
        run.read_config(),
        run.read_metrics(),
    )


def read_checkpoint(folder: Path) -> Any:
    task = Slope()
    checkpoints = Checkpoints(folder, "a")
    state = checkpoints.load(task, make_optimizer(task, OptimizerConfig()))
    loaded = _tensors(task.state_dict())
    checkpoints.load_best(task)
    return fingerprint(loaded, _tensors(task.state_dict()), state)


READERS: dict[str, Callable[[Path], Any]] = {
    "prepared": read_prepared,
    "embeddings": read_embeddings,
    "index": read_index,
    "pretrain": read_pretrain,
    "table": read_ranker,
    "joint": read_ranker,
    "trees": read_ranker,
    "checkpoints": read_checkpoint,
}
LEFT_OUT = (".lock", "log.jsonl", "checkpoints/", "pictures-", "tokens-", "features-")
"""files of a folder that other tests damage: the log, whose last line may be half, checkpoints, and caches"""


@pytest.fixture(scope="module")
def folders(runs, toy_folder, tmp_path_factory) -> dict[str, Path]:
    """A copy of each kind of folder that mmctr writes."""
    base = tmp_path_factory.mktemp("damage")
    prepare(toy_folder, base / "prepared")
    run_fit(Slope(), base / "fit", lambda task: task.level, epochs=1, checkpoint_every=1)
    shutil.copytree(base / "fit" / "checkpoints", base / "checkpoints")
    for name in READERS:
        if not (base / name).exists():
            shutil.copytree(runs / name, base / name)
    return {name: base / name for name in READERS}


def files_of(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in files if not path.relative_to(folder).as_posix().startswith(LEFT_OUT)]


def damages(path: Path) -> Iterator[str]:
    """Damage a file in one way after another, and put the file back after each."""
    whole = path.read_bytes()
    size = len(whole)
    contents = {
        "empty": b"",
        "cut in half": whole[: size // 2],
        "last byte lost": whole[:-1],
        "longer": whole + b"\0" * 8,
        "other content": b"hello",
        "zeros": bytes(size),
    }
    for where in np.random.default_rng(size).integers(0, size, 6).tolist():
        contents[f"byte {where} flipped"] = whole[:where] + bytes([whole[where] ^ 0x10]) + whole[where + 1 :]
    try:
        for name, content in contents.items():
            path.write_bytes(content)
            yield name
        path.unlink()
        yield "missing"
        path.mkdir()
        yield "a folder"
        path.rmdir()
        os.mkfifo(path)
        yield "a pipe"
    finally:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.write_bytes(whole)


@pytest.mark.parametrize("kind", READERS)
def test_damaged_files_are_named_or_change_nothing(kind, folders):
    folder, read = folders[kind], READERS[kind]
    before = read(folder)
    outcomes: Counter[str] = Counter()
    for path in files_of(folder):
        for damage in damages(path):
            try:
                after = read(folder)
            except ValueError as error:
                message = str(error)
                assert "\n" not in message, f"{path}, {damage}: more than one line: {message}"
                assert str(folder) in message, f"{path}, {damage}: names no file: {message}"
                outcomes["refused"] += 1
            else:
                assert after == before, f"{path}, {damage}: another answer without a word"
                outcomes["same answer"] += 1
    assert read(folder) == before
    print(kind, dict(outcomes))
    assert outcomes["refused"] > 3 * outcomes["same answer"]


STRANGE: list[Any] = [None, -1, 0.5, "x", [], {}, [[]], {"a": 1}, True]
"""values that a stranger may write in place of any other"""


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys that lead to each value inside nested lists and mappings; of a long list the first two."""
    if place:
        yield place
    parts = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, part in parts:
        yield from places(part, (*place, key))


def put(values: Any, place: tuple[Any, ...], new: Any) -> Any:
    """The values with another value at a place."""
    if not place:
        return new
    copy = dict(values) if isinstance(values, dict) else list(values)
    copy[place[0]] = put(copy[place[0]], place[1:], new)
    return copy


def manifest_of(folder: Path) -> Path | None:
    names = ("prepared.json", "manifest.json", "index.json", "task.json")
    return next((folder / name for name in names if (folder / name).is_file()), None)


@pytest.mark.parametrize("kind", [kind for kind in READERS if kind != "checkpoints"])
def test_values_of_strangers_are_named(kind, folders):
    """A stranger computes the digests anew: then the types and ranges of the values themselves are checked."""
    folder, read = folders[kind], READERS[kind]
    manifest = manifest_of(folder)
    assert manifest is not None
    random = np.random.default_rng(0)
    outcomes: Counter[str] = Counter()
    for path in (path for path in files_of(folder) if path.suffix == ".json"):
        text, kept = path.read_text(), manifest.read_text()
        values = json.loads(text)
        values.pop("digests", None)
        every = [*places(values)]
        chosen = every if len(every) <= 60 else [every[i] for i in random.permutation(len(every))[:60]]
        for number, place in enumerate([(), *chosen]):
            new = STRANGE[number % len(STRANGE)]
            changed = put(values, place, new)
            if path == manifest and not isinstance(changed, dict):
                continue
            if path == manifest:
                manifest.write_text(kept)
                rewrite(manifest, lambda old, changed=changed: (old.clear(), old.update(changed)))
            else:
                path.write_text(json.dumps(changed))
                rewrite(path if path.name == "metrics.json" else manifest, {}) if isinstance(changed, dict) else None
            try:
                read(folder)
                outcomes["read"] += 1
            except ValueError as error:
                message = str(error)
                for line in message.splitlines():  # of a config a line for each wrong value
                    assert str(folder) in line, f"{path.name} {place} = {new!r}: names no file: {message}"
                outcomes["refused"] += 1
            except Exception as error:
                pytest.fail(f"{path.name} {place} = {new!r}: {type(error).__name__}: {error}")
        path.write_text(text)
        manifest.write_text(kept)
    print(kind, dict(outcomes))
    assert outcomes["refused"]


def test_an_index_on_disk_is_checked_but_for_the_vectors(folders):
    folder = folders["index"]
    whole = (folder / "items.parquet").read_bytes()
    ItemIndex.load(folder, mmap=True)
    (folder / "items.parquet").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"items\.parquet: damaged"):
        ItemIndex.load(folder, mmap=True)
    (folder / "items.parquet").write_bytes(whole)


def test_damaged_shards_are_encoded_again(runs, tmp_path):
    from mmctr.cli.main import main

    command = ["embed", str(runs / "pretrain"), "--out", str(tmp_path / "e")]
    main(command)
    before = read_embeddings(tmp_path / "e")
    (shard,) = (tmp_path / "e").glob("vectors-*")
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(bytes(content))
    main(command)
    assert read_embeddings(tmp_path / "e") == before


def test_damaged_caches_are_made_again_or_named(toy_folder, tmp_path):
    prepare(toy_folder, tmp_path / "p")

    def tokenize(texts: list[str]) -> torch.Tensor:
        return torch.tensor([[len(text), 1] for text in texts])

    def read() -> Any:
        catalog = open_dataset(tmp_path / "p").catalog
        ids, has = catalog.tokens(["title"], tokenize, "lengths")
        images, has_image = catalog.pictures(16, "shortest").take(torch.arange(len(catalog)))
        return [ids.tolist(), has.tolist(), images.tolist(), has_image.tolist()]

    before = read()
    (tokens,) = (tmp_path / "p").glob("tokens-*.npy")
    for content in (b"", b"hello", tokens.read_bytes()[:-8]):
        tokens.write_bytes(content)
        assert read() == before
    (pictures,) = (tmp_path / "p").glob("pictures-*")
    for name in ("values.npy", "index.npy", "hashes.npy"):
        whole = (pictures / name).read_bytes()
        for content in (b"", b"hello", whole[: len(whole) // 2]):
            (pictures / name).write_bytes(content)
            with pytest.raises(ValueError, match=r"damaged .*delete the folder|do not fit each other"):
                read()
        (pictures / name).write_bytes(whole)
    assert read() == before


def test_damaged_codebooks_are_named(tmp_path):
    np.savez(tmp_path / "v.npz", item_id=np.arange(300), vectors=np.random.default_rng(0).normal(size=(300, 4)))
    semantic_ids([str(tmp_path / "v.npz")], tmp_path / "sid.parquet", levels=2, codes=8)
    path = tmp_path / "sid.codebooks.safetensors"
    tensors = load_file(path)
    for change in ({"mean": tensors["mean"][:2]}, {"dims": np.array([9])}, {"level_1": np.zeros((8, 3), "f4")}):
        save_file(tensors | change, path, {"format": "mmctr codebooks 1"})
        with pytest.raises(ValueError, match=r"codebooks\.safetensors: .*(do not fit|writes)"):
            Codebooks.load(path)
    save_file({name: tensors[name] for name in tensors if name != "mean"}, path, {"format": "mmctr codebooks 1"})
    with pytest.raises(ValueError, match=r"codebooks\.safetensors: .*(without 'mean'|writes)"):
        Codebooks.load(path)
