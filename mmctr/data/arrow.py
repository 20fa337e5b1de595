"""`pyarrow.compute` as `pc`, typed as Any: pyarrow creates the functions at import time, unknown to type checkers."""

from __future__ import annotations

from typing import Any

import pyarrow.compute

pc: Any = pyarrow.compute
