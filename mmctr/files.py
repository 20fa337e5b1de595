"""Files and folders that are either whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file completely or not at all. A failure leaves an existing file unchanged.

    Args:
        path: the file.
        write: function that writes the contents to the path of a temporary file, which is then flushed and renamed.

    Raises:
        OSError: the file cannot be written, for example because the disk is full; the message names the file, the
            reason and the remedy.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _explained(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            _sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Add the file and the remedy to the message of an error while writing."""
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
        ValueError: the file is missing or is not valid JSON; the message names the file.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None


def replace_folder(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a folder completely or not at all, replacing an existing folder. A failure leaves an existing folder
    unchanged.

    Args:
        path: the folder.
        write: function that writes the files into a temporary folder, which is then flushed and renamed.

    Raises:
        OSError: a file cannot be written; the message names the folder, the reason and the remedy.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    with _explained(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            write(temporary)
            for file in temporary.rglob("*"):
                if file.is_file():
                    _sync(file)
            if path.exists():
                os.replace(path, old)
                try:
                    os.replace(temporary, path)
                except BaseException:
                    os.replace(old, path)
                    raise
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.replace(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes of this user and machine out of the same block for the same `path`; they wait.

    So several runs may be started at once on a dataset that is not prepared yet. A process that waits for more than a
    second logs a warning, again and again but ever more rarely. The lock file stays in a folder of the cache that no
    other user can write to: removing a file that others wait for would let two of them in.

    Raises OSError where that folder cannot be made.
    """
    folder = cache_folder() / (f"locks-{os.getuid()}" if hasattr(os, "getuid") else "locks")
    with _explained(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = FileLock(folder / f"{fingerprint(str(Path(path).resolve()))}.lock")
    begun, pause = time.monotonic(), 1.0
    while True:
        try:
            lock.acquire(timeout=pause)
            break
        except Timeout:
            waited = time.monotonic() - begun
            logger.warning(
                "%s: another process works on it; waiting for %.0f s for the lock file %s", path, waited, lock.lock_file
            )
            pause = min(2 * pause, 60.0)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def claimed(folder: Path) -> Iterator[tuple[int, ...]]:
    """Refuse a folder that another process of this machine has claimed and works in.

    Yields the file descriptors that child processes take over (`pass_fds`): the folder stays claimed for as long as
    one of them lives, though its parent was killed. Raises ValueError where it is claimed already, which without POSIX
    locks it never is, and OSError where it cannot be written to.
    """
    # Not a FileLock as in `locked`: filelock has no public way to the file descriptor that a child would inherit, and
    # releasing a FileLock unlocks (LOCK_UN) for all processes that have the file open, so for the children too.
    try:
        import fcntl
    except ImportError:
        yield ()
        return
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / ".lock", "a")  # noqa: SIM115
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder}: another process works in this folder, or one that it has started and left behind still "
                f"goes on; wait until it has ended, or end it"
            ) from None
        yield (handle.fileno(),)  # closing gives it up; unlocking would for the children too


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
