"""The console script `mmctr`. Every command imports what it needs when it runs: `mmctr --help` is instant."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmctr.cli.arguments import QueryPart, Version, parse_size


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command. A user's mistake is one line on stderr and exit code 1, not a traceback."""
    arguments = _parser().parse_args(argv)
    from mmctr.errors import exit_on_error, show_progress

    show_progress()
    with exit_on_error():
        arguments.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmctr", description="Multimodal item embeddings for click-through-rate ranking."
    )
    parser.add_argument("--version", action=Version, help="print the versions of mmctr and of what it runs on")
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
    sub.add_argument("--append", action="store_true", help="encode the items that --out lacks alone")
    sub.add_argument("--index", help="with --append: add the new items to this index as well")
    sub.add_argument(
        "--precision",
        choices=["fp32", "bf16", "int8", "auto"],
        default="fp32",
        help="of the encoder (default: fp32); auto: the fastest one whose vectors stay, measured on this catalog",
    )

    sub = command("index", _index, "build a FAISS index, measured against exact search; or add to it, merge, remove")
    sub.add_argument(
        "sources",
        metavar="EMB_OR_INDEX",
        nargs="+",
        help="folder of `mmctr embed`, a .parquet or an .npz file, or an index; several are merged",
    )
    sub.add_argument("--out", help="index folder to write (default: EMB with .index at its end, or the INDEX itself)")
    sub.add_argument("--recall", type=float, default=0.99, help="share of the ten nearest to find (default: 0.99)")
    sub.add_argument(
        "--latency-ms", type=float, default=2.0, help="exact search is kept while a query takes no longer (default: 2)"
    )
    sub.add_argument("--memory", type=parse_size, help="most the index may take, like 500MB or 4GB")
    sub.add_argument("--factory", help="FAISS factory string, like Flat or HNSW32 or IVF1024,SQ8 (default: chosen)")
    sub.add_argument("--columns", nargs="*", help="catalog columns to filter by; none named: all that can be used")
    sub.add_argument("--data", help="dataset folder of these columns (default: the one embedded)")
    sub.add_argument("--append", action="store_true", help="add the items of EMB that --out does not hold yet")
    sub.add_argument("--remove", nargs="+", metavar="ID", help="take these items out of INDEX")

    sub = command("export", _export, "vectors in the files of other programs; runs as ONNX graphs or a folder to share")
    sub.add_argument("source", metavar="EMB_OR_RUN", help="embedding folder or file; a run for onnx and pretrained")
    sub.add_argument(
        "--format",
        required=True,
        help="parquet, npz, safetensors, datasets, fuxictr, recbole, torcheasyrec; onnx, pretrained",
    )
    sub.add_argument("--out", required=True, metavar="PATH", help="file to write; a folder for datasets and of runs")
    sub.add_argument("--data", help="onnx: dataset folder of the item vectors of a ranker (default: the run's own)")
    sub.add_argument(
        "--int8", action="store_true", help="onnx: write graphs with int8 weights as well, and what they lose"
    )

    sub = command("semantic-ids", _semantic_ids, "a few codes an item, coarse to fine, as features of rankers")
    sub.add_argument(
        "embeddings", metavar="EMB", nargs="+", help="embedding folders or files; several stand side by side"
    )
    sub.add_argument("--out", required=True, help=".parquet file to write; a report and the codebooks go beside it")
    sub.add_argument("--levels", type=int, help="codes an item (default: 3)")
    sub.add_argument("--codes", type=int, help="different codes a level (default: 256)")
    sub.add_argument("--seed", type=int, help="(default: 0)")
    sub.add_argument("--sample", type=int, help="items the codebooks are learned from, at most (default: 256 a code)")
    sub.add_argument("--keep-lengths", action="store_true", help="do not normalise what each level leaves over")
    sub.add_argument("--codebooks", metavar="FILE", help="use these instead of learning some: codes of new items")
    sub.add_argument("--name", default="sid", help="what the columns are called after (default: sid)")

    sub = command(
        "search", _search, "nearest items to an item, a text, a picture, a user, or a mix; or to many queries"
    )
    sub.add_argument("index", metavar="EMB_OR_INDEX")
    sub.add_argument("--item", action=QueryPart, dest="parts", metavar="ID", help="item id")
    sub.add_argument("--text", action=QueryPart, dest="parts", metavar="WORDS", help="words")
    sub.add_argument("--image", action=QueryPart, dest="parts", metavar="FILE", help="picture file")
    sub.add_argument("--user", action=QueryPart, dest="parts", metavar="ID", help="what a user clicked")
    sub.add_argument("--weights", type=float, nargs="+", help="of the above, in their order, where several are mixed")
    sub.add_argument(
        "--queries", metavar="FILE", help="a table of queries: item_id, text, image, user_id; query, weight"
    )
    sub.add_argument("--out", help="with --queries: write the answers to this .parquet, .csv or .jsonl file")
    sub.add_argument("--where", nargs="+", default=[], metavar="CONDITION", help="like colour=red price<20")
    sub.add_argument("-k", type=int, default=10, help="how many (default: 10)")
    sub.add_argument("--more", nargs="+", default=[], metavar="WORD", help="go towards what `mmctr concepts` named so")
    sub.add_argument("--less", nargs="+", default=[], metavar="WORD", help="go away from it")
    sub.add_argument("--strength", type=float, default=2.0, help="how far, in standard deviations (default: 2)")
    sub.add_argument("--concepts", help="concepts.json to take the words from (default: that of the run embedded with)")
    sub.add_argument(
        "--run", dest="pretrain_run", help="pretraining run for --text and --image (default: the one embedded with)"
    )
    sub.add_argument("--data", help="dataset folder for --user (default: the one embedded)")
    sub.add_argument("--mmap", action="store_true", help="leave the vectors on disk")
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
    sub.add_argument("--embeddings", nargs="+", default=[], help="with --data: vectors of items new to the ranker")
    sub.add_argument("--out", help="write the numbers to this JSON file as well")
    sub.add_argument(
        "--item-tables",
        nargs="*",
        metavar="FILE",
        help="join these to the items instead of the columns the run has kept of its data.item_tables",
    )

    sub = command("compare", _compare, "ranker runs side by side, differences to the first one")
    sub.add_argument("runs", metavar="RUN", nargs="+")
    sub.add_argument("--html", help="write the report to this file")
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub.add_argument(
        "--embeddings", help="embedding folder for the report's neighbours (default: the first one a run used)"
    )

    sub = command(
        "coldstart", _coldstart, "a study of cold items: methods x protocols x seeds, run where needed and compared"
    )
    sub.add_argument("study", metavar="STUDY", help="a YAML file, like configs/studies/toy.yaml")
    sub.add_argument("overrides", metavar="key=value", nargs="*", help="keys of the study to change, like seeds=[0]")
    sub.add_argument("--out", metavar="DIR", help="folder of runs and results (default: the study's `out`)")
    sub.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, which share the cores")
    sub.add_argument("--html", metavar="FILE", help="write the page to this file (default: report.html in the folder)")
    sub.add_argument("--figures", metavar="DIR", help="write each plot to a file PROTOCOL_PLOT.svg in this folder too")
    sub.add_argument("--json", action="store_true", help="print JSON; what goes on is told on stderr")

    sub = command(
        "serve", _serve, "an HTTP API and a page: search, score, rank and explain; on this machine by default"
    )
    sub.add_argument("index", metavar="EMB_OR_INDEX")
    sub.add_argument("--ranker", metavar="RUN", help="run folder of the ranker that scores")
    sub.add_argument("--baseline", metavar="RUN", help="another ranker to show beside it, such as one on IDs alone")
    sub.add_argument("--data", help="dataset folder (default: the one embedded, and the rankers' own)")
    sub.add_argument("--run", dest="pretrain_run", help="pretraining run for words and pictures (default: the own one)")
    sub.add_argument("--embeddings", nargs="+", default=[], help="vectors of items new to the ranker")
    sub.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    sub.add_argument("--port", type=int, default=8000)

    sub = command("push", _push, "upload a finished run with a model card to the Hugging Face Hub")
    sub.add_argument("run_dir", metavar="RUN", help="run folder of pretrain.train or finetune.train")
    sub.add_argument("repo_id", metavar="REPO_ID", help="organisation/name; made when there is none")
    sub.add_argument("--private", action="store_true", help="a repository made now is private")

    sub = command(
        "config", _config, "explain config keys: meaning, type, default, bounds, the shipped configs with them"
    )
    sub.add_argument("key", metavar="KEY", nargs="?", help="like fit.epochs; all keys below it too (default: sections)")
    sub.add_argument("--recipe", choices=["pretrain", "finetune", "study"], help="keys of this config alone")
    sub.add_argument(
        "--where", metavar="CONFIG", help="print the place of a shipped config file, like configs/accelerate/gpu.yaml"
    )

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

        from mmctr.runs.config import DataConfig
        from mmctr.shipped import find_config
        from mmctr.tasks import PretrainTask, PretrainTaskConfig

        values = yaml.safe_load(find_config(arguments.config).read_text(encoding="utf-8"))
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
    from mmctr.runs.embed import embed_run

    if arguments.index and not arguments.append:
        raise ValueError("--index goes with --append; `mmctr index` makes a new one")
    how = (arguments.modality, arguments.shard_size, arguments.precision, arguments.append)
    new = embed_run(arguments.run_dir, arguments.out, arguments.data, *how)
    if new is not None and arguments.index:
        from mmctr.cli.retrieval import append_to_index

        print(append_to_index(new, arguments.index, arguments.data))


def _index(arguments: argparse.Namespace) -> None:
    from mmctr.cli.retrieval import index_command

    print(index_command(arguments))


def _export(arguments: argparse.Namespace) -> None:
    if arguments.format in ("onnx", "pretrained"):
        from importlib import import_module

        write = import_module(
            "mmctr.export.onnx_export" if arguments.format == "onnx" else "mmctr.export.hub"
        ).export_run
        print("\n".join(write(arguments.source, arguments.out, data=arguments.data, int8=arguments.int8)))
        return
    if arguments.data or arguments.int8:
        raise ValueError("--data and --int8 are for --format onnx")
    from mmctr.export.formats import export

    print(export(arguments.source, arguments.format, arguments.out))


def _semantic_ids(arguments: argparse.Namespace) -> None:
    from mmctr.retrieval.semantic_ids import semantic_ids, summary

    report = semantic_ids(
        arguments.embeddings,
        arguments.out,
        levels=arguments.levels,
        codes=arguments.codes,
        seed=arguments.seed,
        sample=arguments.sample,
        normalize_residuals=not arguments.keep_lengths,
        codebooks=arguments.codebooks,
        name=arguments.name,
    )
    print(f"{arguments.out}: {summary(report)}")


def _search(arguments: argparse.Namespace) -> None:
    from mmctr.cli.retrieval import search_command

    print(search_command(arguments))


def _concepts(arguments: argparse.Namespace) -> None:
    from mmctr.concepts.report import concepts_text, write_concepts

    if arguments.user is not None and arguments.ranker is None:
        raise ValueError("--user needs --ranker: only a ranker knows what a user likes")
    prompts: list[str] = []
    if arguments.prompts:
        if not Path(arguments.prompts).is_file():
            raise ValueError(f"--prompts {arguments.prompts}: no such file")
        lines = Path(arguments.prompts).read_text(encoding="utf-8").splitlines()
        prompts = [line.strip() for line in lines if line.strip()]
    out = Path(arguments.out or arguments.runs[0])
    report = write_concepts(
        arguments.runs, out, arguments.data, arguments.columns, prompts, arguments.ranker, arguments.user
    )
    print(json.dumps(report.to_json(), ensure_ascii=False) if arguments.json else concepts_text(report))
    print(f"page: {out / 'concepts.html'}", file=sys.stderr if arguments.json else sys.stdout)


def _evaluate(arguments: argparse.Namespace) -> None:
    from mmctr.files import write_json
    from mmctr.runs.evaluate import evaluate_run

    how = (arguments.data, arguments.item_tables, arguments.embeddings)
    numbers = evaluate_run(arguments.run_dir, *how)
    if arguments.out:
        write_json(Path(arguments.out), numbers)
    print(json.dumps(numbers, indent=2))


def _compare(arguments: argparse.Namespace) -> None:
    from mmctr.reports.compare import comparison_json, comparison_table, write_report
    from mmctr.reports.run import load_runs

    runs = load_runs([Path(run) for run in arguments.runs])
    print(json.dumps(comparison_json(runs), indent=2) if arguments.json else comparison_table(runs))
    if arguments.html:
        from mmctr.reports.gallery import sample_neighbours

        neighbours = sample_neighbours([Path(run) for run in arguments.runs], arguments.embeddings)
        write_report(runs, Path(arguments.html), neighbours)
        print(f"report: {arguments.html}", file=sys.stderr if arguments.json else sys.stdout)


def _coldstart(arguments: argparse.Namespace) -> None:
    from mmctr.files import write_json
    from mmctr.studies.config import StudyConfig
    from mmctr.studies.page import write_study_page
    from mmctr.studies.plots import write_figures
    from mmctr.studies.results import study_results
    from mmctr.studies.runner import run_study
    from mmctr.studies.table import study_table

    if arguments.jobs < 1:
        raise ValueError(f"--jobs: {arguments.jobs} runs at a time; give 1 or more")
    study = StudyConfig.load(arguments.study, arguments.overrides)
    out = Path(arguments.out or study.out)
    page = Path(arguments.html or out / "report.html")

    def print_line(line: str) -> None:
        print(line, file=sys.stderr if arguments.json else sys.stdout, flush=True)

    results = study_results(study, run_study(study, out, arguments.study, print_line=print_line, jobs=arguments.jobs))
    write_json(out / "results.json", results.to_json())
    write_study_page(results, page)
    if arguments.figures:
        write_figures(results, arguments.figures)
    if arguments.json:
        print(json.dumps(results.to_json(), indent=2, ensure_ascii=False))
    else:
        print(f"\n{study_table(results)}")
    print_line(f"results: {out / 'results.json'}   report: {page}")
    if results.failed:
        raise ValueError(f"{len(results.failed)} runs failed; mend what their logs say and start the study again")


def _serve(arguments: argparse.Namespace) -> None:
    try:
        import fastapi  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error}; `mmctr serve` needs the extra: pip install 'mmctr[serve]'") from None
    from mmctr.serving.server import serve

    of_rankers = (arguments.ranker, arguments.baseline, arguments.data, arguments.pretrain_run, arguments.embeddings)
    serve(arguments.index, *of_rankers, arguments.host, arguments.port)


def _push(arguments: argparse.Namespace) -> None:
    from mmctr.export.hub import push_run

    for line in push_run(arguments.run_dir, arguments.repo_id, arguments.private):
        print(line)


def _config(arguments: argparse.Namespace) -> None:
    from mmctr.cli.config import config_command, shipped_path

    if arguments.where:
        print(shipped_path(arguments.where))
        return
    print(config_command(arguments.key, arguments.recipe))


def _demo(arguments: argparse.Namespace) -> None:
    from mmctr.cli.demo import run_demo

    run_demo(Path(arguments.out), arguments.seed)
