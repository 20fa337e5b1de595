"""What commands print, wherever it goes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

RUN = "from mmctr.errors import exit_on_error, write_any_character\nwrite_any_character()\nwith exit_on_error():\n    "


def started(code: str, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", RUN + code],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1"])
def test_a_character_that_the_output_lacks_is_escaped(encoding):
    code = "print('\\u6905 \\xe9'); raise ValueError('no item \\u6905')"
    run = started(code, PYTHONIOENCODING=encoding)
    out, err = run.communicate(timeout=60)
    assert out.rstrip() == "\\u6905 é".encode(encoding, "backslashreplace") and run.returncode == 1
    assert err.rstrip() == rb"error: no item \u6905"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_ends_early_ends_the_command_without_a_word(lines, unbuffered):
    """As `head` does: also where all output fits into the buffer and fails at the end alone."""
    run = subprocess.Popen(
        [sys.executable, "-c", RUN + f"input(); [print('line') for _ in range({lines})]"],
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert run.stdin is not None and run.stdout is not None and run.stderr is not None
    run.stdout.close()
    run.stdin.write(b"go\n")
    run.stdin.close()
    assert run.stderr.read() == b"" and run.wait(timeout=60) == 141


def test_a_broken_pipe_elsewhere_is_an_error():
    _, err = started("raise BrokenPipeError(32, 'of a worker')").communicate(timeout=60)
    assert err.startswith(b"error: ") and b"of a worker" in err
