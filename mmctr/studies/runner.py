"""A study of cold items: methods x protocols x seeds, each cell an ordinary run of `finetune.train`.

`StudyConfig` names what is compared, `study_cells` lists the runs, `run_study` makes the runs that are not finished.
`mmctr.studies.results` computes the results of the runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet
import torch
from safetensors.torch import load_file

from mmctr.config import Config
from mmctr.data.embeddings import EmbeddingTable, read_tables, write_npz
from mmctr.data.tables import one_array
from mmctr.embedders.item_embedder import ContentTable
from mmctr.locks import claimed
from mmctr.run_folder import RunFolder
from mmctr.runs.config import FinetuneConfig
from mmctr.runs.folder import first_difference
from mmctr.shipped import recipe_environment, recipe_module
from mmctr.studies.config import FactorsConfig, StudyConfig
from mmctr.studies.controls import factor_table, shuffled_table

Launch = Callable[[Sequence[str], Path], int]
"""(arguments of `finetune.train`, log file) -> exit code"""


@dataclass(frozen=True)
class Cell:
    """One run of a study: a method under a protocol with a seed."""

    protocol: str
    method: str
    seed: int
    folder: Path
    arguments: list[str]
    """arguments of `finetune.train`"""
    config: Config
    """the FinetuneConfig that the arguments result in"""
    content_paths: tuple[str, ...]
    """tables of item vectors that the ranker reads, empty for a ranker without"""
    after: Path | None = None
    """folder of another cell, whose run is the expert of this run; None without an expert"""

    @property
    def name(self) -> str:
        """Protocol, method and seed for the reader."""
        return f"{self.protocol} / {self.method} / seed {self.seed}"

    @property
    def log(self) -> Path:
        """The file of the run's output, beside the run folder."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def is_finished(self) -> bool:
        """Whether the run has a config and metrics; ValueError where the folder holds a run of another config."""
        run = RunFolder(self.folder)
        if run.is_begun:
            saved = type(self.config).load(run.config).model_dump(mode="json")
            difference = first_difference(saved, self.config.model_dump(mode="json"))
            if difference:
                key, before, now = difference
                raise ValueError(
                    f"{self.folder}: holds a run of another config ({key}: {before!r} there, {now!r} in the study); "
                    f"delete that folder, or give the study another `out`"
                )
        return run.is_finished


@dataclass(frozen=True)
class Outcome:
    """The state of a cell after a call of `run_study`."""

    cell: Cell
    state: Literal["kept", "made", "failed"]
    reason: str = ""
    """Why the cell failed: the last lines of its log, or the failed run that the cell reads."""


def study_cells(study: StudyConfig, out: Path, source: str = "study") -> list[Cell]:
    """The runs of a study, protocol by protocol, seed by seed, method by method, with checked configs.

    The first seed of all methods comes before the second of any, so that a study stopped halfway compares something.
    Raises ValueError naming the study and the method for a config that does not load.
    """
    cells = []
    for protocol, split in study.protocols.items():
        for seed in study.seeds:
            for name, method in study.methods.items():
                folder = _cell_folder(out, protocol, name, seed)
                after = None if method.after is None else _cell_folder(out, protocol, method.after, seed)
                changes = [*study.set, *method.set]
                if after is not None:
                    changes.append(f"task.make.run={_yaml_value(str(after))}")
                if method.table is not None:
                    changes.append(f"task.embedder.content.path={_yaml_value(str(_table_file(out, method.table)))}")
                changes += [
                    f"data.path={_yaml_value(study.data)}",
                    f"split={_yaml_value(split.model_dump(mode='json'))}",
                    f"seed={seed}",
                    f"run_dir={_yaml_value(str(folder))}",
                ]
                try:
                    config = FinetuneConfig.load(method.config, changes)
                except ValueError as error:
                    raise ValueError(f"{source}: methods.{name}: {error}") from None
                content = config.task.embedder.content
                paths = tuple(content.paths) if isinstance(content, ContentTable) else ()
                cells.append(Cell(protocol, name, seed, folder, [method.config, *changes], config, paths, after))
    return cells


def make_tables(study: StudyConfig, out: Path) -> None:
    """Write the tables of `study.tables` to OUT/tables/NAME.npz.

    Raises ValueError where a table of that name exists with other content: runs may have been made with that table.
    """
    for name, config in study.tables.items():
        path = _table_file(out, name)
        if isinstance(config, FactorsConfig):
            table = factor_table(study.data)
        else:
            table = shuffled_table(study.data, config.of, config.seed)
        if not path.is_file():
            write_npz(table, path)
            continue
        old = EmbeddingTable.read(path)
        if not old.ids.equals(table.ids) or not np.array_equal(old.vectors, table.vectors):
            raise ValueError(
                f"{path}: holds another table than `tables.{name}` gives now, as the items or their vectors have "
                f"changed; give the study another `out`, or delete the folder {out}"
            )


def check_contents(cells: Sequence[Cell]) -> None:
    """Raises ValueError where a finished cell was trained on other vectors than its `content.path` holds now.

    Further cells of the method would be trained on the new vectors, and the means over seeds would mix two methods.
    Files of vectors that no longer exist are not checked, as no further cell can be trained on them.
    """
    current: dict[tuple[str, ...], tuple[torch.Tensor, torch.Tensor]] = {}
    for cell in cells:
        key = cell.content_paths
        if not key or not all(Path(path).exists() for path in key):
            continue
        if key not in current:
            ids = pyarrow.parquet.read_table(RunFolder(cell.folder).catalog)["item_id"]
            current[key] = read_tables(list(key), one_array(ids))
        saved, (vectors, has_vector) = load_file(RunFolder(cell.folder).content), current[key]
        same = saved["has_content"].equal(has_vector) and saved["content_table"].shape == vectors.shape
        # vectors of one encoder that were made twice may differ by rounding
        if not same or not torch.allclose(saved["content_table"], vectors, rtol=1e-3, atol=1e-4):
            raise ValueError(
                f"{cell.folder}: was made with other vectors than {', '.join(key)} holds now; delete that folder, or "
                f"give the study another `out`"
            )


def run_study(
    study: StudyConfig,
    out: Path,
    source: str = "study",
    launch: Launch | None = None,
    print_line: Callable[[str], Any] = print,
    jobs: int = 1,
) -> list[Outcome]:
    """Make the cells that are not finished, each in a process whose output goes to the cell's log.

    All configs are checked before the first run starts. A cell that was killed is resumed. A cell that fails gets the
    outcome "failed", and the other cells are made all the same.

    Args:
        source: name of the study in error messages.
        launch: starts a run; default: `python -m finetune.train`.
        print_line: called with each line of progress.
        jobs: number of runs at a time.

    Raises:
        ValueError: as `study_cells`, `make_tables` and `check_contents`; for a dataset folder that does not exist, for
            a run folder of another config, and while another process writes to `out`.
    """
    if not Path(study.data).is_dir():
        raise ValueError(
            f"{source}: data: no folder {study.data!r}; name a dataset folder, from where the study is started"
        )
    cells = study_cells(study, out, source)
    with claimed(out) as claims:
        return _run_cells(study, out, cells, launch or partial(_launch, jobs, claims), print_line, jobs)


def _run_cells(
    study: StudyConfig, out: Path, cells: list[Cell], launch: Launch, print_line: Callable[[str], Any], jobs: int
) -> list[Outcome]:
    """Check finished cells, make the tables, and run the other cells, `jobs` at a time."""
    finished = [cell.is_finished() for cell in cells]
    make_tables(study, out)
    check_contents([cell for cell, is_finished in zip(cells, finished, strict=True) if is_finished])
    outcomes: dict[Path, Future[Outcome]] = {}
    printing = threading.Lock()

    def print_locked(line: str) -> None:
        with printing:  # print writes a line and its end one after the other
            print_line(line)

    with ThreadPoolExecutor(jobs) as pool:
        for number, (cell, is_finished) in enumerate(zip(cells, finished, strict=True), 1):
            label = f"[{number}/{len(cells)}] {cell.name}"
            # the run of an expert begins before the runs that read it, so waiting for an expert cannot block
            expert = None if cell.after is None else outcomes[cell.after]
            outcomes[cell.folder] = pool.submit(_run_cell, cell, is_finished, expert, label, launch, print_locked)
        try:
            return [future.result() for future in outcomes.values()]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # whoever interrupts a study wants no further run


def _run_cell(
    cell: Cell,
    is_finished: bool,
    expert: Future[Outcome] | None,
    label: str,
    launch: Launch,
    print_line: Callable[[str], Any],
) -> Outcome:
    """Run a cell that is not finished, after the cell of the expert, and print lines that begin with `label`."""
    if is_finished:
        print_line(f"{label}: finished before")
        return Outcome(cell, "kept")
    if expert is not None and expert.result().state == "failed":
        print_line(f"{label}: not started: the run it reads, {cell.after}, has failed")
        return Outcome(cell, "failed", f"it reads the run {cell.after}, which has failed")
    print_line(f"{label}: output in {cell.log}")
    begun = time.perf_counter()
    cell.log.parent.mkdir(parents=True, exist_ok=True)
    code = launch(cell.arguments, cell.log)
    if code == 0 and RunFolder(cell.folder).metrics.is_file():
        print_line(f"{label}: {time.perf_counter() - begun:.0f} s")
        return Outcome(cell, "made")
    print_line(f"{label}: FAILED with exit code {code}; its output is in {cell.log}")
    return Outcome(cell, "failed", _last_lines(cell.log))


def _yaml_value(value: Any) -> str:
    """A value as YAML text, whatever characters a path has: JSON is YAML too."""
    return json.dumps(value, ensure_ascii=False)


def _cell_folder(out: Path, protocol: str, method: str, seed: int) -> Path:
    """The run folder of a cell."""
    return out / "runs" / protocol / method / f"seed{seed}"


def _table_file(out: Path, name: str) -> Path:
    """The file of a table of `study.tables`."""
    return out / "tables" / f"{name}.npz"


def _launch(jobs: int, claims: tuple[int, ...], arguments: Sequence[str], log: Path) -> int:
    """Run `finetune.train` in a process, its output appended to a log; returns the exit code.

    The process inherits the file descriptors `claims`, which hold the claim on the study's folder: a run that outlives
    a killed study is still writing there.
    """
    environment = recipe_environment()
    if jobs > 1:  # each run would take all cores for itself
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    with open(log, "ab") as output:  # a resumed cell keeps the output of earlier starts
        command = [sys.executable, "-m", recipe_module("finetune"), *arguments]
        run = subprocess.run(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False, pass_fds=claims
        )
    return run.returncode


def _last_lines(log: Path, count: int = 5) -> str:
    """The last lines of a log that are not blank."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return "\n".join([line for line in text.splitlines() if line.strip()][-count:])
