"""The parser of the arguments of all commands of `mmctr`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from mmctr.cli import commands
from mmctr.cli.arguments import QueryPart, Version, parse_size, path

Commands = Any
"""the subparsers of argparse, which have no public type"""


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="mmctr", description="Multimodal item embeddings for click-through-rate ranking."
    )
    parser.add_argument("--version", action=Version, help="print the versions of mmctr and of its main dependencies")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in _COMMANDS:
        add(subparsers)
    return parser


def _command(subparsers: Commands, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    """The parser of one command, which calls `run` with the parsed arguments."""
    sub = subparsers.add_parser(name, help=text, description=text)
    sub.set_defaults(run=run)
    return sub


def _add_prepare(subparsers: Commands) -> None:
    """The arguments of `mmctr prepare`."""
    sub = _command(
        subparsers,
        "prepare",
        commands.prepare,
        "check a dataset folder once, report what was rejected and why, build caches",
    )
    sub.add_argument("dataset", type=path, help="folder with items.*, interactions.*, users.*, or with a dataset.yaml")
    sub.add_argument("--out", type=path, required=True, help="prepared folder to write; give it as data.path")
    sub.add_argument("--schema", type=path, help="description of the files, instead of the dataset.yaml in the folder")
    sub.add_argument(
        "--items", type=path, help="take the catalog from a `datasets` dataset: a name, name:split, or a saved folder"
    )
    sub.add_argument("--image-size", type=int, nargs="*", default=[], help="sides of pictures to cache now")
    sub.add_argument("--image-resize", choices=["shortest", "longest", "squash"], default="shortest")
    sub.add_argument("--config", type=path, help="a pretraining config: cache the pictures and tokens it will read")
    sub.add_argument("--threads", type=int, default=2, help="threads that decode pictures (default: 2)")


def _add_embed(subparsers: Commands) -> None:
    """The arguments of `mmctr embed`."""
    sub = _command(
        subparsers,
        "embed",
        commands.embed,
        "item vectors of a whole catalog from a pretraining run, sharded and resumable",
    )
    sub.add_argument("run_dir", type=path, metavar="RUN", help="run folder of pretrain.train")
    sub.add_argument("--data", type=path, help="dataset folder (default: the run's own)")
    sub.add_argument("--out", type=path, required=True, help="embedding folder to write")
    sub.add_argument("--modality", choices=["both", "image", "text"], default="both")
    sub.add_argument("--shard-size", type=int, default=8192, help="items a shard (default: 8192)")
    sub.add_argument("--append", action="store_true", help="encode the items that --out lacks alone")
    sub.add_argument("--index", type=path, help="with --append: add the new items to this index as well")
    sub.add_argument(
        "--precision",
        choices=["fp32", "bf16", "int8", "auto"],
        default="fp32",
        help="of the encoder (default: fp32); auto: the fastest one whose vectors stay, measured on this catalog",
    )


def _add_index(subparsers: Commands) -> None:
    """The arguments of `mmctr index`."""
    sub = _command(
        subparsers,
        "index",
        commands.index,
        "build a FAISS index, measured against exact search; or add to it, merge, remove",
    )
    sub.add_argument(
        "sources",
        type=path,
        metavar="EMB_OR_INDEX",
        nargs="+",
        help="folder of `mmctr embed`, a .parquet or an .npz file, or an index; several are merged",
    )
    sub.add_argument(
        "--out", type=path, help="index folder to write (default: EMB with .index at its end, or the INDEX itself)"
    )
    sub.add_argument("--recall", type=float, default=0.99, help="share of the ten nearest to find (default: 0.99)")
    sub.add_argument(
        "--latency-ms", type=float, default=2.0, help="exact search is kept while a query takes no longer (default: 2)"
    )
    sub.add_argument("--memory", type=parse_size, help="most the index may take, like 500MB or 4GB")
    sub.add_argument("--factory", help="FAISS factory string, like Flat or HNSW32 or IVF1024,SQ8 (default: chosen)")
    sub.add_argument("--columns", nargs="*", help="catalog columns to filter by; none named: all that can be used")
    sub.add_argument(
        "--data", type=path, help="dataset folder of these columns and of titles (default: the one embedded)"
    )
    sub.add_argument("--append", action="store_true", help="add the items of EMB that --out does not hold yet")
    sub.add_argument("--remove", nargs="+", metavar="ID", help="take these items out of INDEX")


def _add_export(subparsers: Commands) -> None:
    """The arguments of `mmctr export`."""
    sub = _command(
        subparsers,
        "export",
        commands.export,
        "vectors in the files of other programs; runs as ONNX graphs or a folder to share",
    )
    sub.add_argument(
        "source", type=path, metavar="EMB_OR_RUN", help="embedding folder or file; a run for onnx and pretrained"
    )
    sub.add_argument(
        "--format",
        required=True,
        help="parquet, npz, safetensors, datasets, fuxictr, recbole, torcheasyrec; onnx, pretrained",
    )
    sub.add_argument(
        "--out", type=path, required=True, metavar="PATH", help="file to write; a folder for datasets and of runs"
    )
    sub.add_argument(
        "--data", type=path, help="onnx: dataset folder of the item vectors of a ranker (default: the run's own)"
    )
    sub.add_argument(
        "--int8", action="store_true", help="onnx: write graphs with int8 weights as well, and what they lose"
    )


def _add_semantic_ids(subparsers: Commands) -> None:
    """The arguments of `mmctr semantic-ids`."""
    sub = _command(
        subparsers, "semantic-ids", commands.semantic_ids, "a few codes an item, coarse to fine, as features of rankers"
    )
    sub.add_argument(
        "embeddings", type=path, metavar="EMB", nargs="+", help="embedding folders or files; several stand side by side"
    )
    sub.add_argument(
        "--out", type=path, required=True, help=".parquet file to write; a report and the codebooks go beside it"
    )
    sub.add_argument("--levels", type=int, help="codes an item (default: 3)")
    sub.add_argument("--codes", type=int, help="different codes a level (default: 256)")
    sub.add_argument("--seed", type=int, help="(default: 0)")
    sub.add_argument("--sample", type=int, help="items the codebooks are learned from, at most (default: 256 a code)")
    sub.add_argument("--keep-lengths", action="store_true", help="do not normalise what each level leaves over")
    sub.add_argument(
        "--codebooks", type=path, metavar="FILE", help="use these instead of learning some: codes of new items"
    )
    sub.add_argument("--name", default="sid", help="what the columns are called after (default: sid)")


def _add_search(subparsers: Commands) -> None:
    """The arguments of `mmctr search`."""
    sub = _command(
        subparsers,
        "search",
        commands.search,
        "nearest items to an item, a text, a picture, a user, or a mix; or to many queries",
    )
    sub.add_argument("index", type=path, metavar="EMB_OR_INDEX")
    sub.add_argument("--item", action=QueryPart, dest="parts", metavar="ID", help="item id")
    sub.add_argument("--text", action=QueryPart, dest="parts", metavar="WORDS", help="words")
    sub.add_argument("--image", type=path, action=QueryPart, dest="parts", metavar="FILE", help="picture file")
    sub.add_argument("--user", action=QueryPart, dest="parts", metavar="ID", help="what a user clicked")
    sub.add_argument("--weights", type=float, nargs="+", help="of the above, in their order, where several are mixed")
    sub.add_argument(
        "--queries", type=path, metavar="FILE", help="a table of queries: item_id, text, image, user_id; query, weight"
    )
    sub.add_argument("--out", type=path, help="with --queries: write the answers to this .parquet, .csv or .jsonl file")
    sub.add_argument("--where", nargs="+", default=[], metavar="CONDITION", help="like colour=red price<20")
    sub.add_argument("-k", type=int, default=10, help="how many (default: 10)")
    sub.add_argument("--more", nargs="+", default=[], metavar="WORD", help="go towards what `mmctr concepts` named so")
    sub.add_argument("--less", nargs="+", default=[], metavar="WORD", help="go away from it")
    sub.add_argument("--strength", type=float, default=2.0, help="how far, in standard deviations (default: 2)")
    sub.add_argument(
        "--concepts", type=path, help="concepts.json to take the words from (default: that of the run embedded with)"
    )
    sub.add_argument(
        "--run",
        type=path,
        dest="pretrain_run",
        help="pretraining run for --text and --image (default: the one embedded with)",
    )
    sub.add_argument("--data", type=path, help="dataset folder for --user and titles (default: the one embedded)")
    sub.add_argument("--mmap", action="store_true", help="leave the vectors on disk")
    sub.add_argument("--json", action="store_true", help="print JSON")


def _add_concepts(subparsers: Commands) -> None:
    """The arguments of `mmctr concepts`."""
    sub = _command(
        subparsers,
        "concepts",
        commands.concepts,
        "name the latent dimensions of a run with a head: JSON and an HTML page",
    )
    sub.add_argument(
        "runs", type=path, metavar="RUN", nargs="+", help="run folder of pretrain.train; of several the best is shown"
    )
    sub.add_argument("--data", type=path, help="dataset folder (default: the run's own)")
    sub.add_argument(
        "--out", type=path, help="folder for concepts.json and concepts.html (default: the first run folder)"
    )
    sub.add_argument("--columns", nargs="+", help="columns names may come from (default: all that can be used)")
    sub.add_argument("--prompts", type=path, help="a file of prompts, one a line, that pictures are compared with")
    sub.add_argument(
        "--ranker", type=path, help="run folder of a ranker on these latents: what each dimension does to clicks"
    )
    sub.add_argument("--user", help="with --ranker: what moves this user")
    sub.add_argument("--json", action="store_true", help="print JSON")


def _add_evaluate(subparsers: Commands) -> None:
    """The arguments of `mmctr evaluate`."""
    sub = _command(
        subparsers,
        "evaluate",
        commands.evaluate,
        "metrics of a run on its validation and test rows, or of a ranker on another log",
    )
    sub.add_argument("run_dir", type=path, metavar="RUN")
    sub.add_argument("--data", type=path, help="another dataset folder: all its impressions are scored")
    sub.add_argument(
        "--embeddings", type=path, nargs="+", default=[], help="with --data: vectors of items new to the ranker"
    )
    sub.add_argument("--out", type=path, help="write the numbers to this JSON file as well")
    sub.add_argument(
        "--item-tables",
        type=path,
        nargs="*",
        metavar="FILE",
        help="join these to the items instead of the columns the run has kept of its data.item_tables",
    )


def _add_compare(subparsers: Commands) -> None:
    """The arguments of `mmctr compare`."""
    sub = _command(subparsers, "compare", commands.compare, "ranker runs side by side, differences to the first one")
    sub.add_argument("runs", type=path, metavar="RUN", nargs="+")
    sub.add_argument("--html", type=path, help="write the report to this file")
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub.add_argument(
        "--embeddings",
        type=path,
        help="embedding folder for the report's neighbours (default: the first one a run used)",
    )


def _add_coldstart(subparsers: Commands) -> None:
    """The arguments of `mmctr coldstart`."""
    sub = _command(
        subparsers,
        "coldstart",
        commands.coldstart,
        "a study of cold items: methods x protocols x seeds, run where needed and compared",
    )
    sub.add_argument("study", type=path, metavar="STUDY", help="a YAML file, like configs/studies/toy.yaml")
    sub.add_argument("overrides", metavar="key=value", nargs="*", help="keys of the study to change, like seeds=[0]")
    sub.add_argument("--out", type=path, metavar="DIR", help="folder of runs and results (default: the study's `out`)")
    sub.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, which share the cores")
    sub.add_argument(
        "--html", type=path, metavar="FILE", help="write the page to this file (default: report.html in the folder)"
    )
    sub.add_argument(
        "--figures", type=path, metavar="DIR", help="write each plot to a file PROTOCOL_PLOT.svg in this folder too"
    )
    sub.add_argument("--json", action="store_true", help="print JSON; what goes on is told on stderr")


def _add_serve(subparsers: Commands) -> None:
    """The arguments of `mmctr serve`."""
    sub = _command(
        subparsers,
        "serve",
        commands.serve,
        "an HTTP API and a page: search, score, rank and explain; on this machine by default",
    )
    sub.add_argument("index", type=path, metavar="EMB_OR_INDEX")
    sub.add_argument("--ranker", type=path, metavar="RUN", help="run folder of the ranker that scores")
    sub.add_argument(
        "--baseline", type=path, metavar="RUN", help="another ranker to show beside it, such as one on IDs alone"
    )
    sub.add_argument("--data", type=path, help="dataset folder (default: the one embedded, and the rankers' own)")
    sub.add_argument(
        "--run", type=path, dest="pretrain_run", help="pretraining run for words and pictures (default: the own one)"
    )
    sub.add_argument("--embeddings", type=path, nargs="+", default=[], help="vectors of items new to the ranker")
    sub.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    sub.add_argument("--port", type=int, default=8000)


def _add_push(subparsers: Commands) -> None:
    """The arguments of `mmctr push`."""
    sub = _command(subparsers, "push", commands.push, "upload a finished run with a model card to the Hugging Face Hub")
    sub.add_argument("run_dir", type=path, metavar="RUN", help="run folder of pretrain.train or finetune.train")
    sub.add_argument("repo_id", metavar="REPO_ID", help="organisation/name; made when there is none")
    sub.add_argument("--private", action="store_true", help="a repository made now is private")


def _add_config(subparsers: Commands) -> None:
    """The arguments of `mmctr config`."""
    sub = _command(
        subparsers,
        "config",
        commands.config,
        "explain config keys: meaning, type, default, bounds, the shipped configs with them",
    )
    sub.add_argument("key", metavar="KEY", nargs="?", help="like fit.epochs; all keys below it too (default: sections)")
    sub.add_argument("--recipe", choices=["pretrain", "finetune", "study"], help="keys of this config alone")
    sub.add_argument(
        "--where",
        metavar="CONFIG",
        type=path,
        help="print the place of a shipped config file, like configs/accelerate/gpu.yaml",
    )


def _add_demo(subparsers: Commands) -> None:
    """The arguments of `mmctr demo`."""
    sub = _command(
        subparsers,
        "demo",
        commands.demo,
        "the whole story on ToyWorld: pretrain, embed, search, three rankers, comparison",
    )
    sub.add_argument(
        "--out", type=path, default="demo", help="folder to work in (default: demo); started again it goes on"
    )
    sub.add_argument("--seed", type=int, default=0)


_COMMANDS: tuple[Callable[[Commands], None], ...] = (
    _add_prepare,
    _add_embed,
    _add_index,
    _add_export,
    _add_semantic_ids,
    _add_search,
    _add_concepts,
    _add_evaluate,
    _add_compare,
    _add_coldstart,
    _add_serve,
    _add_push,
    _add_config,
    _add_demo,
)
"""functions that add a command to the parser, in the order of the help"""
