from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from mmctr import files
from mmctr.files import (
    cache_folder,
    fingerprint,
    read_json,
    read_yaml,
    replace_file,
    replace_folder,
    write_json,
    write_text,
)

REMEDY = "Free some space or choose another folder, then start the same command again: what was saved before is intact"

# A limit on the size of files does to a process what a full disk does.
_LIMITED = """
import resource, sys
from pathlib import Path
import numpy as np
from mmctr.files import replace_file, replace_folder, write_text
noise = np.random.default_rng(0).integers(0, 256, 1 << 20, dtype=np.uint8)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
target = Path(sys.argv[2])
def numpy_file(path):
    with open(path, "wb") as handle:
        np.save(handle, noise)
def parquet_file(path):
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.table({"a": noise}), path)
def safetensors_file(path):
    import safetensors.numpy
    safetensors.numpy.save_file({"a": noise}, path)
def folder(path):
    (path / "small").write_text("new")
    numpy_file(path / "large.npy")
try:
    {
        "text": lambda: write_text(target, "x" * (1 << 20)),
        "numpy": lambda: replace_file(target, numpy_file),
        "parquet": lambda: replace_file(target, parquet_file),
        "safetensors": lambda: replace_file(target, safetensors_file),
        "folder": lambda: replace_folder(target, folder),
    }[sys.argv[1]]()
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("kind", ["text", "numpy", "parquet", "safetensors", "folder"])
def test_a_full_disk_leaves_the_old_one_and_names_the_remedy(tmp_path, kind):
    target = tmp_path / "here" / "target"
    file = target / "old" if kind == "folder" else target
    file.parent.mkdir(parents=True)
    file.write_text("before")
    command = [sys.executable, "-c", _LIMITED, kind, str(target)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.startswith(f"cannot write {target}: ") and REMEDY in result.stdout
    assert file.read_text() == "before"
    assert os.listdir(target.parent) == ["target"]  # nothing half-written is left behind
    assert kind != "folder" or os.listdir(target) == ["old"]


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "Free some space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Free some space"),
        (PermissionError(errno.EACCES, "Permission denied"), "Make the folder writable"),
        (OSError(errno.EROFS, "Read-only file system"), "Make the folder writable"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), "Mend the cause"),
        (IsADirectoryError(errno.EISDIR, "Is a directory"), "Mend the cause"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "Free some space"),
        (SafetensorError("I/O error: Permission denied (os error 13)"), "Make the folder writable"),
    ],
)
def test_the_advice_fits_the_cause(tmp_path, error, remedy):
    """Also where an error in a file of a folder is explained twice."""

    def fail(path: Path) -> None:
        raise error

    for replace in (replace_file, lambda path, write: replace_folder(path, lambda to: replace_file(to / "x", write))):
        with pytest.raises(OSError, match=rf"cannot write .*\. {remedy} or choose another folder, then"):
            replace(tmp_path / "target", fail)


def test_the_cache_of_a_user_without_a_home_is_private(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("MMCTR_CACHE", raising=False)
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    folder = cache_folder()
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o077 == 0
    assert cache_folder() == folder and len(caplog.records) == 1  # told once
    files._private_folder.cache_clear()
    assert cache_folder() == folder  # found again at the next start


@pytest.mark.parametrize("planted", ["open", "link", "file"])
def test_a_folder_that_someone_else_prepared_is_not_used(tmp_path, monkeypatch, planted):
    monkeypatch.delenv("MMCTR_CACHE", raising=False)
    temporary = tmp_path / planted
    temporary.mkdir()
    monkeypatch.setattr(files.tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "below"))
    (tmp_path / "file").mkdir(exist_ok=True)
    monkeypatch.setattr(files, "is_writable", lambda folder: False)
    trap = temporary / f"mmctr-{os.getuid()}"
    if planted == "open":
        trap.mkdir(mode=0o777)
        trap.chmod(0o777)
    elif planted == "link":
        (tmp_path / "other").mkdir(mode=0o700)
        trap.symlink_to(tmp_path / "other")
    else:
        trap.write_text("")
    assert cache_folder() != trap and cache_folder().parent == temporary


def test_a_tilde_in_the_name_of_the_cache_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MMCTR_CACHE", "~/cached")
    assert cache_folder() == tmp_path / "cached"


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("before")
    for replace in (replace_file, replace_folder):
        with pytest.raises(OSError, match=r"cannot write .*file/below"):
            replace(tmp_path / "file" / "below", lambda path: None)
    assert (tmp_path / "file").read_text() == "before"


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_other_errors_pass_through_and_leave_the_old_one(tmp_path, error):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("before")
    (tmp_path / "folder" / "old").write_text("before")

    def fail(path: Path) -> None:
        (path / "part" if path.is_dir() else path).write_text("half")
        raise error

    for replace, name in ((replace_file, "file"), (replace_folder, "folder")):
        with pytest.raises(type(error)):
            replace(tmp_path / name, fail)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "old").read_text() == "before"


def test_replacing(tmp_path):
    for text in ("one", "two ünï"):
        write_text(tmp_path / "new" / "file", text)
        assert (tmp_path / "new" / "file").read_text(encoding="utf-8") == text

        def write(path: Path, text: str = text) -> None:
            (path / text).write_text(text)

        replace_folder(tmp_path / "folder", write)
        assert os.listdir(tmp_path / "folder") == [text]
    assert sorted(os.listdir(tmp_path)) == ["folder", "new"] and os.listdir(tmp_path / "new") == ["file"]


def test_the_old_folder_comes_back_when_the_new_one_cannot_be_put_in_its_place(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("before")
    replace = os.replace
    monkeypatch.setattr("mmctr.files._exchanged", lambda one, other: False)
    monkeypatch.setattr(os, "replace", lambda a, b: _refuse() if (Path(a) / "new").exists() else replace(a, b))
    with pytest.raises(OSError, match=r"cannot write .*folder: no"):
        replace_folder(tmp_path / "folder", lambda path: (path / "new").write_text("x"))
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(tmp_path / "folder") == ["old"]


def _refuse() -> None:
    raise OSError("no")


def test_json(tmp_path):
    value = {"a": [1, 2.5, None, "größe"], "b": {"c": True}}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == value
    with pytest.raises(ValueError, match=r"y\.json: no such file"):
        read_json(tmp_path / "y.json")
    for data in (b'{"a": ', b"\xff\xfe\x00"):
        (tmp_path / "x.json").write_bytes(data)
        with pytest.raises(ValueError, match=r"x\.json: not valid JSON"):
            read_json(tmp_path / "x.json")


def test_numbers_of_numpy_stay_numbers(tmp_path):
    write_json(tmp_path / "x.json", {"count": np.int64(3), "rate": np.float32(0.5), "ids": np.arange(2)})
    assert read_json(tmp_path / "x.json") == {"count": 3, "rate": 0.5, "ids": [0, 1]}


def test_fingerprint():
    parts = [("a",), ("b",), ("a", "b"), ("ab",), (["a", "b"],), (1,), ("1",), (None,), (b"a",), (["a", ["b"]],), ()]
    assert len({fingerprint(*part) for part in parts}) == len(parts)
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert len(fingerprint()) == 16


def test_a_planted_link_is_not_followed(tmp_path):
    """Temporary names cannot be guessed, and are made anew: a link under such a name is not written through."""
    (tmp_path / "precious").write_text("mine")
    seen = []

    def write(path: Path) -> None:
        seen.append(path.name)
        path.write_text("new")

    for _ in range(2):
        replace_file(tmp_path / "file", write)
    assert seen[0] != seen[1] and (tmp_path / "precious").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["file", "precious"]


def test_links_given_as_output_stay_links(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "file").write_text("old")
    (tmp_path / "filelink").symlink_to(tmp_path / "real" / "file")
    replace_file(tmp_path / "filelink", lambda path: path.write_text("new"))
    assert (tmp_path / "filelink").is_symlink() and (tmp_path / "real" / "file").read_text() == "new"
    replace_folder(tmp_path / "link", lambda path: (path / "x").write_text("x"))
    assert (tmp_path / "link").is_symlink() and os.listdir(tmp_path / "real") == ["x"]


def test_new_files_have_the_rights_of_any_file(tmp_path):
    (tmp_path / "plain").write_text("x")
    write_text(tmp_path / "file", "x")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from mmctr.files import replace_file, replace_folder\n"
        "write = lambda path: os.kill(os.getpid(), 9)\n"
        "(replace_file if sys.argv[2] == 'file' else replace_folder)(Path(sys.argv[1]), write)\n"
    )
    for kind, replace in (("file", replace_file), ("folder", replace_folder)):
        path = tmp_path / kind
        subprocess.run([sys.executable, "-c", code, str(path), kind], check=False)
        (left,) = os.listdir(tmp_path)
        assert left.startswith(f".{kind}.") and left.endswith(".tmp")
        mine = tmp_path / left.replace(left.split("-")[1], str(os.getpid()))  # of a process that runs
        mine.write_text("being written")
        if kind == "file":
            replace(path, lambda temporary: temporary.write_text("x"))
        else:
            replace(path, lambda temporary: (temporary / "x").write_text("x"))
        assert sorted(os.listdir(tmp_path)) == sorted([mine.name, kind])
        mine.unlink()
        path.unlink() if kind == "file" else shutil.rmtree(path)


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="no system call exchanges two folders")
def test_folders_are_exchanged_in_one_step(tmp_path, monkeypatch):
    """A reader finds the old or the new folder at every moment: between two renames there would be none."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("before")
    renamed = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: renamed.append((a, b)) or replace(a, b))
    replace_folder(tmp_path / "folder", lambda path: (path / "new").write_text("x"))
    assert not renamed and os.listdir(tmp_path / "folder") == ["new"] and os.listdir(tmp_path) == ["folder"]


def test_json_of_strangers(tmp_path):
    path = tmp_path / "x.json"
    for text in ("[" * 100_000, "1" * 10_000, '"\\ud800'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"x\.json: not valid JSON"):
            read_json(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="not a regular file"):
        read_json(path)
    with pytest.raises(ValueError, match="not a regular file"):
        read_json(tmp_path)


def test_yaml_of_strangers(tmp_path):
    path = tmp_path / "x.yaml"
    many = [", ".join([f"*a{n}"] * 9) for n in range(12)]
    lists = "a0: &a0 [1]\n" + "".join(f"a{n + 1}: &a{n + 1} [{all_of}]\n" for n, all_of in enumerate(many))
    merges = "a0: &a0 {k: 1}\n" + "".join(
        f"a{n + 1}: &a{n + 1} {{<<: [{all_of}], k{n}: 1}}\n" for n, all_of in enumerate(many)
    )
    itself = "a: &a [*a]"
    for text, message in ((lists, "unfold to more"), (itself, "contain themselves")):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"x\.yaml: .*{message}"):
            read_yaml(path)
    path.write_text(merges)
    try:
        assert len(read_yaml(path)["a12"]) == 13
    except ValueError as error:  # PyYAML before 6.0.4 keeps each key as often as it is merged
        assert "merged by <<" in str(error)
    for text in ("a: [1", "a: 1\na: 2", "!!python/object/apply:os.system [ls]", "[" * 5000):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"x\.yaml: not valid YAML"):
            read_yaml(path)
    path.write_text("a: &a {b: 1}\nc: {<<: *a, d: 2}\n")
    assert read_yaml(path) == {"a": {"b": 1}, "c": {"b": 1, "d": 2}}
