"""The console script `mmctr`; `mmctr --help` is fast because each command imports modules only when it runs."""

from __future__ import annotations

from collections.abc import Sequence

from mmctr.cli.parser import make_parser
from mmctr.errors import exit_on_error, show_progress, write_any_character


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; a ValueError, a mistake of the user, is one line on stderr and the exit code 1.

    Args:
        argv: arguments; None: those of the process.
    """
    write_any_character()
    with exit_on_error():
        arguments = make_parser().parse_args(argv)
        show_progress()
        arguments.run(arguments)
