"""Actions and types of command-line arguments that argparse does not have."""

from __future__ import annotations

import argparse
from typing import Any


class QueryPart(argparse.Action):
    """Collects the parts of a query in the order they are given: (kind, value)."""

    KINDS = {"--item": "item_id", "--text": "text", "--image": "image", "--user": "user_id"}

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        parts = getattr(namespace, self.dest) or []
        namespace.parts = [*parts, (self.KINDS[str(option_string)], values)]


def parse_size(text: str) -> int:
    """Bytes of a size like `500MB`, in powers of 1000; a bare number is bytes. Raises ArgumentTypeError."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    unit = units.get(text[-2:].upper())
    try:
        return int(float(text[:-2]) * unit) if unit else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it like 500MB or 4GB") from None


class Version(argparse.Action):
    """`--version`: what a bug report should name. Reads the metadata of the packages and imports none of them."""

    def __init__(self, option_strings: Any, dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
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
