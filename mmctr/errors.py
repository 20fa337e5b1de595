"""Errors of users, and the messages that the command line prints for errors."""

from __future__ import annotations

import os
import sys
from typing import Any


class UnknownId(ValueError):
    """The id of an item or a user that is unknown to a catalog, a log or an index."""


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
