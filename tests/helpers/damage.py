"""Changes of written files, as a damaged disk or a stranger makes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mmctr.manifests import DIGESTS, write_manifest


def rewrite(
    manifest: Path, change: Callable[[dict[str, Any]], Any] | dict[str, Any], files: Iterable[str] = ()
) -> None:
    """Change the values of a manifest and compute the digests anew: a stranger's folder, which is not damaged.

    Args:
        manifest: the manifest, with or without digests.
        change: a function that changes the values in place, or values to set.
        files: names of further files of the folder.
    """
    values = json.loads(manifest.read_text(encoding="utf-8"))
    known = values.pop(DIGESTS, {"files": {}})["files"]
    if callable(change):
        change(values)
    else:
        values |= change
    names = {*known, *files}
    write_manifest(manifest, values, [name for name in names if (manifest.parent / name).is_file()])
