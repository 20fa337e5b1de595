"""Manifests: JSON files that describe a folder and hold the digests of the files in the folder.

A file that was cut, changed or exchanged after it was written is found before it is parsed. Files are read once a
process for that, at one to two gigabytes a second; `MMCTR_VERIFY=0` in the environment leaves the digests out.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mmctr.files import read_json, write_json

DIGESTS = "digests"
"""key of a manifest under which the digests lie"""
_ITSELF = "manifest"
_known: dict[tuple[str, int, int, int], str] = {}
"""digests that this process has computed, by path, inode, size and time of the last change"""


@dataclass(frozen=True)
class Manifest:
    """A manifest that was read and is unchanged."""

    path: Path
    """the JSON file"""
    values: dict[str, Any]
    """the entries without digests"""
    digests: dict[str, str]
    """SHA-256 of each file, by the path inside the folder"""
    remedy: str
    """what to do about a damaged file, for messages"""

    def check(self, *names: str) -> None:
        """Check files of the folder.

        Args:
            names: paths inside the folder; none: all files of the manifest.

        Raises:
            ValueError: a file is missing, no regular file, unknown to the manifest, or was changed; the message names
                the file and the remedy.
        """
        for name in names or self.digests:
            problem = self.problem(name)
            if problem is not None:
                raise ValueError(f"{self.path.parent / name}: {problem}; {self.remedy}")

    def problem(self, name: str) -> str | None:
        """What is wrong with a file of the folder, such as "missing"; None for a file that is as it was written.

        Raises:
            ValueError: the name leads out of the folder.
        """
        file = inside(self.path.parent, name, self.path)
        if name not in self.digests:
            return f"{self.path.name} does not know it"
        if not file.is_file():
            return "not a regular file" if file.exists() else "missing"
        if verifies() and digest(file) != self.digests[name]:
            return f"damaged, or changed since it was written ({file.stat().st_size:,} bytes)"
        return None


def verifies() -> bool:
    """Whether digests of files are checked: `MMCTR_VERIFY` is not 0."""
    return os.environ.get("MMCTR_VERIFY", "1") != "0"


def digest(file: Path) -> str:
    """SHA-256 of a file in hexadecimal digits; an unchanged file is read once a process."""
    stat = file.stat()
    key = (str(file.resolve()), stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if key not in _known:
        with open(file, "rb") as handle:
            _known[key] = hashlib.file_digest(handle, "sha256").hexdigest()
    return _known[key]


def write_manifest(path: Path, values: dict[str, Any], files: Iterable[str]) -> None:
    """Write a manifest, completely or not at all. The files must be written before.

    Args:
        path: the JSON file.
        values: the entries, JSON-serialisable.
        files: paths of the files inside the folder of the manifest.

    Raises:
        OSError: the manifest cannot be written.
    """
    digests = {name: digest(path.parent / name) for name in sorted(files)}
    values = json.loads(json.dumps(values, default=_plain))  # the digest is of what a reader will parse
    write_json(path, {**values, DIGESTS: {_ITSELF: _of_values(values, digests), "files": digests}})


def read_manifest(path: Path, remedy: str) -> Manifest:
    """Read a manifest. The files are checked by `Manifest.check`.

    Args:
        path: the JSON file.
        remedy: what to do about a damaged file, for messages, such as "run `mmctr index` again".

    Raises:
        ValueError: the file is missing, no manifest, or was changed after it was written; the message names the file
            and the remedy.
    """
    try:
        values = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from None
    digests = values.pop(DIGESTS, None) if isinstance(values, dict) else None
    digests = digests if isinstance(digests, dict) else {}
    files = digests.get("files")
    if not isinstance(files, dict) or not all(isinstance(value, str) for value in files.values()):
        raise ValueError(f"{path}: holds no digests of files: not written by mmctr, or by an older version; {remedy}")
    if digests.get(_ITSELF) != _of_values(values, files):
        raise ValueError(f"{path}: damaged, or changed since it was written; {remedy}")
    return Manifest(path, values, files, remedy)


def require_types(values: Any, source: Path | str, /, **types: type | tuple[type, ...]) -> None:
    """Check the entries of a JSON object that strangers may have written.

    Args:
        values: what the file holds.
        source: the file, for the message.
        types: type or types by key. A number that is no bool is `float`, whole numbers included.

    Raises:
        ValueError: `values` is no object, or an entry is missing or of another type; the message names the key and the
            value.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{source}: holds {_short(values)} where an object with {', '.join(types)} is expected")
    for key, kinds in types.items():
        allowed = kinds if isinstance(kinds, tuple) else (kinds,)
        wanted = (*allowed, int) if float in allowed else allowed
        value = values.get(key)
        if key not in values or not isinstance(value, wanted) or (isinstance(value, bool) and bool not in allowed):
            found = f"is {_short(value)}" if key in values else "is missing"
            names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in allowed)
            raise ValueError(f"{source}: {key} {found}, but must be of type {names}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def inside(folder: Path, name: Any, source: Path) -> Path:
    """The path of a file that a manifest names.

    Args:
        folder: the folder.
        name: the value that names the file.
        source: the file that holds the name, for the message.

    Raises:
        ValueError: the value is no path of a file inside the folder.
    """
    parts = Path(name).parts if isinstance(name, str) and "\0" not in name else ()
    if not parts or Path(name).is_absolute() or ".." in parts:
        raise ValueError(f"{source}: names the file {name!r}, which is no file inside the folder {folder}")
    return folder / name


def _of_values(values: dict[str, Any], digests: dict[str, str]) -> str:
    text = json.dumps([values, digests], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def require_replaceable(folder: Path, manifest: str, names: Iterable[str], kind: str) -> None:
    """Check that a folder may be replaced whole: the folder is missing or empty, or this program has written all of it.

    Args:
        folder: the folder that a command is asked to write.
        manifest: name of the manifest of such a folder.
        names: names of the other files and folders of such a folder, as patterns of `fnmatch`.
        kind: name of such a folder, for the message, such as "index".

    Raises:
        ValueError: the path is a file, or the folder holds something else; the message names it.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder}: is a file; choose another --out")
    entries = sorted(path.name for path in folder.iterdir())
    if not entries:
        return
    patterns = (manifest, *names, ".*.tmp", ".lock")
    foreign = [name for name in entries if not any(fnmatch(name, pattern) for pattern in patterns)]
    if manifest not in entries or foreign or _is_foreign(folder / manifest):
        what = f"{foreign[0]!r} is none of its files" if manifest in entries and foreign else f"no {kind} of mmctr"
        raise ValueError(f"{folder}: the folder is not empty, and would be replaced: {what}; choose another --out")


def _is_foreign(path: Path) -> bool:
    """Whether a file of the name of a manifest was written by another program; a damaged manifest is our own."""
    try:
        values = read_json(path)
    except ValueError:
        return not path.is_file()
    return not isinstance(values, dict) or DIGESTS not in values
