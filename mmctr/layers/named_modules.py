"""NamedModules: modules by names that users choose, such as the columns of a table."""

from __future__ import annotations

from torch import nn


class NamedModules(nn.ModuleDict):
    """A ModuleDict that takes any text as a name, also `price.usd` and `values`, which `nn.ModuleDict` refuses.

    PyTorch keeps modules as attributes and separates the names of weights by dots. A name that PyTorch refuses is
    written with percent escapes, as in URLs; other names stay as they are, `%` aside. `keys` and the names of weights
    have the written names.
    """

    def __getitem__(self, key: str) -> nn.Module:
        return super().__getitem__(_attribute(key))

    def __setitem__(self, key: str, module: nn.Module) -> None:
        super().__setitem__(_attribute(key), module)

    def __contains__(self, key: str) -> bool:
        return super().__contains__(_attribute(key))


_TAKEN = frozenset(dir(nn.ModuleDict()))
"""attributes of every ModuleDict"""


def _attribute(name: str) -> str:
    """A name that PyTorch accepts; different names stay different, since the escapes can be read back."""
    written = name.replace("%", "%25").replace(".", "%2E")
    if written in _TAKEN or not written:
        return f"%{ord(written[0]):02X}{written[1:]}" if written else "%"
    return written
