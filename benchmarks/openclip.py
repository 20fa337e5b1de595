"""open_clip's own training loop on the benchmark's catalog; run by `pretraining.py` in an environment of its own."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import open_clip
from open_clip_train import main as open_clip_main
from stopwatch import Stopwatch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--epochs", type=float, required=True)
    parser.add_argument("--model", type=Path, required=True)
    options = parser.parse_args()
    open_clip.add_model_config(options.model)
    clock = Stopwatch(options.batch_size)
    arguments = [
        "--train-data",
        str(options.data / "items.tsv"),
        "--dataset-type",
        "csv",
        "--model",
        options.model.stem,
    ]
    arguments += ["--batch-size", str(options.batch_size), "--epochs", str(round(options.epochs)), "--workers", "1"]
    arguments += ["--lr", "5e-4", "--wd", "0.2", "--warmup", "5", "--precision", "fp32", "--device", "cpu"]
    arguments += ["--logs", tempfile.mkdtemp(), "--save-frequency", "0", "--log-every-n-steps", "100"]
    arguments += ["--local-loss", "--gather-with-grad"]
    open_clip_main.main(arguments)
    sys.stdout.flush()
    clock.report(1, lambda: 0.0, contestant="open_clip")


if __name__ == "__main__":
    main()
