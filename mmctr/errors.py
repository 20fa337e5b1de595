"""How a user's mistake looks at the command line."""

from __future__ import annotations

import os
import sys
from typing import Any


class UnknownId(ValueError):
    """An item or a user that is asked for is not there."""


class exit_on_error:
    """Turns ValueError and OSError into one message and exit code 1, and Ctrl-C into one and the code 130 of shells;
    everything else is a bug and keeps its traceback.

    `MMCTR_TRACEBACK=1` shows the traceback of these too.
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
