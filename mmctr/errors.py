"""Errors of users as one line at the command line, and the progress that commands and recipes show."""

from __future__ import annotations

import logging
import os
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


class exit_on_error:
    """A context manager for commands: ValueError and OSError end the program with a message and exit code 1, and Ctrl-C
    with a message and exit code 130, as in shells. Other exceptions are bugs and keep the traceback.

    With the environment variable `MMCTR_TRACEBACK=1` all exceptions keep the traceback.
    """

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if os.environ.get("MMCTR_TRACEBACK"):
            return
        if isinstance(error, ValueError | OSError):
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        if isinstance(error, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
            sys.exit(130)
