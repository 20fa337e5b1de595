from __future__ import annotations

import pytest

from tests.helpers.pages import make_run


@pytest.fixture
def folders(tmp_path):
    return [make_run(tmp_path / "din_id", 0.2, cold_skill=0.0), make_run(tmp_path / "din_table", 0.5)]
