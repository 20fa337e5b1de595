"""How a user's mistake looks at the command line."""

from __future__ import annotations

import os
import sys
from typing import Any


class UnknownId(ValueError):
    """An item or a user that is asked for is not there."""


class exit_on_error:
    """Turns ValueError and OSError into one message and exit code 1; everything else is a bug and keeps its traceback.

    `MMCTR_TRACEBACK=1` shows the traceback of these too.
    """

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, ValueError | OSError) and not os.environ.get("MMCTR_TRACEBACK"):
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
