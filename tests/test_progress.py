"""Progress is logged: commands and recipes show it, an importing program decides itself."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from mmctr.errors import RANK_VARIABLES, show_progress

LOG = "log = logging.getLogger('mmctr.somewhere')\nlog.info('going on')\nlog.warning('beware')"
SHOW = "from mmctr.errors import show_progress\nshow_progress()\nshow_progress()\nlogging.basicConfig(level=20)\n"


@pytest.fixture
def logger(monkeypatch):
    logger = logging.getLogger("mmctr")
    before = logger.level, logger.propagate, logger.handlers[:]
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    yield logger
    logger.setLevel(before[0])
    logger.propagate, logger.handlers[:] = before[1:]


@pytest.mark.parametrize(("set_up", "out"), [(SHOW, "going on\n"), ("", "")])
def test_a_library_is_silent_until_progress_is_asked_for(set_up, out):
    done = subprocess.run(
        [sys.executable, "-c", f"import logging\n{set_up}{LOG}"], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == (out, "beware\n")


@pytest.mark.parametrize("name", RANK_VARIABLES)
def test_the_main_process_alone_shows_progress(logger, monkeypatch, capsys, name):
    for rank, shown in (("0", "going on\n"), ("1", "")):
        monkeypatch.setenv(name, rank)
        show_progress()
        logging.getLogger("mmctr.somewhere").info("going on")
        logging.getLogger("mmctr.somewhere").warning("beware")
        said = capsys.readouterr()
        assert (said.out, said.err) == (shown, "beware\n")


def test_other_libraries_stay_as_they_are(logger, capsys):
    show_progress()
    logging.getLogger("another").info("chatter")
    assert capsys.readouterr() == ("", "") and not any(
        type(handler).__name__ == "_Console" for handler in logging.root.handlers
    )
