"""Every Python block under `Example:` in the docstring of a public name runs as it stands."""

from __future__ import annotations

import inspect
import re
import textwrap

import pytest

import mmctr
from tests.helpers.worlds import picture

_EXAMPLE = re.compile(r"^( *)Example:\n(.*?)(?=^\1\S|\Z)", re.DOTALL | re.MULTILINE)
_BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
DEMO = {
    "pretrain": "pretrain",
    "din_id": "id",
    "din_table": "table",
    "embeddings": "embeddings",
    "index": "index",
}
"""folder of the demo -> folder of the fixture `runs`"""
TRAINING = {"fit", "train"}
"""examples that train a model: such an example has to compile, and is not run"""


def blocks(docstring: str | None) -> list[str]:
    """The Python blocks in the `Example:` sections of a docstring."""
    sections = [section for _, section in _EXAMPLE.findall(inspect.cleandoc(docstring or ""))]
    return [textwrap.dedent(code) for section in sections for _, code in _BLOCK.findall(section)]


def documented() -> dict[str, str | None]:
    """name -> docstring of the public names and the public methods of public classes, inherited ones included."""
    docstrings = {}
    for name in mmctr.__all__:
        value = getattr(mmctr, name)
        docstrings[name] = value.__doc__
        if inspect.isclass(value):
            for base in value.__mro__:
                if not base.__module__.startswith("mmctr."):
                    continue
                for method, member in vars(base).items():
                    function = getattr(member, "__func__", member)
                    if not method.startswith("_") and (inspect.isfunction(function) or isinstance(member, property)):
                        docstrings.setdefault(f"{name}.{method}", function.__doc__)
    return docstrings


EXAMPLES = [
    pytest.param(name, code, id=f"{name}-{number}")
    for name, docstring in documented().items()
    for number, code in enumerate(blocks(docstring))
]


@pytest.fixture(scope="module")
def demo(runs, toy_folder, tmp_path_factory):
    """A folder with `demo/`, as `mmctr demo` leaves one, and a picture `new.jpg`."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "demo").mkdir()
    (folder / "demo" / "data").symlink_to(toy_folder)
    for name, run in DEMO.items():
        (folder / "demo" / name).symlink_to(runs / run)
    (folder / "new.jpg").write_bytes(picture((200, 30, 30), size=32))
    return folder


def test_blocks_are_read_from_example_sections_alone():
    text = """A function.

    ```python
    not_an_example
    ```

    Args:
        x: a number.

    Example:
        ```python
        if x:
            first
        ```

    Raises:
        ValueError: never.
    """
    assert blocks(text) == ["if x:\n    first\n"]
    assert blocks(None) == []


def test_there_are_examples_of_every_part():
    assert len(EXAMPLES) >= 20
    names = {str(example.values[0]).partition(".")[0] for example in EXAMPLES}
    assert {"open_dataset", "split_interactions", "EmbeddingTable", "ItemIndex", "ToyWorld", "auc", "gauc"} <= names
    assert {"load", "ItemEncoder", "ItemSearch", "Ranker", "compare", "RunFolder"} <= names


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), EXAMPLES)
def test_an_example_runs(name, code, demo, monkeypatch):
    monkeypatch.chdir(demo)
    compiled = compile(code, f"example of {name}", "exec")
    if name not in TRAINING:
        exec(compiled, {"mmctr": mmctr})
