"""The commands of `mmctr`, as functions of the parsed arguments; each function imports the modules of the command."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def prepare(arguments: argparse.Namespace) -> None:
    """`mmctr prepare`: prepare a dataset folder, and print the report."""
    from mmctr.data.prepare import prepare

    dataset = prepare(arguments.dataset, arguments.out, arguments.items, arguments.schema)
    report: dict[str, Any] = dict(dataset.report)
    pictures = {(size, arguments.image_resize) for size in arguments.image_size}
    if arguments.config:
        from mmctr.config import read_config
        from mmctr.runs.config import DataConfig
        from mmctr.shipped import find_config
        from mmctr.tasks import PretrainTask, PretrainTaskConfig

        values = read_config(find_config(arguments.config))
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


def embed(arguments: argparse.Namespace) -> None:
    """`mmctr embed`: write the item vectors of a catalog."""
    from mmctr.runs.embed import embed_run

    if arguments.index and not arguments.append:
        raise ValueError("--index goes with --append; `mmctr index` makes a new one")
    if arguments.index:
        from mmctr.cli.retrieval import check_columns

        check_columns(arguments.index, arguments.run_dir, arguments.data)
    how = (arguments.modality, arguments.shard_size, arguments.precision, arguments.append)
    new = embed_run(arguments.run_dir, arguments.out, arguments.data, *how)
    if new is not None and arguments.index:
        from mmctr.cli.retrieval import append_to_index

        print(append_to_index(new, arguments.index, arguments.data))


def index(arguments: argparse.Namespace) -> None:
    """`mmctr index`: build or change an index, and print a description."""
    from mmctr.cli.retrieval import index_command

    print(index_command(arguments))


def export(arguments: argparse.Namespace) -> None:
    """`mmctr export`: write vectors or a run in the format of another program."""
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


def semantic_ids(arguments: argparse.Namespace) -> None:
    """`mmctr semantic-ids`: write semantic IDs, and print the report."""
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


def search(arguments: argparse.Namespace) -> None:
    """`mmctr search`: print the neighbours of a query."""
    from mmctr.cli.retrieval import search_command

    print(search_command(arguments))


def concepts(arguments: argparse.Namespace) -> None:
    """`mmctr concepts`: name the latent dimensions of a run, and write the page."""
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


def evaluate(arguments: argparse.Namespace) -> None:
    """`mmctr evaluate`: print the metrics of a run."""
    from mmctr.files import write_json
    from mmctr.runs.evaluate import evaluate_run

    how = (arguments.data, arguments.item_tables, arguments.embeddings)
    numbers = evaluate_run(arguments.run_dir, *how)
    if arguments.out:
        write_json(Path(arguments.out), numbers)
    print(json.dumps(numbers, indent=2))


def compare(arguments: argparse.Namespace) -> None:
    """`mmctr compare`: print a comparison of ranking runs, and write the report."""
    from mmctr.reports.compare import comparison_json, comparison_table, write_report
    from mmctr.reports.run import load_runs

    runs = load_runs([Path(run) for run in arguments.runs])
    print(json.dumps(comparison_json(runs), indent=2) if arguments.json else comparison_table(runs))
    if arguments.html:
        from mmctr.reports.gallery import sample_neighbours

        neighbours = sample_neighbours([Path(run) for run in arguments.runs], arguments.embeddings)
        write_report(runs, Path(arguments.html), neighbours)
        print(f"report: {arguments.html}", file=sys.stderr if arguments.json else sys.stdout)


def coldstart(arguments: argparse.Namespace) -> None:
    """`mmctr coldstart`: run a study of cold items, and write the results."""
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


def serve(arguments: argparse.Namespace) -> None:
    """`mmctr serve`: start the HTTP server."""
    try:
        import fastapi  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error}; `mmctr serve` needs the extra: pip install 'mmctr[serve]'") from None
    from mmctr.serving.server import serve

    of_rankers = (arguments.ranker, arguments.baseline, arguments.data, arguments.pretrain_run, arguments.embeddings)
    serve(arguments.index, *of_rankers, arguments.host, arguments.port)


def push(arguments: argparse.Namespace) -> None:
    """`mmctr push`: upload a run to the Hugging Face Hub."""
    from mmctr.export.hub import push_run

    for line in push_run(arguments.run_dir, arguments.repo_id, arguments.private):
        print(line)


def config(arguments: argparse.Namespace) -> None:
    """`mmctr config`: print the reference of config keys, or the path of a shipped config."""
    from mmctr.cli.config import config_command, shipped_path

    if arguments.where:
        print(shipped_path(arguments.where))
        return
    print(config_command(arguments.key, arguments.recipe))


def demo(arguments: argparse.Namespace) -> None:
    """`mmctr demo`: run the demo."""
    from mmctr.cli.demo import run_demo

    run_demo(Path(arguments.out), arguments.seed)
