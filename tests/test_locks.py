"""Locks between processes: one waits for another, or is refused."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmctr.locks import LOCK, claimed, hold, locked, release
from tests.helpers.worlds import in_processes


def _hold(path: Path, log: Path) -> None:
    with locked(path):
        for word in ("in", "out"):
            with open(log, "a") as handle:
                handle.write(word + "\n")
            time.sleep(0.1)


def test_locked_lets_one_process_in_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setenv("MMCTR_CACHE", str(tmp_path / "cache"))
    in_processes(4, _hold, tmp_path / "x", tmp_path / "log")
    with pytest.raises(KeyError), locked(tmp_path / "x"):  # an error lets go too
        raise KeyError
    _hold(tmp_path / "x", tmp_path / "log")
    assert (tmp_path / "log").read_text().split() == ["in", "out"] * 5
    (folder,) = (tmp_path / "cache").iterdir()
    assert folder.stat().st_mode & 0o077 == 0  # nobody else can put a file or a link there
    (tmp_path / "file").touch()
    monkeypatch.setenv("MMCTR_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"cannot write .*file/locks"), locked(tmp_path / "x"):
        pass


def test_waiting_for_a_lock_is_told(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("mmctr"), "propagate", True)  # a command run by another test stops that
    code = (
        "import sys\nfrom pathlib import Path\nfrom mmctr.locks import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('in', flush=True)\n    sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "x")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin is not None and holder.stdout is not None
        assert holder.stdout.readline() == "in\n"

        def let_go(record: logging.LogRecord) -> bool:
            holder.stdin.close()  # the other process ends at the first warning
            return True

        monkeypatch.setattr(caplog.handler, "filters", [let_go])
        with locked(tmp_path / "x"):
            pass
    message = caplog.messages[0]
    assert message.startswith(f"{tmp_path / 'x'}: another process works on it; waiting for 1 s for the lock file ")
    assert Path(message.split("lock file ")[1]).is_file()
    caplog.clear()
    with locked(tmp_path / "x"):
        pass
    assert not caplog.messages


def test_a_claimed_folder_is_refused_for_as_long_as_a_child_lives(tmp_path):
    """Though the parent has given it up: what it started may still be writing."""
    folder = tmp_path / "out"
    with claimed(folder) as claims:
        with pytest.raises(ValueError, match="out: another process works in this folder"), claimed(folder):
            pass
        code = "import sys; sys.stdin.read()"
        child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, pass_fds=claims)
    with pytest.raises(ValueError, match="out: another process"), claimed(folder):
        pass
    child.communicate()
    with claimed(folder), claimed(tmp_path / "other"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write .*file: .* choose another folder"), claimed(tmp_path / "file"):
        pass


_HOLDER = (
    "import sys\nfrom pathlib import Path\nfrom mmctr.locks import hold\n"
    "import os\nhold(Path(sys.argv[1]))\nos.write(1, b'held\\n')\nsys.stdin.read()"
)


def _holder(folder: Path) -> subprocess.Popen[str]:
    """A process that holds a folder until it is told to end."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_held_folder_is_refused_to_other_processes(tmp_path):
    folder = tmp_path / "run"
    other = _holder(folder)
    with pytest.raises(ValueError, match=rf"run: another process \(process {other.pid} since .*choose another folder"):
        hold(folder)
    os.kill(other.pid, signal.SIGKILL)  # a killed process leaves no lock behind
    other.communicate()
    hold(folder)
    hold(folder / ".." / "run")  # held already
    assert str(os.getpid()) in (folder / LOCK).read_text()
    second = subprocess.run([sys.executable, "-c", _HOLDER, str(folder)], capture_output=True, text=True, check=False)
    assert second.returncode == 1 and "another process" in second.stderr
    release(folder)
    release(folder)
    _holder(folder).communicate()


def test_a_forked_child_does_not_hold_the_folder(tmp_path):
    """Workers that load data outlive a killed run by seconds, and the run may be started again at once."""
    fork = "if os.fork() == 0:\n    os.write(1, b'forked\\n')\n    sys.stdin.read()\n"
    code = _HOLDER.replace("os.write(", fork + "os.write(", 1)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert {process.stdout.readline() for _ in range(2)} == {"held\n", "forked\n"}
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    try:
        hold(tmp_path)
        release(tmp_path)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
