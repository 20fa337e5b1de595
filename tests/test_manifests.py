"""Manifests find every change of a file, and never lead out of the folder."""

from __future__ import annotations

import json
import os

import pytest

from mmctr.manifests import DIGESTS, read_manifest, require_replaceable, require_types, write_manifest

AGAIN = "write it again"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "a.bin").write_bytes(bytes(range(256)))
    (tmp_path / "part" / "b.txt").write_text("b")
    write_manifest(tmp_path / "m.json", {"format": 1, "ratio": 0.1, "text": "größe"}, ["a.bin", "part/b.txt"])
    return tmp_path


def test_what_was_written_is_read(folder):
    manifest = read_manifest(folder / "m.json", AGAIN)
    assert manifest.values == {"format": 1, "ratio": 0.1, "text": "größe"}
    assert set(manifest.digests) == {"a.bin", "part/b.txt"}
    manifest.check()
    manifest.check("a.bin")


def test_each_flipped_byte_of_a_file_and_of_the_manifest_is_found(folder):
    data = folder / "a.bin"
    for position in (0, 100, 255):
        whole = data.read_bytes()
        data.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(ValueError, match=r"a\.bin: damaged, or changed .*write it again"):
            read_manifest(folder / "m.json", AGAIN).check()
        data.write_bytes(whole)
    whole = (folder / "m.json").read_bytes()
    values = json.loads(whole)
    found = 0
    for position in range(len(whole)):
        changed = whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :]
        (folder / "m.json").write_bytes(changed)
        try:
            manifest = read_manifest(folder / "m.json", AGAIN)
            manifest.check()
        except ValueError as error:
            assert "m.json" in str(error) or "part" in str(error) or "a.bin" in str(error)
            found += 1
        else:  # white space between the values
            assert manifest.values | {DIGESTS: values[DIGESTS]} == values
    assert found > 0.7 * len(whole)


def test_missing_cut_and_irregular_files(folder):
    (folder / "a.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.bin: damaged"):
        read_manifest(folder / "m.json", AGAIN).check()
    (folder / "a.bin").unlink()
    with pytest.raises(ValueError, match=r"a\.bin: missing; write it again"):
        read_manifest(folder / "m.json", AGAIN).check()
    os.mkfifo(folder / "a.bin")  # would block for ever
    with pytest.raises(ValueError, match=r"a\.bin: not a regular file"):
        read_manifest(folder / "m.json", AGAIN).check()
    with pytest.raises(ValueError, match="does not know it"):
        read_manifest(folder / "m.json", AGAIN).check("c")
    (folder / "m.json").unlink()
    os.mkfifo(folder / "m.json")
    with pytest.raises(ValueError, match=r"m\.json: not a regular file; write it again"):
        read_manifest(folder / "m.json", AGAIN)


@pytest.mark.parametrize("name", ["../a.bin", "/etc/passwd", "", "part/../../x", "a\0b"])
def test_names_do_not_lead_out_of_the_folder(folder, name):
    text = json.dumps(json.loads((folder / "m.json").read_text())[DIGESTS])
    write_manifest(folder / "m.json", {}, [])
    manifest = read_manifest(folder / "m.json", AGAIN)
    with pytest.raises(ValueError, match="no file inside the folder"):
        manifest.check(name)
    assert text


def test_digests_can_be_left_out(folder, monkeypatch):
    (folder / "a.bin").write_bytes(b"x")
    monkeypatch.setenv("MMCTR_VERIFY", "0")
    read_manifest(folder / "m.json", AGAIN).check()
    (folder / "a.bin").unlink()
    with pytest.raises(ValueError, match="missing"):
        read_manifest(folder / "m.json", AGAIN).check()


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "null", '{"digests": 3}', '{"digests": {"files": {"a": 3}}}'])
def test_what_is_no_manifest_is_named(folder, text):
    (folder / "m.json").write_text(text)
    with pytest.raises(ValueError, match=r"m\.json: .*write it again"):
        read_manifest(folder / "m.json", AGAIN)


def test_only_folders_of_mmctr_are_replaced(folder, tmp_path):
    names = ("a.bin", "part")
    require_replaceable(folder, "m.json", names, "table")
    require_replaceable(folder / "nothing", "m.json", names, "table")
    with pytest.raises(ValueError, match=r"'a\.bin' is none of its files"):
        require_replaceable(folder, "m.json", ("part",), "table")
    (folder / "m.json").write_text('{"format": 1}')  # of another program
    with pytest.raises(ValueError, match="no table of mmctr"):
        require_replaceable(folder, "m.json", names, "table")
    (folder / "m.json").write_text("{")  # damaged
    require_replaceable(folder, "m.json", names, "table")
    (folder / "m.json").unlink()
    with pytest.raises(ValueError, match="no table of mmctr"):
        require_replaceable(folder, "m.json", names, "table")
    with pytest.raises(ValueError, match="is a file"):
        require_replaceable(folder / "a.bin", "m.json", names, "table")


def test_types_are_checked():
    values = {"a": 1, "b": 0.5, "c": None, "d": True}
    require_types(values, "x.json", a=int, b=float, c=(str, type(None)), d=bool)
    require_types(values, "x.json", a=float)
    for types, message in (
        ({"d": int}, r"x\.json: d is True, but must be of type int"),
        ({"b": int}, "b is 0.5"),
        ({"c": str}, "c is None, but must be of type str"),
        ({"e": list}, "e is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            require_types(values, "x.json", **types)
    with pytest.raises(ValueError, match=r"holds \[\] where an object with a"):
        require_types([], "x.json", a=int)
