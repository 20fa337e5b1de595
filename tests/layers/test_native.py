from __future__ import annotations

import pytest
import torch

from mmctr.layers import native
from mmctr.layers.dice import Dice


def test_without_a_compiler_torch_does_it(monkeypatch, tmp_path):
    native.library.cache_clear()
    monkeypatch.setenv("MMCTR_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "/no/such/compiler")
    try:
        with pytest.warns(UserWarning, match="cannot be compiled or loaded.*goes on with torch"):
            assert native.library() is None
        assert Dice(3)(torch.randn(5, 3)).shape == (5, 3)
        native.library.cache_clear()
        monkeypatch.setenv("MMCTR_NATIVE", "0")
        assert native.library() is None
    finally:
        native.library.cache_clear()
