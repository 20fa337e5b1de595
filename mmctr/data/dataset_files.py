"""The files of a dataset: a folder with tables of fixed names, or files that a `dataset.yaml` describes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from mmctr.data.described_tables import described_files, read_interactions, read_items, read_users
from mmctr.data.description import DESCRIPTION, DatasetDescription
from mmctr.data.tables import MissingColumns, find_table, read_table, table_format
from mmctr.files import read_yaml

TABLES = ("items", "interactions", "users")
_REQUIRED = {"items": ("item_id",), "interactions": ("user_id", "item_id", "timestamp", "label"), "users": ("user_id",)}


@dataclass(frozen=True)
class SourceTable:
    """A table as it was read."""

    table: pa.Table
    """the rows, with the column names of a dataset folder"""
    name: str
    """the file, or the section of the description, for messages"""
    ids_from_text: bool
    """whether the types of the ids were guessed from text, where 7 may be the number or the text"""


@dataclass(frozen=True)
class DatasetFiles:
    """The files of a dataset.

    Args:
        folder: the dataset folder.
        source: the file of the description, or None.
        description: what the file says, or None for a folder with `items.*`, `interactions.*` and `users.*`.
    """

    folder: Path
    source: Path | None
    description: DatasetDescription | None

    @classmethod
    def at(cls, path: Path, schema: Path | None = None) -> DatasetFiles:
        """The files of a dataset folder, or of the folder of a description.

        Args:
            path: a dataset folder, which may hold a `dataset.yaml`, or a YAML file that describes the files of the
                folder that the YAML file lies in.
            schema: a description to read instead of the one in the folder.

        Raises:
            ValueError: the description is missing or invalid, or lies beside tables of fixed names that it ignores.
        """
        if schema is None and path.suffix.lower() in (".yaml", ".yml") and path.is_file():
            path, schema = path.parent, path
        own = path / DESCRIPTION
        if schema is None and own.is_file():
            schema = own
        if schema is None:
            return cls(path, None, None)
        return cls(path, schema, DatasetDescription.parse(read_yaml(schema), str(schema)))

    def of(self, stem: str) -> list[Path]:
        """The files of one of `TABLES`; empty for a table that is not there.

        Raises:
            ValueError: a described file is missing.
        """
        if self.description is None:
            found = find_table(self.folder, stem)
            if found is None:
                return []
            return sorted(path for path in found.rglob("*") if path.is_file()) if found.is_dir() else [found]
        described = getattr(self.description, stem)
        if described is None:
            return []
        return [file for file, _ in described_files(described, self.folder, f"{self.source}: {stem}")]

    def all_files(self, without_items: bool = False) -> list[Path]:
        """The description and the files of all tables.

        Args:
            without_items: leave the files of the catalog out.
        """
        own = [] if self.source is None else [self.source]
        return own + [file for stem in TABLES if stem != "items" or not without_items for file in self.of(stem)]

    def read(self, without_items: bool = False) -> dict[str, SourceTable]:
        """All tables that are there.

        Args:
            without_items: leave the catalog out.

        Returns:
            name of `TABLES` -> table.

        Raises:
            ValueError: a table cannot be read; one error names the missing columns of all tables.
        """
        tables, missing = {}, []
        for stem in TABLES:
            if stem == "items" and without_items:
                continue
            try:
                table = self._read(stem)
            except MissingColumns as error:
                missing.append(str(error))
                continue
            if table is not None:
                tables[stem] = table
        if missing:
            raise MissingColumns("\n".join(missing))
        if self.description is not None and self.description.items is None and not without_items:
            tables["items"] = _catalog_of(tables["interactions"])
        return tables

    def _read(self, stem: str) -> SourceTable | None:
        if self.description is None:
            path = find_table(self.folder, stem)
            if path is None:
                return None
            return SourceTable(read_table(path, _REQUIRED[stem]), str(path), table_format(path) == "csv")
        described = getattr(self.description, stem)
        if described is None:
            return None
        name = f"{self.source}: {stem}"
        if stem == "items":
            table = read_items(described, self.folder, name)
        elif stem == "users":
            table = read_users(described, self.folder, name)
        else:
            table = read_interactions(described, self.folder, name)
        is_text = described.format in ("csv", "tsv") or table_format(self.of(stem)[0]) != "parquet"
        return SourceTable(table, name, is_text)


def _catalog_of(log: SourceTable) -> SourceTable:
    """A catalog with nothing but the ids of the items of a log."""
    ids = log.table.column("item_id").unique().drop_null()
    return SourceTable(pa.table({"item_id": ids}), log.name, log.ids_from_text)
