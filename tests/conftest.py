from __future__ import annotations

import os
from pathlib import Path

import pytest

from mmctr.data.toy import ToyWorld, ToyWorldConfig


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """Datasets prepared by tests go into a folder of this session, not into the user's cache."""
    before = os.environ.get("MMCTR_CACHE")
    os.environ["MMCTR_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield Path(os.environ["MMCTR_CACHE"])
    if before is None:
        del os.environ["MMCTR_CACHE"]
    else:
        os.environ["MMCTR_CACHE"] = before


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory) -> Path:
    """A ToyWorld of 120 items and 60 users, as a dataset folder; not to be written to."""
    config = ToyWorldConfig(num_items=120, num_users=60, impressions_per_user=30, image_size=32)
    return ToyWorld(config).write(tmp_path_factory.mktemp("toy") / "small")
