"""The pretraining loop: pictures from disk beside the same model fed from memory, and beside open_clip's own loop.

    python benchmarks/pretraining.py [--parts loop decode embed chunks] [--rounds 3] [--items 4096]

Draws a catalog of JPEG photos (500 x 400 pixels) with titles. Contestants of `loop`: mmctr from its picture cache,
mmctr with batches that are in memory already, open_clip's training from JPEGs with one worker; the same model (a ViT of
112 pixels, width 192, 6 layers), batch, optimiser and number of threads. `decode`: pictures a second from JPEG to what
the encoder reads, beside PIL as clip-retrieval's reader does it. `embed`: items a second of `mmctr embed`, beside an
encoder fed by PIL workers. `chunks`: peak memory of a step by batch size, with and without `fit.chunk_size`.

open_clip runs in an environment of its own (`--peers`). Each run is a process of its own; rounds go by turns. Prints a
line of JSON a run, then medians and ratios, which mean something where `busy_elsewhere` is near 0.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rankers import HERE, run
from stopwatch import Memory, Stopwatch

MODEL: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 112, "patch_size": 16, "width": 192, "layers": 6, "head_width": 64},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 4},
}
WORDS = ["red", "blue", "green", "striped", "plain", "cotton", "wool", "long", "short", "shirt", "coat", "hat", "bag"]


def draw_catalog(folder: Path, num_items: int) -> None:
    """Smooth noise with edges: JPEGs of the size and the decoding cost of photos."""
    import pyarrow as pa
    import pyarrow.parquet
    from PIL import Image

    (folder / "images").mkdir(parents=True)
    titles = []

    def draw(number: int) -> None:
        rng = np.random.default_rng(number)
        small = rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)
        photo = np.asarray(Image.fromarray(small).resize((500, 400), Image.Resampling.BICUBIC)).astype(np.int16)
        photo = np.clip(photo + rng.integers(-12, 12, photo.shape), 0, 255).astype(np.uint8)
        Image.fromarray(photo).save(folder / "images" / f"{number}.jpg", quality=90)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(draw, range(num_items)))
    rng = np.random.default_rng(0)
    for _ in range(num_items):
        titles.append(" ".join(rng.choice(WORDS, 5)))
    paths = [f"images/{number}.jpg" for number in range(num_items)]
    table = pa.table({"item_id": list(range(num_items)), "title": titles, "image": paths})
    pyarrow.parquet.write_table(table, folder / "items.parquet")
    lines = ["filepath\ttitle", *(f"{folder / path}\t{title}" for path, title in zip(paths, titles, strict=True))]
    (folder / "items.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def ours(options: argparse.Namespace, **fit_values: Any) -> tuple[Any, ...]:
    """What `pretrain.train` runs: task, data and settings."""
    import torch

    from mmctr.data.splits import ColdItemsSplit
    from mmctr.runs.config import DataConfig
    from mmctr.runs.content import item_content, open_data
    from mmctr.runs.launch import keep_heap, make_accelerator
    from mmctr.runs.pretrain_data import PretrainData
    from mmctr.tasks import PretrainTask, PretrainTaskConfig
    from mmctr.training.fit import FitConfig

    keep_heap()
    torch.manual_seed(0)
    config = FitConfig.parse(
        {
            "epochs": options.epochs,
            "batch_size": options.batch_size,
            "optimizer": {"lr": 5e-4, "weight_decay": 0.2},
            "max_grad_norm": None,
            "evaluations": 0.01,
            "log_every": 100,
            "checkpoint_every": 1_000_000,
            **fit_values,
        }
    )
    folder = Path(tempfile.mkdtemp())
    accelerator = make_accelerator(config, folder)
    task = PretrainTask(PretrainTaskConfig.parse({"encoder": {"name": "openclip", "architecture": MODEL}}))
    data_config = DataConfig(path=str(options.data))
    dataset = open_data(data_config, accelerator)
    content = item_content(dataset, data_config, task, accelerator)
    given: dict[str, Any] = {"validation": 0.01, "attributes": [], "seed": 0, "same": ["text", "image"]}
    data = PretrainData.make(dataset, content, task, ColdItemsSplit(), source=str(options.data), **given)
    return task, data, config, folder, accelerator


def train_on(task: Any, train: Any, config: Any, folder: Path, accelerator: Any) -> None:
    """`fit` without evaluation."""
    from mmctr.run_folder import RunFolder
    from mmctr.training.context import RunContext
    from mmctr.training.fit import fit

    fit(
        task,
        train,
        config,
        RunContext(RunFolder(folder), accelerator, 0, ""),
        evaluate=lambda: {"none": 0.0},
        primary="none",
    )


def run_loop(options: argparse.Namespace) -> None:
    """`fit` on the catalog: from disk, or with batches that are there already."""
    task, data, config, folder, accelerator = ours(options, num_workers=options.workers)
    train = data.batches(config.batch_size, config.num_workers, 0, 1)
    if options.contestant == "mmctr, from memory":
        collate = data.collator()
        ready = [
            collate(np.arange(n, n + config.batch_size)) for n in range(0, 8 * config.batch_size, config.batch_size)
        ]
        train.iterate = lambda start, stop: ((step, ready[step % 8]) for step in range(start, stop))
    clock = Stopwatch(config.batch_size)
    train_on(task, train, config, folder, accelerator)
    clock.report(1, lambda: 0.0, contestant=options.contestant)


def run_chunks(options: argparse.Namespace) -> None:
    """Peak memory of a few steps beyond that before the first."""
    chunk = options.chunk_size or None
    task, data, config, folder, accelerator = ours(options, chunk_size=chunk)
    train = data.batches(config.batch_size, 0, 0, 1)
    config = config.model_copy(update={"epochs": 3 / train.steps_per_epoch})
    memory = Memory()
    time.sleep(1)
    before = memory.peak_mb
    train_on(task, train, config, folder, accelerator)
    print(
        json.dumps({"batch_size": config.batch_size, "chunk_size": chunk, "memory_mb": round(memory.peak_mb - before)})
    )


def rate(count: int, work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return round(count / (time.perf_counter() - began), 1)


def run_decode(options: argparse.Namespace) -> None:
    """JPEG to the encoder's pixels, one thread: ours, and PIL with open_clip's transform as clip-retrieval reads."""
    import io

    import open_clip
    import torch
    from PIL import Image

    from mmctr.data.images import decode_picture

    torch.set_num_threads(1)
    size = MODEL["vision_cfg"]["image_size"]
    files = [path.read_bytes() for path in sorted((options.data / "images").iterdir())[:400]]
    transform: Any = open_clip.image_transform(size, is_train=False)
    ways = {
        "mmctr": lambda: [decode_picture(data, size) for data in files],
        "PIL": lambda: [transform(Image.open(io.BytesIO(data)).convert("RGB")) for data in files],
    }
    print(json.dumps({name: rate(len(files), work) for name, work in ways.items()}))


def run_embed(options: argparse.Namespace) -> None:
    """Pictures and titles to vectors: from the picture cache, the cache made first or there already; by PIL workers."""
    import open_clip
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader

    from mmctr.evaluation.predict import embed_items

    began = time.perf_counter()
    task, data, _, _, accelerator = ours(options)
    prepared = time.perf_counter() - began
    task.eval()
    rows = np.arange(len(data.keys))
    seconds = len(rows) / rate(len(rows), lambda: embed_items(task, data.content, rows, accelerator.device))
    transform: Any = open_clip.image_transform(MODEL["vision_cfg"]["image_size"], is_train=False)
    paths = [options.data / "images" / f"{row}.jpg" for row in rows]
    encode, ids = task.encoder, data.content.texts[0].input_ids

    class Photos(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, row: int) -> Any:
            return transform(Image.open(paths[row]).convert("RGB")), ids[row].long()

    @torch.inference_mode()
    def theirs() -> None:
        for images, tokens in DataLoader(Photos(), batch_size=256, num_workers=options.workers or 1):  # type: ignore[arg-type]
            encode.model.encode_image(images)
            encode.model.encode_text(tokens)

    numbers = {
        "mmctr, cache there": round(len(rows) / seconds, 1),
        "mmctr, cache made": round(len(rows) / (seconds + prepared), 1),
        "PIL workers": rate(len(rows), theirs),
    }
    print(json.dumps(numbers))


def loop_contestants(options: argparse.Namespace, python: Path, folder: Path) -> dict[str, Callable[[], dict]]:
    common = ["--data", str(options.data), "--batch-size", str(options.batch_size), "--epochs", str(options.epochs)]
    mine = [sys.executable, __file__, "--part", "loop", *common]
    names = {"mmctr": ["--workers", "0"], "mmctr, one worker": ["--workers", "1"], "mmctr, from memory": []}
    result: dict[str, Callable[[], dict]] = {}
    for name, more in names.items():
        command = [*mine, "--contestant", name, *more]
        result[name] = lambda command=command: run(command)
    (folder / "bench.json").write_text(json.dumps(MODEL), encoding="utf-8")
    theirs = [str(python), str(HERE / "openclip.py"), *common, "--model", str(folder / "bench.json")]
    result["open_clip"] = lambda: run(theirs)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["decode", "embed", "loop", "chunks"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--items", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--peers", type=Path, default=HERE / ".peers", help="open_clip's environment")
    for name in ("--part", "--contestant"):
        parser.add_argument(name, default="", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--chunk-size", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        parts = {"loop": run_loop, "decode": run_decode, "embed": run_embed, "chunks": run_chunks}
        return parts[options.part](options)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["MMCTR_CACHE"] = str(folder / "cache")
        options.data = folder / "catalog"
        draw_catalog(options.data, options.items)
        mine = [sys.executable, __file__, "--data", str(options.data)]
        for part in (part for part in ("decode", "embed") if part in options.parts):
            found = run([*mine, "--part", part, "--workers", "1"])
            print(json.dumps({"part": part, **found}), flush=True)
        if "loop" in options.parts:
            python = options.peers / "bin" / "python"
            if not python.is_file():
                subprocess.run([sys.executable, "-m", "venv", str(options.peers)], check=True)
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", "open_clip_torch[training]"], check=True)
            chosen = loop_contestants(options, python, folder)
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
            for _ in range(options.rounds):
                for contestant, make in chosen.items():
                    runs[contestant].append(make())
                    print(json.dumps({"part": "loop", **runs[contestant][-1], "contestant": contestant}), flush=True)
            print(json.dumps(summary(runs), indent=2), flush=True)
        if "chunks" in options.parts:
            for chunk in (0, 64):
                for size in (128, 256, 512):
                    command = [*mine, "--part", "chunks", "--batch-size", str(size), "--chunk-size", str(chunk)]
                    print(json.dumps({"part": "chunks", **run(command)}), flush=True)


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians, and ratios to the loop fed from memory and to open_clip's."""
    names = ("train_rows_per_s", "peak_memory_mb", "busy_elsewhere")
    result: dict[str, Any] = {
        name: {key: statistics.median(run[key] for run in some) for key in names} for name, some in runs.items()
    }
    for base in ("mmctr, from memory", "open_clip"):
        for numbers in result.values():
            numbers[f"rate of {base}"] = round(numbers["train_rows_per_s"] / result[base]["train_rows_per_s"], 2)
    return result


if __name__ == "__main__":
    main()
