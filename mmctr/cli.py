"""The console script `mmctr`. Every command imports what it needs when it runs: `mmctr --help` is instant."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXPORTS = {
    "onnx": "mmctr.onnx:export_run",
    "pretrained": "mmctr.hub:export_run",
}
"""By format, the module and the function that writes it: (source, out, data, int8) -> lines to print."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command. A user's mistake is one line on stderr and exit code 1, not a traceback."""
    arguments = _parser().parse_args(argv)
    from mmctr.errors import exit_on_error

    with exit_on_error():
        arguments.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmctr", description="Multimodal item embeddings for click-through-rate ranking."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    sub = command("prepare", _prepare, "check a dataset folder once, report what was rejected and why, build caches")
    sub.add_argument("dataset", help="folder with items.*, and optionally interactions.*, users.*, images/")
    sub.add_argument("--out", required=True, help="prepared folder to write; give it as data.path")
    sub.add_argument(
        "--items", help="take the catalog from a `datasets` dataset: a name, name:split, or a saved folder"
    )
    sub.add_argument("--image-size", type=int, nargs="*", default=[], help="sides of pictures to cache now")
    sub.add_argument("--image-resize", choices=["shortest", "longest", "squash"], default="shortest")
    sub.add_argument("--config", help="a pretraining config: cache the pictures and tokens it will read")
    sub.add_argument("--threads", type=int, default=2, help="threads that decode pictures (default: 2)")

    sub = command("embed", _embed, "item vectors of a whole catalog from a pretraining run, sharded and resumable")
    sub.add_argument("run_dir", metavar="RUN", help="run folder of pretrain.train")
    sub.add_argument("--data", help="dataset folder (default: the run's own)")
    sub.add_argument("--out", required=True, help="embedding folder to write")
    sub.add_argument("--modality", choices=["both", "image", "text"], default="both")
    sub.add_argument("--shard-size", type=int, default=8192, help="items a shard (default: 8192)")
    sub.add_argument(
        "--precision",
        choices=["fp32", "bf16", "int8", "auto"],
        default="fp32",
        help="of the encoder (default: fp32); auto: the fastest one whose vectors stay, measured on this catalog",
    )

    sub = command("index", _index, "build a FAISS index over an embedding folder")
    sub.add_argument("embeddings", metavar="EMB", help="folder of `mmctr embed`, a .parquet or an .npz file")
    sub.add_argument("--out", help="index folder to write (default: EMB with .index at its end)")

    sub = command("search", _search, "nearest items to an item, a text or a picture")
    sub.add_argument("index", metavar="EMB_OR_INDEX")
    query = sub.add_mutually_exclusive_group(required=True)
    query.add_argument("--item", help="item id")
    query.add_argument("--text", help="words")
    query.add_argument("--image", help="picture file")
    sub.add_argument("-k", type=int, default=10, help="how many (default: 10)")
    sub.add_argument("--more", nargs="+", default=[], metavar="WORD", help="go towards what `mmctr concepts` named so")
    sub.add_argument("--less", nargs="+", default=[], metavar="WORD", help="go away from it")
    sub.add_argument("--strength", type=float, default=2.0, help="how far, in standard deviations (default: 2)")
    sub.add_argument("--concepts", help="concepts.json to take the words from (default: that of the run embedded with)")
    sub.add_argument(
        "--run", dest="pretrain_run", help="pretraining run for --text and --image (default: the one embedded with)"
    )
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = command("concepts", _concepts, "name the latent dimensions of a run with a head: JSON and an HTML page")
    sub.add_argument(
        "runs", metavar="RUN", nargs="+", help="run folder of pretrain.train; of several the best is shown"
    )
    sub.add_argument("--data", help="dataset folder (default: the run's own)")
    sub.add_argument("--out", help="folder for concepts.json and concepts.html (default: the first run folder)")
    sub.add_argument("--columns", nargs="+", help="columns names may come from (default: all that can be used)")
    sub.add_argument("--prompts", help="a file of prompts, one a line, that pictures are compared with")
    sub.add_argument("--ranker", help="run folder of a ranker on these latents: what each dimension does to clicks")
    sub.add_argument("--user", help="with --ranker: what moves this user")
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = command(
        "evaluate", _evaluate, "metrics of a run on its validation and test rows, or of a ranker on another log"
    )
    sub.add_argument("run_dir", metavar="RUN")
    sub.add_argument("--data", help="another dataset folder: all its impressions are scored")
    sub.add_argument("--out", help="write the numbers to this JSON file as well")

    sub = command("compare", _compare, "ranker runs side by side, differences to the first one")
    sub.add_argument("runs", metavar="RUN", nargs="+")
    sub.add_argument("--html", help="write the report to this file")
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub.add_argument(
        "--embeddings", help="embedding folder for the report's neighbours (default: the first one a run used)"
    )

    sub = command("export", _export, "what other programs read: ONNX graphs, or a folder to share")
    sub.add_argument("source", metavar="SOURCE", help="run folder of pretrain.train or finetune.train")
    sub.add_argument("--format", required=True, choices=list(EXPORTS), help="what to write")
    sub.add_argument("--out", required=True, metavar="PATH", help="folder to write")
    sub.add_argument("--data", help="onnx: dataset folder of the item vectors of a ranker (default: the run's own)")
    sub.add_argument(
        "--int8", action="store_true", help="onnx: write graphs with int8 weights as well, and what they lose"
    )

    sub = command("push", _push, "upload a finished run with a model card to the Hugging Face Hub")
    sub.add_argument("run_dir", metavar="RUN", help="run folder of pretrain.train or finetune.train")
    sub.add_argument("repo_id", metavar="REPO_ID", help="organisation/name; made when there is none")
    sub.add_argument("--private", action="store_true", help="a repository made now is private")

    sub = command("demo", _demo, "the whole story on ToyWorld: pretrain, embed, search, three rankers, comparison")
    sub.add_argument("--out", default="demo", help="folder to work in (default: demo); started again it goes on")
    sub.add_argument("--seed", type=int, default=0)
    return parser


def _prepare(arguments: argparse.Namespace) -> None:
    from mmctr.data.prepare import prepare

    dataset = prepare(arguments.dataset, arguments.out, arguments.items)
    report: dict[str, Any] = dict(dataset.report)
    pictures = {(size, arguments.image_resize) for size in arguments.image_size}
    if arguments.config:
        import yaml

        from mmctr.runs import DataConfig
        from mmctr.tasks import PretrainTask, PretrainTaskConfig

        values = yaml.safe_load(Path(arguments.config).read_text(encoding="utf-8"))
        if not isinstance(values, dict) or not {"data", "task"} <= set(values):
            raise ValueError(f"{arguments.config}: not a pretraining config (it has no `data` and `task`)")
        data = DataConfig.parse(values["data"] | {"path": arguments.out}, arguments.config)
        task = PretrainTask(PretrainTaskConfig.parse(values["task"], arguments.config))
        pictures.add((data.image_size or task.encoder.image_size, data.image_resize))
        dataset.catalog.tokens(data.text, task.encoder.tokenize, task.encoder.tokenizer_key)
    for size, resize in sorted(pictures):
        report[f"pictures {size} {resize}"] = dataset.catalog.pictures(size, resize, arguments.threads).report
    print(json.dumps(report, indent=2, ensure_ascii=False, default=str))
    print(f"\nprepared: {arguments.out}   (use it as data.path={arguments.out})")


def _embed(arguments: argparse.Namespace) -> None:
    from mmctr.export import embed_run

    embed_run(
        arguments.run_dir,
        arguments.out,
        arguments.data,
        arguments.modality,
        arguments.shard_size,
        arguments.precision,
    )


def _index(arguments: argparse.Namespace) -> None:
    from mmctr.embeddings import EmbeddingTable
    from mmctr.index import ItemIndex

    out = arguments.out or str(Path(arguments.embeddings)) + ".index"
    index = ItemIndex.build(EmbeddingTable.read(arguments.embeddings))
    index.save(out)
    print(f"{out}: {len(index)} items, {index.index.d} dimensions, exact search")


def _search(arguments: argparse.Namespace) -> None:
    from mmctr.index import ItemIndex

    index = ItemIndex.load(arguments.index)
    shift = None
    if arguments.more or arguments.less:
        from mmctr.concepts import steering

        named = arguments.concepts or Path(str(index.manifest.get("identity", {}).get("run"))) / "concepts.json"
        weights = index.manifest.get("identity", {}).get("weights")
        shift = steering(Path(named), arguments.more, arguments.less, arguments.strength, weights)
        if len(shift) != index.index.d:
            raise ValueError(f"{named}: of {len(shift)} dimensions, the vectors have {index.index.d}: not of one run")
    if arguments.item is not None:
        found = index.search_item(arguments.item, arguments.k, shift)
    else:
        from mmctr.export import query_vector

        run = arguments.pretrain_run or index.manifest.get("identity", {}).get("run")
        if run is None:
            raise ValueError(
                f"{arguments.index}: does not say which run made it; name it with --run to search by text or picture"
            )
        vector = query_vector(run, arguments.text, arguments.image)
        found = index.search(vector if shift is None else vector + shift, arguments.k)
    if arguments.json:
        print(json.dumps([vars(neighbour) for neighbour in found], ensure_ascii=False))
        return
    for place, neighbour in enumerate(found, 1):
        print(f"{place:3}  {neighbour.score:7.4f}  {neighbour.item_id}  {neighbour.title or ''}")


def _concepts(arguments: argparse.Namespace) -> None:
    from mmctr.concept_report import concepts, summary

    if arguments.user is not None and arguments.ranker is None:
        raise ValueError("--user needs --ranker: only a ranker knows what a user likes")
    prompts: list[str] = []
    if arguments.prompts:
        if not Path(arguments.prompts).is_file():
            raise ValueError(f"--prompts {arguments.prompts}: no such file")
        lines = Path(arguments.prompts).read_text(encoding="utf-8").splitlines()
        prompts = [line.strip() for line in lines if line.strip()]
    out = Path(arguments.out or arguments.runs[0])
    report = concepts(arguments.runs, out, arguments.data, arguments.columns, prompts, arguments.ranker, arguments.user)
    print(json.dumps(report, ensure_ascii=False) if arguments.json else summary(report))
    print(f"page: {out / 'concepts.html'}", file=sys.stderr if arguments.json else sys.stdout)


def _evaluate(arguments: argparse.Namespace) -> None:
    from mmctr.export import evaluate_run
    from mmctr.files import write_json

    numbers = evaluate_run(arguments.run_dir, arguments.data)
    if arguments.out:
        write_json(Path(arguments.out), numbers)
    print(json.dumps(numbers, indent=2))


def _compare(arguments: argparse.Namespace) -> None:
    from mmctr.report import comparison_json, comparison_table, load_runs, write_report

    runs = load_runs([Path(run) for run in arguments.runs])
    print(json.dumps(comparison_json(runs), indent=2) if arguments.json else comparison_table(runs))
    if arguments.html:
        from mmctr.gallery import sample_neighbours

        neighbours = sample_neighbours([Path(run) for run in arguments.runs], arguments.embeddings)
        write_report(runs, Path(arguments.html), neighbours)
        print(f"report: {arguments.html}", file=sys.stderr if arguments.json else sys.stdout)


def _export(arguments: argparse.Namespace) -> None:
    from importlib import import_module

    module, function = EXPORTS[arguments.format].split(":")
    write = getattr(import_module(module), function)
    for line in write(arguments.source, arguments.out, data=arguments.data, int8=arguments.int8):
        print(line)


def _push(arguments: argparse.Namespace) -> None:
    from mmctr.hub import push_run

    for line in push_run(arguments.run_dir, arguments.repo_id, arguments.private):
        print(line)


def _demo(arguments: argparse.Namespace) -> None:
    from mmctr.demo import run_demo

    run_demo(Path(arguments.out), arguments.seed)
