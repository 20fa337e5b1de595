"""A study of cold items: methods x protocols x seeds, each cell an ordinary run of `finetune.train`.

`StudyConfig` says what is compared, `study_cells` lays out the runs, `run_study` makes those that are not there yet.
What is then read off them is in `mmctr.studies.results`.
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
from mmctr.files import claimed, clone_folder
from mmctr.runs.folder import first_difference
from mmctr.studies.config import FactorsConfig, StudyConfig
from mmctr.studies.controls import factor_table, shuffled_table

Launch = Callable[[Sequence[str], Path], int]
"""(arguments of `finetune.train`, log file) -> exit code"""


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    protocol: str
    method: str
    seed: int
    folder: Path
    arguments: list[str]
    """of `finetune.train`"""
    config: Config
    """what they come to, a FinetuneConfig"""
    content_paths: tuple[str, ...]
    """tables of item vectors that the ranker reads, empty for a ranker without"""
    after: Path | None = None
    """folder of the cell whose run it reads"""

    @property
    def name(self) -> str:
        return f"{self.protocol} / {self.method} / seed {self.seed}"

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    def is_finished(self) -> bool:
        """Whether its numbers are there. Raises ValueError where the folder holds a run of another config."""
        path = self.folder / "config.yaml"
        if path.is_file():
            there = type(self.config).load(path).model_dump(mode="json")
            differing = first_difference(there, self.config.model_dump(mode="json"))
            if differing:
                key, before, now = differing
                raise ValueError(
                    f"{self.folder}: holds a run of another config ({key}: {before!r} there, {now!r} in the study); "
                    f"delete that folder, or give the study another `out`"
                )
        return path.is_file() and (self.folder / "metrics.json").is_file()


@dataclass(frozen=True)
class Outcome:
    """The state of a cell after a call of `run_study`."""

    cell: Cell
    state: Literal["kept", "made", "failed"]
    reason: str = ""
    """Why the cell failed: the last lines of its log, or the failed run that the cell reads."""


def study_cells(study: StudyConfig, out: Path, source: str = "study") -> list[Cell]:
    """The runs of a study, protocol by protocol, seed by seed, method by method; their configs are checked.

    The first seed of all methods comes before the second of any, so that a study stopped halfway compares something.
    Raises ValueError naming the study and the method for a config that does not load, or is not of a clone.
    """
    clone = str(clone_folder("mmctr coldstart"))
    if clone not in sys.path:  # the console script knows the library alone
        sys.path.insert(0, clone)
    from finetune.train import FinetuneConfig

    cells = []
    for protocol, split in study.protocols.items():
        for seed in study.seeds:
            for name, method in study.methods.items():
                folder = _cell_folder(out, protocol, name, seed)
                after = None if method.after is None else _cell_folder(out, protocol, method.after, seed)
                changes = [*study.set, *method.set]
                if after is not None:
                    changes.append(f"task.make.run={_quoted(str(after))}")
                if method.table is not None:
                    changes.append(f"task.embedder.content.path={_quoted(str(_table_file(out, method.table)))}")
                changes += [
                    f"data.path={_quoted(study.data)}",
                    f"split={_quoted(split.model_dump(mode='json'))}",
                    f"seed={seed}",
                    f"run_dir={_quoted(str(folder))}",
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
    """Write the study's own tables to OUT/tables/NAME.npz.

    Raises ValueError where one is there and would come out otherwise today: runs may have been made with it.
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
    """Raises ValueError where a finished cell read other vectors than its `content.path` holds today: those made from
    now on would read the new ones, and be compared with it as if both were the same method.

    Vectors that were deleted since are nothing that could be read.
    """
    now: dict[tuple[str, ...], tuple[torch.Tensor, torch.Tensor]] = {}
    for cell in cells:
        key = cell.content_paths
        if not key or not all(Path(path).exists() for path in key):
            continue
        if key not in now:
            ids = pyarrow.parquet.read_table(cell.folder / "catalog.parquet")["item_id"]
            now[key] = read_tables(list(key), one_array(ids))
        kept, (vectors, has) = load_file(cell.folder / "content.safetensors"), now[key]
        same = kept["has_content"].equal(has) and kept["content_table"].shape == vectors.shape
        # vectors of one encoder that were made twice may differ by rounding
        if not same or not torch.allclose(kept["content_table"], vectors, rtol=1e-3, atol=1e-4):
            raise ValueError(
                f"{cell.folder}: was made with other vectors than {', '.join(key)} holds now; delete that folder, or "
                f"give the study another `out`"
            )


def run_study(
    study: StudyConfig,
    out: Path,
    source: str = "study",
    launch: Launch | None = None,
    tell: Callable[[str], Any] = print,
    jobs: int = 1,
) -> list[Outcome]:
    """Make the cells that are not finished, `jobs` at a time; each is a process of its own, its output in a log.

    Nothing starts before all configs are checked. A cell that was killed goes on; one that fails is an outcome
    "failed", and the others are made all the same. Raises ValueError as `study_cells` and `make_tables` do, for a
    dataset that is not there, for a folder that holds a run of another config or of other vectors and while `out` is
    being written to.
    """
    if not Path(study.data).is_dir():
        raise ValueError(
            f"{source}: data: no folder {study.data!r}; name a dataset folder, from where the study is started"
        )
    cells = study_cells(study, out, source)
    with claimed(out) as claims:
        return _run_cells(study, out, cells, launch or partial(_launch, jobs, claims), tell, jobs)


def _run_cells(
    study: StudyConfig, out: Path, cells: list[Cell], launch: Launch, tell: Callable[[str], Any], jobs: int
) -> list[Outcome]:
    finished = [cell.is_finished() for cell in cells]
    make_tables(study, out)
    check_contents([cell for cell, there in zip(cells, finished, strict=True) if there])
    made: dict[Path, Future[Outcome]] = {}
    talking = threading.Lock()

    def say(line: str) -> None:
        with talking:  # print writes a line and its end one after the other
            tell(line)

    with ThreadPoolExecutor(jobs) as pool:
        for number, (cell, there) in enumerate(zip(cells, finished, strict=True), 1):
            place = f"[{number}/{len(cells)}] {cell.name}"
            # a cell that is read begins before the one that reads it, so waiting for it cannot block
            needs = None if cell.after is None else made[cell.after]
            made[cell.folder] = pool.submit(_make, cell, there, needs, place, launch, say)
        try:
            return [future.result() for future in made.values()]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # whoever interrupts a study wants no further run


def _make(
    cell: Cell, there: bool, needs: Future[Outcome] | None, place: str, launch: Launch, tell: Callable[[str], Any]
) -> Outcome:
    if there:
        tell(f"{place}: finished before")
        return Outcome(cell, "kept")
    if needs is not None and needs.result().state == "failed":
        tell(f"{place}: not started: the run it reads, {cell.after}, has failed")
        return Outcome(cell, "failed", f"it reads the run {cell.after}, which has failed")
    tell(f"{place}: output in {cell.log}")
    begun = time.perf_counter()
    cell.log.parent.mkdir(parents=True, exist_ok=True)
    code = launch(cell.arguments, cell.log)
    if code == 0 and (cell.folder / "metrics.json").is_file():
        tell(f"{place}: {time.perf_counter() - begun:.0f} s")
        return Outcome(cell, "made")
    tell(f"{place}: FAILED with exit code {code}; its output is in {cell.log}")
    return Outcome(cell, "failed", _last_lines(cell.log))


def _quoted(value: Any) -> str:
    """As YAML reads it, whatever characters a path has."""
    return json.dumps(value, ensure_ascii=False)


def _cell_folder(out: Path, protocol: str, method: str, seed: int) -> Path:
    return out / "runs" / protocol / method / f"seed{seed}"


def _table_file(out: Path, name: str) -> Path:
    return out / "tables" / f"{name}.npz"


def _launch(jobs: int, claims: tuple[int, ...], arguments: Sequence[str], log: Path) -> int:
    """`claims` are handed on: a run that outlives a killed study is still writing to its folder."""
    environment = dict(os.environ)
    clone = str(clone_folder("mmctr coldstart"))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [clone, os.environ.get("PYTHONPATH")]))
    if jobs > 1:  # each run would take all cores for itself
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    with open(log, "ab") as output:  # a cell that goes on keeps what it said before
        command = [sys.executable, "-m", "finetune.train", *arguments]
        run = subprocess.run(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False, pass_fds=claims
        )
    return run.returncode


def _last_lines(log: Path, count: int = 5) -> str:
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return "\n".join([line for line in text.splitlines() if line.strip()][-count:])
