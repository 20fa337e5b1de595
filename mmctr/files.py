"""Files and folders that are either whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import yaml

logger = logging.getLogger(__name__)
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]
"""the host in names of temporary files: process numbers of other hosts say nothing here"""


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file completely or not at all. A failure leaves an existing file unchanged.

    Args:
        path: the file.
        write: function that writes the contents to the path of a temporary file, which is then flushed and renamed.

    Raises:
        OSError: the file cannot be written, for example because the disk is full; the message names the file, the
            reason and the remedy.
    """
    path = _behind_links(Path(path))
    temporary = _temporary(path)
    with explained(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_left_behind(path)
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            write(temporary)
            _sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def _behind_links(path: Path) -> Path:
    """The file or folder to write: the target of a link, which stays a link."""
    return path.resolve() if path.is_symlink() else path


def _temporary(path: Path) -> Path:
    """A hidden path beside a file or folder, which names host and process and cannot be guessed: a link that someone
    has put at a guessed path would lead to a foreign file."""
    return path.with_name(f".{path.name}.{_HOST}-{os.getpid()}-{secrets.token_hex(8)}.tmp")


def _remove_left_behind(path: Path) -> None:
    """Remove temporary files and folders of the same path whose process on this host was killed."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{_HOST}-*.tmp"):
        process = left.name.removesuffix(".tmp").rsplit("-", 2)[-2]
        if process.isdecimal() and not _is_alive(int(process)):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                with suppress(OSError):
                    left.unlink()


def _is_alive(process: int) -> bool:
    """Whether a process of this host runs; True where that cannot be found out."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two folders in one step, so that a killed process leaves one of them under each name.

    Returns:
        Whether the system can do so: Linux (renameat2) and macOS (renamex_np) on most file systems.
    """
    try:
        library = ctypes.CDLL(None, use_errno=True)
        names = os.fsencode(one), os.fsencode(other)
        if sys.platform == "darwin":
            return library.renamex_np(*names, 2) == 0  # RENAME_SWAP
        return library.renameat2(-100, names[0], -100, names[1], 2) == 0  # AT_FDCWD, RENAME_EXCHANGE
    except (OSError, AttributeError, TypeError):
        return False


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Within the context, add the file and the remedy to the message of an error while writing."""
    try:
        yield
    except Exception as error:
        # safetensors reports a full disk with an exception class of its own
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise OSError(
                f"cannot write {path}: {error}. {remedy_of(error)}, then start the same command again: what was saved "
                f"before is intact"
            ) from error
        raise


def remedy_of(error: BaseException) -> str:
    """The advice for an error while writing: to free space only where the disk, the quota or a file is full."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    names = {errno.errorcode.get(number) for number in map(_number_of, causes) if number is not None}
    # NumPy gives no number: "4096 requested and 100 written"
    if names & {"ENOSPC", "EDQUOT", "EFBIG"} or any(" requested and " in str(cause) for cause in causes):
        return "Free some space or choose another folder"
    if names & {"EACCES", "EPERM", "EROFS"}:
        return "Make the folder writable or choose another folder"
    return "Mend the cause or choose another folder"


def _number_of(error: BaseException) -> int | None:
    """The number of an error of the operating system; safetensors writes the number into the message."""
    written = re.search(r"os error (\d+)", str(error))
    return int(written.group(1)) if written else getattr(error, "errno", None)


def _sync(path: Path) -> None:
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, completely or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, completely or not at all; NumPy numbers and arrays are converted.

    Raises:
        OSError: the file cannot be written.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    """A NumPy number or array as plain Python numbers, and any other value as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: the file is missing, no regular file, or not valid JSON; the message names the file.
    """
    text = _read_text(Path(path), "JSON")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits and deep nesting too
        raise ValueError(f"{path}: not valid JSON ({error})") from None


class YamlLoader(yaml.SafeLoader):
    """YAML without code. A key that stands twice is an error (plain YAML lets the last one win in silence), and merged
    mappings (`<<`) may not grow without bounds."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node. Raises ConstructorError where a key stands twice."""
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice; keep one", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge the mappings that `<<` names. Raises ConstructorError where they hold too many keys."""
        super().flatten_mapping(node)
        if len(node.value) > MOST_VALUES // 100:
            raise yaml.constructor.ConstructorError(None, None, "too many keys are merged by <<", node.start_mark)


def read_yaml(path: Path) -> Any:
    """Read a YAML file, without code.

    Raises:
        ValueError: the file is missing, no regular file, not valid YAML, or a bomb: aliases that unfold to more than a
            million values; the message names the file.
    """
    text = _read_text(Path(path), "YAML")
    try:
        values = yaml.load(text, YamlLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    if _unfolded(values, {}, set()) > MOST_VALUES:
        raise ValueError(f"{path}: aliases (*name) unfold to more than {MOST_VALUES:,} values, or contain themselves")
    return values


MOST_VALUES = 1_000_000
"""largest number of values of a YAML file with the aliases unfolded"""


def _unfolded(value: Any, known: dict[int, int], above: set[int]) -> int:
    """The number of values of nested lists and mappings, each counted as often as it is reached; infinite circles count
    as too many.

    Args:
        value: the outermost value.
        known: number by id of the lists and mappings that were counted.
        above: ids of the lists and mappings that contain the value.
    """
    if not isinstance(value, dict | list):
        return 1
    if id(value) in above:
        return MOST_VALUES + 1
    if id(value) not in known:
        above.add(id(value))
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_unfolded(part, known, above) for part in parts)
        above.discard(id(value))
    return known[id(value)]


def _read_text(path: Path, kind: str) -> str:
    try:
        if path.exists() and not path.is_file():  # a pipe would block for ever
            raise ValueError(f"{path}: not a regular file")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not valid {kind} ({error})") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None


def replace_folder(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a folder completely or not at all, replacing an existing folder. A failure leaves an existing folder
    unchanged.

    Args:
        path: the folder.
        write: function that writes the files into a temporary folder, which is then flushed and renamed.

    Raises:
        OSError: a file cannot be written; the message names the folder, the reason and the remedy.
    """
    path = _behind_links(Path(path))
    temporary, old = _temporary(path), _temporary(path)
    with explained(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_left_behind(path)
            temporary.mkdir()
            write(temporary)
            for file in temporary.rglob("*"):
                if file.is_file():
                    _sync(file)
            if not path.exists():
                os.replace(temporary, path)
            elif _exchanged(temporary, path):
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                os.replace(path, old)
                try:
                    os.replace(temporary, path)
                except BaseException:
                    os.replace(old, path)
                    raise
                shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def fingerprint(*parts: Any) -> str:
    """16 hexadecimal digits of a SHA-256 hash of some parts: JSON-serialisable values or bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True, default=str).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def user_path(path: str | Path) -> Path:
    """A path in which `~` is the home folder; shells expand it in few places, YAML and Python in none."""
    return Path(os.path.expanduser(path))


def cache_folder() -> Path:
    """The folder of files that can be computed again: `$MMCTR_CACHE`, else `~/.cache/mmctr`.

    Where the user has no home folder, or none that can be written to, as in containers with an arbitrary user id, the
    folder is a private one in the folder of temporary files.
    """
    given = os.environ.get("MMCTR_CACHE")
    if given:
        return user_path(given)
    try:
        folder = Path.home() / ".cache" / "mmctr"
    except RuntimeError:  # neither $HOME nor an entry of the user in the list of users
        return _private_folder(tempfile.gettempdir())
    return folder if is_writable(folder) else _private_folder(tempfile.gettempdir())


def is_writable(folder: Path) -> bool:
    """Whether files can be written into a folder, which need not exist."""
    existing = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


@cache
def _private_folder(temporary: str) -> Path:
    """A folder in the folder of temporary files that no other user can write to; the same one at each start, unless
    someone else made a file of that name."""
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
    folder = Path(temporary) / f"mmctr-{user}"
    with suppress(OSError):
        folder.mkdir(mode=0o700)
    try:
        status = folder.lstat()
        is_own = stat.S_ISDIR(status.st_mode) and (user == status.st_uid or not hasattr(os, "getuid"))
        is_private = is_own and not status.st_mode & 0o077
    except OSError:
        is_private = False
    if not is_private and hasattr(os, "getuid"):
        folder = Path(tempfile.mkdtemp(prefix="mmctr-"))
    logger.warning(
        "there is no home folder to write to: caches go to %s; name a folder that stays with $MMCTR_CACHE", folder
    )
    return folder
