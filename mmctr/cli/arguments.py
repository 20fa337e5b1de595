"""Actions and types of command-line arguments: parts of queries, sizes in bytes, and `--version`."""

from __future__ import annotations

import argparse
import os
from typing import Any


class QueryPart(argparse.Action):
    """Collects the parts of a query, pairs of kind and value, in the order of the command line."""

    KINDS = {"--item": "item_id", "--text": "text", "--image": "image", "--user": "user_id"}
    """kind of a part by the option"""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Append a part, as argparse asks."""
        parts = getattr(namespace, self.dest) or []
        namespace.parts = [*parts, (self.KINDS[str(option_string)], values)]


def path(text: str) -> str:
    """A path with the home folder in place of `~`, which shells leave in `--out=~/x`."""
    return os.path.expanduser(text)


def parse_size(text: str) -> int:
    """The number of bytes of a size such as `500MB`, in powers of 1000; a number without unit is bytes.

    Raises:
        ArgumentTypeError: the text is no size.
    """
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    unit = units.get(text[-2:].upper())
    try:
        return int(float(text[:-2]) * unit) if unit else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it like 500MB or 4GB") from None


class Version(argparse.Action):
    """`--version`: prints the versions for a bug report, from the metadata of packages, without imports."""

    def __init__(self, option_strings: Any, dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Print the versions and exit, as argparse asks."""
        import platform
        from importlib.metadata import PackageNotFoundError, version

        def known(package: str) -> str:
            try:
                return f"{package} {version(package)}"
            except PackageNotFoundError:
                return f"{package} (not installed)"

        packages = ("mmctr", "torch", "transformers", "open-clip-torch", "accelerate", "faiss-cpu")
        print(", ".join([*map(known, packages), f"Python {platform.python_version()}", platform.platform()]))
        parser.exit()
