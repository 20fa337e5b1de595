"""The reference of config keys: complete, true to what the configs accept, and findable by a mistyped key."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError

import mmctr
from mmctr.cli.config import ROOTS, config_class, config_command, entries_of, shipped_path
from mmctr.cli.main import main
from mmctr.config import Config, read_config
from mmctr.config_reference import Entry, compact_text, find, full_text, nearest, reference, type_name, undocumented
from mmctr.runs.launch import run_recipe
from mmctr.shipped import shipped_configs
from tests.helpers.tiny import CLONE


class Cat(Config):
    """Purrs. Sleeps."""

    name: Literal["cat"] = "cat"
    lives: int = Field(default=9, ge=1, le=9)
    """how often
    it may fall"""


class Dog(Config):
    """Barks."""

    name: Literal["dog"] = "dog"
    tail: list[Annotated[float, Field(gt=0)]] = Field(default=[1.5], min_length=1)
    """lengths of the tail"""
    mute: bool = False


Animal = Annotated[Cat | Dog, Field(discriminator="name")]


class Food(Config):
    """Meals."""

    grams: int = 10
    """weight of a meal. Dry"""


class Zoo(Config):
    """Animals."""

    mascot: Animal = Cat(lives=7)
    """the one on the flag"""
    pens: dict[str, Animal] = {}
    """by name"""
    rows: list[Food] = []
    """meals in turn"""
    food: Food = Food(grams=5)
    """of all"""
    treat: Food | None = None
    """now and then"""
    supper: Food = Food(grams=5)
    """at night"""
    size: tuple[float, float] = (1.0, 2.0)
    """metres"""
    town: str
    """where"""


def entry(key: str, entries: list[Entry] | None = None, **conditions: str) -> Entry:
    entries = reference(Zoo) if entries is None else entries
    (one,) = [one for one in entries if one.key == key and dict(one.conditions) == conditions]
    return one


def test_keys_of_sections_mappings_lists_and_unions_in_order():
    assert [one.key for one in reference(Zoo)] == [
        *("mascot", "mascot.name", "mascot.lives", "mascot.tail", "mascot.mute"),
        *("pens", "pens.NAME.name", "pens.NAME.lives", "pens.NAME.tail", "pens.NAME.mute"),
        *("rows", "rows.0.grams", "food", "food.grams", "treat", "treat.grams", "supper", "supper.grams"),
        *("size", "town"),
    ]


def test_an_entry_has_type_default_bounds_and_meaning():
    lives = entry("mascot.lives", mascot="cat")
    assert (lives.type, lives.default, lives.bounds) == ("int", "7", "≥ 1, ≤ 9")  # the default of the parent's value
    assert lives.meaning == "how often it may fall"
    tail = entry("mascot.tail", mascot="dog")
    assert (tail.type, tail.default, tail.bounds) == ("list of float", "[1.5]", "at least 1 long, each > 0")
    name = entry("mascot.name")
    assert (name.type, name.default, name.meaning) == ("cat | dog", "cat", "`cat`: Purrs; `dog`: Barks")
    assert entry("pens.NAME.name").default == "required" and entry("town").default == "required"
    assert entry("pens.NAME.lives", **{"pens.NAME": "cat"}).default == "9"
    assert (entry("treat").type, entry("treat").default) == ("section or null", "null")
    assert (entry("size").type, entry("size").default) == ("list of 2 float", "[1.0, 2.0]")
    assert entry("pens").type == "mapping of names to section" and type_name(int | list[str]) == "int or list of str"


def test_an_entry_names_the_files_whose_text_sets_the_key(tmp_path):
    (tmp_path / "a.yaml").write_text("mascot: {name: dog, tail: [2]}\ntown: x\nrows: [{grams: 1}]")
    (tmp_path / "b.yaml").write_text("base: a.yaml\nmascot: {mute: true}\npens: {rex: {name: dog}, tom: {lives: 3}}")
    (tmp_path / "c.yaml").write_text("base: a.yaml\npens: {tom: {name: cat, lives: 3}}")
    entries = reference(Zoo, sorted(tmp_path.glob("*.yaml")))
    assert entry("town", entries).files == entry("rows.0.grams", entries).files == ("a.yaml",)
    assert entry("mascot.tail", entries, mascot="dog").files == ("a.yaml",)
    assert entry("mascot.mute", entries, mascot="dog").files == ("b.yaml",)  # the name is that of the base
    assert entry("mascot.lives", entries, mascot="cat").files == ()
    assert entry("pens.NAME.lives", entries, **{"pens.NAME": "cat"}).files == ("c.yaml",)
    assert read_config(tmp_path / "c.yaml", with_base=False) == {"pens": {"tom": {"name": "cat", "lives": 3}}}


def test_a_key_is_found_with_those_below_and_with_the_user_s_own_names():
    entries = reference(Zoo)
    assert [one.key for one in find(entries, "food")] == ["food", "food.grams"]
    assert {one.key for one in find(entries, "pens.tom.lives")} == {"pens.NAME.lives"}
    assert {one.key for one in find(entries, "rows.3.grams")} == {"rows.0.grams"}
    with pytest.raises(ValueError, match=r"no config key 'mascott'; did you mean mascot, "):
        find(entries, "mascott")
    with pytest.raises(ValueError, match=r"no config key 'qqqq'; `mmctr config` lists the sections"):
        find(entries, "qqqq")
    assert nearest(entries, "grams") == ["rows.0.grams", "food.grams", "treat.grams", "supper.grams"]


def test_texts():
    text = compact_text(reference(Zoo), width=60)
    assert "  -- mascot.name: dog\n  mascot.tail  (list of float, default [1.5], at least 1" in text
    assert "\n\nsupper  (section)\n    the keys of `food`; at night\n" in text and "supper.grams" not in text
    assert "weight of a meal.\n" in text and "Dry" not in text
    assert max(map(len, full_text(reference(Zoo), width=60).splitlines())) <= 60
    assert "    with mascot.name: cat" in full_text(find(reference(Zoo), "mascot.lives"))


def test_fields_without_a_docstring_are_told():
    assert undocumented(Dog) == ["Dog.mute"] and undocumented(Zoo) == []


def config_classes() -> dict[str, type[Config]]:
    """All config classes of the library by module and name."""
    for module in pkgutil.walk_packages(mmctr.__path__, "mmctr."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found, waiting = {}, [Config]
    while waiting:
        for cls in waiting.pop().__subclasses__():
            waiting.append(cls)
            # a worked example of the docs, which another test imports under the name of a module here, is no part of it
            path = Path(inspect.getfile(cls)).resolve() if cls.__module__ in sys.modules else None
            if cls.__module__.startswith("mmctr.") and path is not None and path.is_relative_to(CLONE / "mmctr"):
                found[f"{cls.__module__}.{cls.__name__}"] = cls
    return found


def test_every_field_and_config_of_the_library_has_a_docstring():
    classes = config_classes()
    assert len(classes) > 50
    assert [field for cls in classes.values() for field in undocumented(cls)] == []
    assert [name for name, cls in classes.items() if not cls.__dict__.get("__doc__")] == []


@pytest.mark.parametrize("root", ROOTS)
def test_the_reference_covers_every_key_of_the_shipped_configs(root):
    entries = entries_of(root)
    files = shipped_configs("studies" if root == "study" else root)
    named = {name for one in entries for name in one.files}
    assert named == {path.name for path in files}
    for path in files:
        values = read_config(path)
        assert config_class(root).parse(values)
        for key in keys(values):
            free = [one for one in entries if "any value" in one.type and key.startswith(f"{one.key}.")]
            assert free or find(entries, key), (path, key)


def keys(values: dict, prefix: str = "") -> list[str]:
    """Dotted names of all keys of nested mappings."""
    named = {f"{prefix}{name}": value for name, value in values.items()}
    return [
        *named,
        *(key for name, value in named.items() if isinstance(value, dict) for key in keys(value, f"{name}.")),
    ]


def test_bounds_are_those_that_are_enforced():
    validation = entry("validation", entries_of("pretrain"))
    assert validation.bounds == "> 0, < 1"
    for wrong in (0.0, 1.0):
        with pytest.raises(ValidationError):
            config_class("pretrain").model_validate({"validation": wrong})


def test_the_command(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    main(["config"])
    out = capsys.readouterr().out
    assert (
        "== finetune.train: " in out
        and "== pretrain.train: " in out
        and "  protocols    split of the interactions" in out
    )
    text = config_command("fit.epochs", None)
    assert text.startswith("== pretrain.train, finetune.train\n\nfit.epochs\n") and "pretrain/ml1m.yaml" in text
    assert config_command("task.ranker.attention", "finetune").count("with task.ranker.name: din") == 1
    with pytest.raises(SystemExit):
        main(["config", "task.rankr"])
    assert capsys.readouterr().err.startswith("error: no config key 'task.rankr'; did you mean task.ranker, ")
    with pytest.raises(SystemExit):
        main(["config", "task.ranker", "--recipe", "pretrain"])
    assert "no config key 'task.ranker'" in capsys.readouterr().err


def test_the_place_of_a_shipped_config(capsys):
    main(["config", "--where", "configs/accelerate/gpu.yaml"])
    assert capsys.readouterr().out == f"{CLONE / 'configs' / 'accelerate' / 'gpu.yaml'}\n"
    with pytest.raises(ValueError, match=r"configs/accelerate/tpu\.yaml: no shipped config .* configs/accelerate/cpu"):
        shipped_path("configs/accelerate/tpu.yaml")


@pytest.mark.parametrize("recipe", ["pretrain", "finetune"])
def test_the_help_of_a_recipe_has_its_docstring_and_all_keys(recipe, capsys):
    module = importlib.import_module(f"{recipe}.train")
    for arguments, code in ((["--help"], 0), (["-h"], 0), ([], 2)):
        with pytest.raises(SystemExit) as stopped:
            run_recipe(module.main, config_class(recipe), arguments)
        out = capsys.readouterr().out
        assert stopped.value.code == code and out.startswith(module.__doc__.split("\n")[0])
        assert "\nfit.optimizer.lr  (float, default 0.001, > 0)\n" in out and "run_dir  (str, required)" in out


def test_the_reference_and_the_command_load_no_torch():
    code = "import sys, mmctr.config_reference, mmctr.cli.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=CLONE).returncode == 0
    code = (
        "import sys, mmctr.cli.main as m\ntry:\n    m.main(['--version'])\n"
        "except SystemExit:\n    sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=CLONE, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("mmctr ") and ", torch " in done.stdout
    assert "Python " in done.stdout
