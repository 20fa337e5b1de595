"""Errors of users as one line at the command line, and the progress that commands and recipes show."""

from __future__ import annotations

import io
import logging
import os
import select
import sys
from typing import Any

RANK_VARIABLES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
"""where torchrun, accelerate and MPI say the number of a process"""


class UnknownId(ValueError):
    """The id of an item or a user that is unknown to a catalog, a log or an index."""


class _Console(logging.Handler):
    """Messages alone, without time or level: on stdout, warnings and errors on stderr; flushed, as jobs are watched."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr if record.levelno >= logging.WARNING else sys.stdout, flush=True)


def show_progress() -> None:
    """Show what mmctr logs, from INFO in the main process of a launch and from WARNING in the others.

    For commands and recipes. A program that imports mmctr sets up `logging` as it likes; unless it does, Python shows
    the warnings of a library and nothing else.
    """
    logger = logging.getLogger("mmctr")
    rank = next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), "0")
    logger.setLevel(logging.INFO if rank == "0" else logging.WARNING)
    if not any(isinstance(handler, _Console) for handler in logger.handlers):
        logger.addHandler(_Console())
        logger.propagate = False  # libraries that log through the root logger give it a handler: lines would be doubled


def write_any_character() -> None:
    """Let stdout and stderr write escapes like `\\u6905` for characters that the encoding of the terminal, pipe or file
    lacks (cp1252 on Windows, ASCII in containers), instead of raising UnicodeEncodeError after all the work."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors != "backslashreplace":
            stream.reconfigure(errors="backslashreplace")


class exit_on_error:
    """A context manager for commands: ValueError and OSError end the program with a message and exit code 1, and Ctrl-C
    with a message and exit code 130, as in shells. Other exceptions are bugs and keep the traceback.

    A program that reads stdout and ends early, as in `mmctr search ... | head`, ends the command without a word, with
    exit code 141, as shells say for SIGPIPE.

    With the environment variable `MMCTR_TRACEBACK=1` all exceptions keep the traceback.
    """

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if (error is None or isinstance(error, BrokenPipeError | SystemExit)) and not _stdout_is_read():
            sys.exit(141)
        if os.environ.get("MMCTR_TRACEBACK"):
            return
        if isinstance(error, ValueError | OSError):
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        if isinstance(error, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
            sys.exit(130)


def _stdout_is_read() -> bool:
    """Whether stdout takes all that was printed. Where the reader has gone, the rest is dropped: Python would print
    another error on the way out."""
    try:
        sys.stdout.flush()
        if not _reader_has_gone():  # an unbuffered stdout has nothing to flush
            return True
    except BrokenPipeError:
        pass
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return False


def _reader_has_gone() -> bool:
    """Whether stdout is a pipe that nobody reads any more; False where the operating system does not say."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # Windows; a stdout without a file, as in notebooks
        return False
