"""Locks between processes of one machine: waiting for a folder, claiming a folder, holding a run folder."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from mmctr.files import cache_folder, explained, fingerprint

logger = logging.getLogger(__name__)
_held: dict[str, IO[str]] = {}
"""open lock files of the folders that this process holds, by the resolved folder"""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes of this user and machine out of the same block for the same `path`; they wait.

    So several runs may be started at once on a dataset that is not prepared yet. A process that waits for more than a
    second logs a warning, again and again but ever more rarely. The lock file stays in a folder of the cache that no
    other user can write to: removing a file that others wait for would let two of them in.

    Raises OSError where that folder cannot be made.
    """
    folder = cache_folder() / (f"locks-{os.getuid()}" if hasattr(os, "getuid") else "locks")
    with explained(folder):
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
    with explained(folder):
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


def hold(folder: Path) -> None:
    """Refuse a folder that another process of this machine holds, and hold the folder until `release` or the end of
    this process. A folder that this process holds already stays held.

    Unlike in `claimed`, processes that were forked do not hold the folder: a run that was killed can go on at once,
    though workers that load data live for some seconds more.

    Raises:
        ValueError: another process holds the folder.
        OSError: the folder cannot be written to.
    """
    try:
        import fcntl
    except ImportError:  # no POSIX locks
        return
    key = str(folder.resolve())
    if key in _held:
        return
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / LOCK, "a+")  # noqa: SIM115
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno != errno.EWOULDBLOCK:  # a file system without locks
            logger.warning("%s: cannot be locked (%s); start no second run in this folder", folder, error)
            handle.close()
            return
        handle.seek(0)
        holder = handle.read().strip()
        handle.close()
        raise ValueError(
            f"{folder}: another process{f' ({holder})' if holder else ''} works in this folder; wait until it has "
            f"ended, or choose another folder"
        ) from None
    handle.truncate(0)
    handle.write(f"process {os.getpid()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    handle.flush()
    _held[key] = handle


def _let_go_in_child() -> None:
    """Close the lock files in a forked process. The process that was forked from goes on holding them."""
    for handle in _held.values():
        handle.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


def release(folder: Path) -> None:
    """Give up a folder that `hold` holds; other folders are left alone."""
    handle = _held.pop(str(folder.resolve()), None)
    if handle is not None:
        handle.close()


LOCK = ".lock"
"""file in a held folder that names the process"""
