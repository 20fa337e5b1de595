"""Preparation of a dataset: check a dataset folder once, report the rejected rows, and store the tables that training
reads.

A prepared folder holds `prepared.json`, `report.json`, `items.parquet` (unique ids), and, for a dataset with a click
log, `interactions/` (columns sorted by user and time), `context.parquet` (the further columns of the log in the same
order) and `users.parquet` (one row per user). Caches of pictures and tokens are added to the folder on first use.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from mmctr.data.catalog import Catalog, clean_items, dataset_table
from mmctr.data.click_log import write_log
from mmctr.data.dataset_files import DatasetFiles, SourceTable
from mmctr.data.description import DESCRIPTION
from mmctr.data.interactions import AGAIN, Interactions
from mmctr.data.splits import GivenSplit, SplitConfig, Splits, split_interactions
from mmctr.data.tables import (
    one_array,
    read_table,
    rows_of,
    same_kind,
)
from mmctr.data.times import scaled_time
from mmctr.errors import UnknownId
from mmctr.files import cache_folder, fingerprint, read_json, replace_folder, user_path, write_json
from mmctr.locks import locked
from mmctr.manifests import read_manifest, require_replaceable, require_types, write_manifest

FORMAT = 2
MANIFEST = "prepared.json"
_WRITTEN = ("report.json", "items.parquet", "interactions", "context.parquet", "users.parquet")
_CACHES = ("pictures-", "tokens-", "features-")


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset: catalog, click log and users."""

    folder: Path
    """the prepared folder"""
    catalog: Catalog
    """the items"""
    report: dict[str, Any]
    """counts of the rows, and of the rejected rows by reason"""

    @cached_property
    def interactions(self) -> Interactions:
        """The click log, sorted by user and time, memory-mapped.

        Raises:
            ValueError: the dataset has no click log.
        """
        folder = self._log_path("interactions")
        self._check(*(f"{folder.name}/{name}.npy" for name in Interactions.NAMES))
        log = Interactions.load(folder)
        for column, number in (("user", len(self.users)), ("item", len(self.catalog))):
            rows = getattr(log, column)
            if len(rows) and not (rows.min() >= 0 and rows.max() < number):
                raise ValueError(f"{folder / f'{column}.npy'}: names rows beyond the {number} there are; {AGAIN}")
        return log

    @cached_property
    def context(self) -> pa.Table:
        """Further columns of the click log, in the order of `interactions`.

        Raises:
            ValueError: the dataset has no click log.
        """
        return self._log_table("context.parquet")

    @cached_property
    def users(self) -> pa.Table:
        """The users of the click log by user row: `user_id` and the columns of the users table, null for a user that
        is missing from the users table.

        Raises:
            ValueError: the dataset has no click log.
        """
        return self._log_table("users.parquet")

    def time(self, at: float | None) -> int | None:
        """A time in the unit of the column `timestamp` as an integer of `interactions.time`; None stays None.

        Raises:
            ValueError: the time is not finite or too large.
        """
        return None if at is None else scaled_time(at, self.report["interactions"]["time scale"])

    def split(self, config: SplitConfig) -> Splits:
        """Training, validation and test impressions of the click log: `split_interactions` with the columns that the
        split reads.

        Args:
            config: the way to split.

        Raises:
            ValueError: the dataset has no click log, a part is empty, or the log lacks the column of a split `given`.
        """
        context = self.context if isinstance(config, GivenSplit) else None
        return split_interactions(self.interactions, len(self.catalog), config, context)

    def user_row(self, user_id: Any) -> int:
        """The row of a user in `users`.

        Args:
            user_id: raw id; text is converted where the ids are integers.

        Raises:
            UnknownId: the user is not in the click log.
        """
        ids = one_array(self.users["user_id"])
        try:
            wanted = pa.array([user_id]).cast(ids.type) if type(user_id) in (int, str) else pa.nulls(1, ids.type)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            wanted = pa.nulls(1, ids.type)
        row = int(rows_of(wanted, ids, "users")[0])
        if row < 0:
            raise UnknownId(f"user {user_id!r} is not in the log; ids look like {ids[0].as_py()!r}")
        return row

    def _log_table(self, name: str) -> pa.Table:
        path = self._log_path(name)
        self._check(name)
        return read_table(path)

    def _has_log(self) -> bool:
        """Whether the dataset was prepared with a click log."""
        return "interactions" in self.report

    def _check(self, *names: str) -> None:
        if (self.folder / MANIFEST).is_file():  # a dataset made in memory has no files
            read_manifest(self.folder / MANIFEST, AGAIN).check(*names)

    def _log_path(self, name: str) -> Path:
        if not (self.folder / name).exists() and not self._has_log():
            raise ValueError(f"{self.report['source']}: there is no interactions table; a ranker needs a click log")
        return self.folder / name


def open_dataset(path: str | Path, items: str | None = None) -> Dataset:
    """Open a dataset: a prepared folder as it is, or a dataset folder after preparing it into the cache.

    The cache is `$MMCTR_CACHE`, else `~/.cache/mmctr`; a dataset is prepared again when one of the tables has changed.

    Args:
        path: a folder of `mmctr prepare`; or a dataset folder with `items.parquet` and optionally
            `interactions.parquet` and `users.parquet` (or the other forms that `mmctr.data.tables.find_table` reads),
            or with a `dataset.yaml` that describes other files; or such a description.
        items: a `datasets` dataset to read the items from instead: a Hub name, `NAME:SPLIT`, or a folder written by
            `save_to_disk`.

    Returns:
        The dataset, with `catalog`, `interactions`, `users` and `report`.

    Raises:
        ValueError: the folder is missing, or a table is missing or malformed; the message names the file, the column
            and the remedy.

    Example:
        ```python
        dataset = mmctr.open_dataset("demo/data")
        print(len(dataset.catalog), "items,", len(dataset.interactions), "impressions,", len(dataset.users), "users")
        print(dataset.report["interactions"]["set aside"])
        ```
    """
    path = user_path(path)
    if (path / MANIFEST).is_file():
        return _load(path)
    if not path.exists() and items is None:
        raise ValueError(f"{path}: no such dataset folder")
    files = DatasetFiles.at(path)
    key = _source_key(files, items)
    folder = cache_folder() / f"{files.folder.resolve().name or 'dataset'}-{key}"
    return _load(folder) if _is_sound(folder, key) else _locked_prepare(files, folder, items)


def prepare(path: str | Path, out: str | Path, items: str | None = None, schema: str | Path | None = None) -> Dataset:
    """Check a dataset folder and write a prepared folder; a finished prepared folder of an unchanged dataset is reused.

    Args:
        path: the dataset folder, or a description of one.
        out: the prepared folder to write.
        items: a `datasets` dataset to read the items from instead of `path/items.*`: a Hub name, `NAME:SPLIT`, or a
            folder written by `save_to_disk`.
        schema: a description of the files of the folder, instead of a `dataset.yaml` in the folder.

    Raises:
        ValueError: a table is missing or malformed, or `out` holds other files; the message names the file, the column
            and the remedy.
    """
    path, out = user_path(path), user_path(out)
    if (path / MANIFEST).is_file():
        raise ValueError(f"{path}: is a prepared folder already; use it as it is, or name the dataset it was made from")
    return _locked_prepare(DatasetFiles.at(path, None if schema is None else user_path(schema)), out, items)


def _locked_prepare(files: DatasetFiles, out: Path, items: str | None) -> Dataset:
    with locked(out):
        return _prepare(files, out, items)


def _prepare(files: DatasetFiles, out: Path, items: str | None) -> Dataset:
    key = _source_key(files, items)
    if _is_sound(out, key):
        return _load(out)
    require_replaceable(out, MANIFEST, (*_WRITTEN, *(f"{name}*" for name in _CACHES)), "prepared dataset")

    path = files.folder
    tables = files.read(without_items=items is not None)
    if items is not None:
        tables["items"] = SourceTable(_loaded_items(items), f"--items {items}", ids_from_text=False)
    if "items" not in tables:
        raise ValueError(
            f"{path}: no items.parquet, items.csv, items.tsv or items.jsonl, and no {DESCRIPTION}; or name a `datasets`"
            f" dataset with --items"
        )
    catalog_table, report = clean_items(tables["items"].table, tables["items"].name)
    result: dict[str, Any] = {"source": str(path), "items": report}
    log = tables.get("interactions")
    if log is not None:
        # ids of a CSV that look like integers are text where the ids of the other table are text
        kind = catalog_table.schema.field("item_id").type
        log = replace(log, table=same_kind(log.table, log.ids_from_text, "item_id", kind))
        kind = log.table.schema.field("item_id").type
        catalog_table = same_kind(catalog_table, tables["items"].ids_from_text, "item_id", kind)

    def write(folder: Path) -> None:
        pyarrow.parquet.write_table(catalog_table, folder / "items.parquet", row_group_size=10_000)
        if log is not None:
            result["interactions"] = write_log(log, tables.get("users"), catalog_table, folder)
        write_json(folder / "report.json", result)
        root = str(path.resolve()) if path.is_dir() else None
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        write_manifest(folder / MANIFEST, {"format": FORMAT, "key": key, "root": root}, files)

    replace_folder(out, write)
    return _load(out)


def _is_sound(folder: Path, key: str) -> bool:
    """Whether a folder holds the prepared dataset of a source key, with all files as they were written."""
    if not (folder / MANIFEST).is_file():
        return False
    try:
        manifest = read_manifest(folder / MANIFEST, AGAIN)
        manifest.check()
    except ValueError as error:
        logger.warning("%s; it is prepared again now", error)
        return False
    return manifest.values.get("key") == key


def _load(folder: Path) -> Dataset:
    manifest = read_manifest(folder / MANIFEST, AGAIN)
    values = manifest.values
    require_types(values, manifest.path, format=int, root=(str, type(None)))
    if values["format"] != FORMAT:
        raise ValueError(f"{folder}: prepared by another version (format {values['format']}); {AGAIN}")
    manifest.check("items.parquet", "report.json")
    try:
        table = pyarrow.parquet.read_table(folder / "items.parquet", memory_map=True)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{folder / 'items.parquet'}: cannot be read ({error}); {AGAIN}") from None
    if "item_id" not in table.column_names:
        raise ValueError(f"{folder / 'items.parquet'}: has no column 'item_id'; {AGAIN}")
    report = read_json(folder / "report.json")
    require_types(report, folder / "report.json", source=str, items=dict)
    return Dataset(folder, Catalog(table, folder, _root(values["root"], manifest.path)), report)


def _root(value: str | None, source: Path) -> Path | None:
    """The dataset folder that relative picture paths start from.

    Raises:
        ValueError: a root that no dataset can have: pictures would be read from anywhere on the machine.
    """
    root = None if value is None else Path(value)
    if root is not None and (not root.is_absolute() or root == root.parent):
        raise ValueError(f"{source}: root is {value!r}, but must be the folder of a dataset; {AGAIN}")
    return root


def _source_key(source: DatasetFiles, items: str | None) -> str:
    """A fingerprint that changes with any table of the dataset (pictures are checked when they are decoded)."""
    files = source.all_files(without_items=items is not None)
    if items is not None and Path(_name_and_split(items)[0]).is_dir():
        files += sorted(file for file in Path(_name_and_split(items)[0]).rglob("*") if file.is_file())
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return fingerprint(FORMAT, str(source.folder.resolve()), items, stats)


def _name_and_split(items: str) -> tuple[str, str]:
    name, _, split = ("", "", "") if Path(items).is_dir() else items.rpartition(":")
    return (name, split) if name else (items, "train")


def _loaded_items(items: str) -> pa.Table:
    """The items of a `datasets` dataset."""
    import datasets

    name, split = _name_and_split(items)
    try:
        loaded = datasets.load_from_disk(name) if Path(name).is_dir() else datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub raises many kinds
        raise ValueError(f"--items {items}: cannot be loaded by `datasets`: {error}") from None
    if isinstance(loaded, dict):
        if split not in loaded:
            raise ValueError(f"--items {items}: has splits {', '.join(map(str, loaded))}; write {name}:SPLIT")
        loaded = loaded[split]
    return dataset_table(loaded)
