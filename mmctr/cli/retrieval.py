"""The commands `mmctr index` and `mmctr search`, as functions that return text."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv, parquet

from mmctr.concepts.steering import steering_vector
from mmctr.data.embeddings import EmbeddingTable
from mmctr.data.prepare import open_dataset
from mmctr.files import replace_file
from mmctr.retrieval.index import ItemIndex
from mmctr.retrieval.merging import merge
from mmctr.retrieval.storage import columns_of, is_index
from mmctr.retrieval.tuning import Wanted
from mmctr.run_folder import RunFolder
from mmctr.runs.folder import data_config
from mmctr.serving.search import Part, Searcher


def index_command(arguments: argparse.Namespace) -> str:
    """`mmctr index`: build an index, append to it, merge indexes or remove items.

    Args:
        arguments: the parsed arguments of the command.

    Returns:
        A description of the index.

    Raises:
        ValueError: a source cannot be read, or the arguments do not fit together.
    """
    sources = [Path(source) for source in arguments.sources]
    wanted = Wanted(arguments.recall, arguments.latency_ms, arguments.memory, arguments.factory)
    default = sources[0] if len(sources) == 1 and is_index(sources[0]) else Path(f"{sources[0]}.index")
    out = Path(arguments.out or default)
    if arguments.append:
        if len(sources) > 1 or is_index(sources[0]):
            raise ValueError(f"{sources[-1]}: --append takes the items of one embedding folder or file")
        return append_to_index(EmbeddingTable.read(sources[0]), str(out), arguments.data)
    if len(sources) == 1 and not is_index(sources[0]):
        if arguments.remove:
            raise ValueError(f"{sources[0]}: --remove needs an index")
        table = EmbeddingTable.read(sources[0])
        columns = None
        if arguments.columns is not None:
            columns = _columns(table, arguments.data, arguments.columns or None)
        index = ItemIndex.build(table, wanted, columns)
        if arguments.data:
            index.take_titles(open_dataset(arguments.data).catalog.table)
    elif len(sources) == 1:
        index = ItemIndex.load(sources[0])
        if arguments.remove:
            index.remove(arguments.remove)
        if index.removed.mean() > 0.2 or not arguments.remove:
            index = index.compact()
            index.tune(arguments.recall)
    else:
        index = merge([ItemIndex.load(source) for source in sources])
        index.tune(arguments.recall)
    index.save(out)
    return f"{out}: {described(index)}"


def append_to_index(table: EmbeddingTable, out: str, data: str | None) -> str:
    """Add the items of a table that an index lacks.

    Args:
        table: the vectors.
        out: the index folder.
        data: dataset folder of the filter columns; None: the dataset of the vectors.

    Returns:
        A description of the index.

    Raises:
        ValueError: the folder holds no index, or the dataset of the filter columns is unknown.
    """
    if not is_index(Path(out)):
        raise ValueError(f"{out}: no index to append to; build it without --append")
    index = ItemIndex.load(out)
    live = index.ids.filter(pa.array(~index.removed))
    new = table.without(live)
    names = [name for name in index.items.column_names if name not in ("item_id", "title")]
    added = index.add(new, _columns(new, data, names) if names else None) if len(new) else 0
    index.save(out)
    return f"{out}: {added} items added; {described(index)}"


def check_columns(out: str, run: str, data: str | None) -> None:
    """Check, before anything is encoded, that the items of a dataset have the filter columns of an index.

    Args:
        out: the index folder.
        run: the pretraining run.
        data: dataset folder; None: the dataset of the run.

    Raises:
        ValueError: the folder holds no index, or a column is missing or has another type.
    """
    if not is_index(Path(out)):
        raise ValueError(f"{out}: no index to append to; build it without --append")
    schema = ItemIndex.load(out, mmap=True).items.schema
    names = [name for name in schema.names if name not in ("item_id", "title")]
    if not names:
        return
    catalog = open_dataset(data or data_config(run, None).path).catalog
    columns = columns_of(catalog.table, catalog.item_ids, catalog.item_ids, names)
    try:
        columns.cast(pa.schema([schema.field(name) for name in columns.column_names]))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(
            f"{out}: the columns of the dataset are of other types than those of the index: {error}"
        ) from None


def _columns(table: EmbeddingTable, data: str | None, names: list[str] | None) -> pa.Table:
    """The filter columns of the items of a table, in the order of the table; all usable columns where None."""
    folder = data or table.identity.data
    if folder is None:
        raise ValueError("the embeddings do not name the dataset; give --data")
    catalog = open_dataset(folder).catalog
    return columns_of(catalog.table, catalog.item_ids, table.ids, names)


def described(index: ItemIndex) -> str:
    """A description of an index: number of items, kind, and measured recall and latency."""
    text = f"{len(index)} items, {index.dim} dimensions, {index.factory}"
    measured = index.measured
    if not measured or not measured["queries"]:
        return text
    how = ", ".join(f"{name} {value}" for name, value in measured["setting"].items()) or "exact"
    text += (
        f" ({how}); recall@{measured['k']} {measured['recall']:.4f}, a query {measured['latency_ms']:.2f} ms, compared "
        f"with all vectors {measured['exact_latency_ms']:.2f} ms"
    )
    if measured["count"] != len(index.items):
        text += f"; measured with {measured['count']} items, `mmctr index INDEX` measures again"
    if not measured["reached"]:
        text += (
            f"\nrecall {measured['asked']} is out of reach of {index.factory} here: allow more memory, or name another "
            f"--factory"
        )
    return text


def search_command(arguments: argparse.Namespace) -> str:
    """`mmctr search`: the neighbours of a query as text or JSON, or the answers to a file of queries.

    Args:
        arguments: the parsed arguments of the command.

    Raises:
        ValueError: a query cannot be answered, or the arguments do not fit together.
    """
    index = ItemIndex.load(arguments.index, arguments.mmap)
    searcher = Searcher(index, arguments.pretrain_run, arguments.data)
    if arguments.data:
        index.take_titles(searcher.dataset.catalog.table)
    shift = _shift(arguments, index)
    if arguments.queries:
        if arguments.parts or shift is not None:
            raise ValueError("--queries reads all queries from a file: leave other queries, --more and --less out")
        return _answers(searcher.answer_file(arguments.queries, arguments.k, arguments.where), arguments.out)
    if not arguments.parts:
        raise ValueError("nothing to search by: give --item, --text, --image, --user or --queries")
    weights = arguments.weights or [1.0] * len(arguments.parts)
    if len(weights) != len(arguments.parts):
        raise ValueError(f"--weights: {len(weights)} for {len(arguments.parts)} parts of the query")
    parts = [Part(kind, value, weight) for (kind, value), weight in zip(arguments.parts, weights, strict=True)]
    neighbours = searcher.answer(parts, arguments.k, arguments.where, shift)
    if arguments.json:
        return json.dumps([vars(neighbour) for neighbour in neighbours], ensure_ascii=False)
    lines = (f"{rank:3}  {n.score:7.4f}  {n.item_id}  {n.title or ''}" for rank, n in enumerate(neighbours, 1))
    return "\n".join(lines) or ("no item fulfils the conditions" if len(index) else "the index holds no items")


def _shift(arguments: argparse.Namespace, index: ItemIndex) -> np.ndarray | None:
    """The vector (D,) that --more and --less add to a query; None without these options."""
    if not arguments.more and not arguments.less:
        return None
    identity = index.identity
    named = Path(arguments.concepts or RunFolder(Path(str(identity.run))).concepts)
    shift = steering_vector(named, arguments.more, arguments.less, arguments.strength, identity.weights)
    if len(shift) != index.dim:
        raise ValueError(f"{named}: of {len(shift)} dimensions, the vectors have {index.dim}: not of one run")
    return shift


def _answers(answers: pa.Table, out: str | None) -> str:
    """The answers to a file of queries as JSON lines, or a message after they were written to a file."""
    writers = {
        ".parquet": lambda path: parquet.write_table(answers, path),
        ".csv": lambda path: csv.write_csv(answers, path),
        ".jsonl": lambda path: path.write_text("".join(f"{line}\n" for line in _json_lines(answers)), encoding="utf-8"),
    }
    if out is None:
        return "\n".join(_json_lines(answers))
    if Path(out).suffix not in writers:
        raise ValueError(f"--out {out}: write answers to a .parquet, .csv or .jsonl file")
    replace_file(Path(out), writers[Path(out).suffix])
    return f"{out}: {len(answers)} answers"


def _json_lines(answers: pa.Table) -> list[str]:
    """Each row of a table as JSON."""
    return [json.dumps(row, ensure_ascii=False, default=str) for row in answers.to_pylist()]
