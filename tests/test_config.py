from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import Field

from mmctr.config import Config
from mmctr.embedders.item_embedder import ContentTable
from mmctr.runs.config import FinetuneConfig


class Cat(Config):
    name: Literal["cat"] = "cat"
    whiskers: int = 12
    lives: float = 9.0


class Dog(Config):
    name: Literal["dog"] = "dog"
    tail: list[float] = [1.0]


Animal = Annotated[Cat | Dog, Field(discriminator="name")]


class Optimizer(Config):
    lr: float = 1e-3
    weight_decay: float | None = None


class Fit(Config):
    optimizer: Optimizer = Optimizer()
    batch_size: int = Field(32, ge=1)


class Zoo(Config):
    fit: Fit = Fit()
    animal: Animal = Cat()
    guest: Animal | None = None
    pens: dict[str, Animal] = {}
    row: list[Animal] = []
    path: str = "here"
    sizes: tuple[int, ...] = (80, 40)


def load(tmp_path, text: str, overrides: list[str] = [], name: str = "zoo.yaml") -> Zoo:  # noqa: B006
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return Zoo.load(path, overrides)


def error(tmp_path, text: str, overrides: list[str] = []) -> str:  # noqa: B006
    with pytest.raises(ValueError) as caught:
        load(tmp_path, text, overrides)
    return str(caught.value)


def test_save_and_load_round_trip(tmp_path):
    zoo = Zoo(
        fit=Fit(optimizer=Optimizer(lr=1e-300, weight_decay=0.1)),
        animal=Dog(tail=[1e-7, float("inf")]),
        pens={"name": Cat(lives=0.1 + 0.2), "007": Dog(), "größe 猫": Cat()},
        row=[Dog(), Cat()],
        path="1e-3",  # each of these would come back as another type if it were written bare and read by YAML 1.2
        sizes=(),
    )
    zoo.save(tmp_path / "saved.yaml")
    assert Zoo.load(tmp_path / "saved.yaml") == zoo
    for path in ("null", "yes", "2024-01-01", "a: b", "#x", "", "0x10", "1:30", "ünï\n two"):
        Zoo(path=path).save(tmp_path / "saved.yaml")
        assert Zoo.load(tmp_path / "saved.yaml").path == path
    assert load(tmp_path, "") == Zoo()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fits: {}", "unknown key 'fits'; did you mean 'fit'?"),
        ("fit: {batchsize: 3}", "unknown key 'fit.batchsize'; did you mean 'batch_size'?"),
        ("fit: {optimizer: {weightdecay: 1}}", "unknown key 'fit.optimizer.weightdecay'; did you mean 'weight_decay'?"),
        ("animal: {name: cat, wiskers: 3}", "unknown key 'animal.wiskers'; did you mean 'whiskers'?"),
        ("guest: {name: dog, tial: [1]}", "unknown key 'guest.tial'; did you mean 'tail'?"),
        ("pens: {a: {name: cat, livs: 3}}", "unknown key 'pens.a.livs'; did you mean 'lives'?"),
        # keys of a mapping that read like fields or names of union members
        ("pens: {whiskers: {name: cat, livs: 3}}", "unknown key 'pens.whiskers.livs'; did you mean 'lives'?"),
        ("pens: {dog: {name: cat, livs: 3}}", "unknown key 'pens.dog.livs'; did you mean 'lives'?"),
        ("row: [{name: dog}, {name: cat, livs: 3}]", "unknown key 'row.1.livs'; did you mean 'lives'?"),
        ("animal: {name: cat, zzz: 3}", "unknown key 'animal.zzz'; known keys: lives, name, whiskers"),
        ("animal: {name: dogg}", "animal.name: unknown name 'dogg'; did you mean 'dog'?"),
        ("animal: {name: horse}", "animal.name: unknown name 'horse'; it is one of cat, dog"),
        ("animal: {tail: [1]}", "animal.name is missing; it is one of cat, dog"),
        ("fit: {batch_size: 0}", "fit.batch_size: Input should be greater than or equal to 1 (given 0)"),
        ("animal: {name: dog, tail: [1, x]}", "animal.tail.1: Input should be a valid number"),
        ("1: 2", "1"),
        ("[1, 2]", "a config is a mapping of keys to values, found list"),
        ("a: [", "not valid YAML"),
        ("fit: {batch_size: 1}\npath: a\nfit: {batch_size: 2}", "the key 'fit' stands twice"),
        ("fit:\n  batch_size: 1\n  batch_size: 2", "the key 'batch_size' stands twice"),
    ],
)
def test_a_mistake_names_the_file_the_key_and_the_remedy(tmp_path, text, expected):
    message = error(tmp_path, text)
    assert message.startswith(str(tmp_path / "zoo.yaml")) and expected in message


def test_every_mistake_is_told(tmp_path):
    lines = error(tmp_path, "fit: {batchsize: 3}\npahth: x").splitlines()
    assert len(lines) == 2 and "batch_size" in lines[0] and "'path'" in lines[1]


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.yaml: no such config file"):
        Zoo.load(tmp_path / "nowhere.yaml")
    (tmp_path / "latin.yaml").write_bytes("path: größe".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.yaml: not valid YAML"):
        Zoo.load(tmp_path / "latin.yaml")


def test_overrides(tmp_path):
    zoo = load(
        tmp_path,
        "animal: {name: cat, whiskers: 3}",
        ["fit.optimizer.lr=3e-4", "animal.lives=7", "pens.a.name=dog", "sizes=[1, 2]", "path=a=b", "guest=null"],
    )
    assert zoo.fit.optimizer.lr == 3e-4 and isinstance(zoo.fit.optimizer.lr, float)
    assert zoo.animal == Cat(whiskers=3, lives=7)  # beside what the file says
    assert zoo.pens == {"a": Dog()} and zoo.sizes == (1, 2) and zoo.path == "a=b" and zoo.guest is None
    assert load(tmp_path, "fit: {batch_size: 1}", ["fit.batch_size=2", "fit.batch_size=3"]).fit.batch_size == 3


def test_another_name_by_override_drops_the_keys_of_the_old_member(tmp_path):
    text = "animal: {name: cat, whiskers: 3}"
    for overrides in (["animal.name=dog", "animal.tail=[2]"], ["animal.tail=[2]", "animal.name=dog"]):
        assert load(tmp_path, text, overrides).animal == Dog(tail=[2])
    assert load(tmp_path, text, ["animal.name=cat"]).animal == Cat(whiskers=3)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("fit.optimizer.lrr=1", "unknown key 'fit.optimizer.lrr'; did you mean 'lr'?"),
        ("fit.optimizer.lr=fast", "fit.optimizer.lr: Input should be a valid number"),
        ("fit", "override 'fit': write it as key=value"),
        ("=3", "override '=3': write it as key=value"),
        ("sizes=[1", "override 'sizes=[1': the value is not valid YAML"),
        ("fit..lr=3", "unknown key 'fit.'"),
    ],
)
def test_a_wrong_override(tmp_path, override, expected):
    assert expected in error(tmp_path, "", [override])


def test_base_is_merged_under(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "root.yaml").write_text("path: root\nfit: {batch_size: 7, optimizer: {lr: 0.5}}\nsizes: [1, 2, 3]")
    (tmp_path / "sub" / "middle.yaml").write_text("base: ../root.yaml\nanimal: {name: cat, whiskers: 3}\npath: middle")
    zoo = load(tmp_path, "base: sub/middle.yaml\nfit: {optimizer: {weight_decay: 0.1}}\nanimal: {lives: 1}\nsizes: [9]")
    assert zoo.path == "middle" and zoo.sizes == (9,)  # lists are replaced, mappings merged
    assert zoo.fit == Fit(batch_size=7, optimizer=Optimizer(lr=0.5, weight_decay=0.1))
    assert zoo.animal == Cat(whiskers=3, lives=1)
    assert load(tmp_path, "base: sub/middle.yaml\nanimal: {name: dog}").animal == Dog()  # another member replaces all


def test_base_in_a_circle_or_missing(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml")
    (tmp_path / "b.yaml").write_text("base: a.yaml")
    with pytest.raises(ValueError, match=r"a\.yaml: `base:` goes round in a circle"):
        Zoo.load(tmp_path / "a.yaml")
    with pytest.raises(ValueError, match="circle"):
        load(tmp_path, "base: zoo.yaml")
    with pytest.raises(ValueError, match=r"gone\.yaml: no such config file"):
        load(tmp_path, "base: gone.yaml")


def test_a_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Zoo().path = "there"


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch):
    """Of the file, of `base`, of values and of overrides, also within lists."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.yaml").write_text("data: {path: ~/shop, item_tables: [~/a.parquet, b.parquet]}\nrun_dir: x\n")
    (tmp_path / "c.yaml").write_text("base: ~/base.yaml\n")
    content = "task.embedder.content={name: table, path: [~/v.npz]}"
    config = FinetuneConfig.load("~/c.yaml", ["run_dir=~/runs/a", content])
    assert config.data.path == f"{tmp_path}/shop"
    assert config.data.item_tables == [f"{tmp_path}/a.parquet", "b.parquet"]
    assert config.run_dir == f"{tmp_path}/runs/a"
    assert isinstance(config.task.embedder.content, ContentTable)
    assert config.task.embedder.content.paths == [f"{tmp_path}/v.npz"]
    config.save(tmp_path / "saved.yaml")
    assert FinetuneConfig.load(tmp_path / "saved.yaml") == config
