"""Modules by names that users choose."""

from __future__ import annotations

from torch import nn

from mmctr.layers.named_modules import NamedModules

NAMES = ["type", "values", "pop", "training", "_modules", "price.usd", "price%2Eusd", "100 %", "", "brand", "é/ü"]


def test_every_name_has_a_module_that_is_found_by_the_name() -> None:
    modules = NamedModules()
    for number, name in enumerate(NAMES, 1):
        assert name not in modules
        modules[name] = nn.Linear(number, 1)
    assert [modules[name].in_features for name in NAMES] == list(range(1, len(NAMES) + 1))
    assert len(modules.state_dict()) == 2 * len(NAMES)


def test_an_ordinary_name_stays_as_it_is_in_the_names_of_weights() -> None:
    modules = NamedModules()
    modules["brand"] = nn.Linear(1, 1, bias=False)
    modules["price.usd"] = nn.Linear(1, 1, bias=False)
    assert list(modules.state_dict()) == ["brand.weight", "price%2Eusd.weight"]
