from __future__ import annotations

import datetime
import decimal
import gzip

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from mmctr.data.tables import as_ids, as_text, examples, find_table, read_table, rows_of
from tests.helpers.worlds import write_table

FORMATS = ["parquet", "csv", "jsonl"]
INTEGERS = [1, 2**24 + 1, 2**31 + 1, 2**53 + 1, 2**63 - 1, -5, 0]


def ids_of(path, name="item_id") -> pa.Array:
    return as_ids(read_table(path, (name,)).column(name), name, path)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["item_id", "user_id"])
def test_ids_are_kept_exactly(tmp_path, format, name):
    path = write_table(tmp_path / f"t.{format}", {name: INTEGERS})
    assert ids_of(path, name).to_pylist() == INTEGERS and ids_of(path, name).type == pa.int64()
    strings = ["007", "8", "ünï-猫", "1e3", " 9", "x" * 300]
    path = write_table(tmp_path / f"s.{format}", {name: strings})
    assert ids_of(path, name).to_pylist() == strings and ids_of(path, name).type == pa.string()
    path = write_table(tmp_path / f"g.{format}", {name: [3, None, 2**53 + 1], "other": [1, 2, 3]})
    assert ids_of(path, name).to_pylist() == [3, None, 2**53 + 1]


@pytest.mark.parametrize(
    "ids", [["1", "2", "03"], ["1", "+2"], ["-0", "1"], ["1", "99999999999999999999"], ["1", "2.0"]]
)
def test_csv_ids_are_integers_only_if_written_just_so(tmp_path, ids):
    assert ids_of(write_table(tmp_path / "t.csv", {"item_id": ids})).to_pylist() == ids


def test_csv_ids_as_pandas_writes_a_column_with_gaps(tmp_path):
    path = write_table(tmp_path / "t.csv", {"item_id": ["1.0", None, "-3.0", "9007199254740991.0"]})
    assert ids_of(path).to_pylist() == [1, None, -3, 2**53 - 1]


@pytest.mark.parametrize("ids", [["1.0", "02.0"], ["1.0", "2.5"], ["1.0", "a.0"], ["12345678901234567.0"]])
def test_csv_ids_that_are_not_all_such_floats_stay_text(tmp_path, ids):
    assert ids_of(write_table(tmp_path / "t.csv", {"item_id": ids})).to_pylist() == ids


@pytest.mark.parametrize("name", ["t.csv.gz", "t.CSV", "t.Csv.GZ", "t.csv", "t.jsonl.gz", "t.JSONL"])
def test_compressed_files_and_endings_in_capitals(tmp_path, name):
    """The second row changes the type of a column after the first block of 1 MiB; t.csv is compressed too."""
    long = "x" * (1 << 20)
    text = f"item_id,n,note\n1,1,{long}\n2,a,b\n"
    if "json" in name.lower():
        text = f'{{"item_id": 1, "note": "{long}"}}\n{{"item_id": 2, "note": "b"}}\n'
    packed = name.lower().endswith(".gz") or name == "t.csv"
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    table = read_table(tmp_path / name, ("item_id",))
    assert table["item_id"].to_pylist() == [1, 2] and table["note"].to_pylist() == [long, "b"]
    assert find_table(tmp_path, "t") == tmp_path / name


def test_a_folder_of_parquet_files_as_spark_writes_it(tmp_path):
    folder = tmp_path / "items.parquet"
    folder.mkdir()
    write_table(folder / "part-00001.parquet", {"item_id": [3]})
    write_table(folder / "part-00000.parquet", {"item_id": [1, 2]})
    (folder / "_SUCCESS").write_bytes(b"")
    assert find_table(tmp_path, "items") == folder
    assert read_table(folder, ("item_id",))["item_id"].to_pylist() == [1, 2, 3]


PARTS = {
    "csv": ["item_id,n,size\n007,1,\n", "item_id,n,size\n8,2.5,XL\n"],
    "tsv": ["item_id\tn\tsize\n007\t1\t\n", "item_id\tn\tsize\n8\t2.5\tXL\n"],
    "jsonl": ['{"item_id": "007", "n": 1, "size": null}\n', '{"item_id": "8", "n": 2.5, "size": "XL"}\n'],
}


@pytest.mark.parametrize("form", PARTS)
@pytest.mark.parametrize("compression", [None, "gz", "zst"])
def test_a_folder_of_parts_is_read_as_one_table(tmp_path, form, compression):
    """Types are those of all parts together: "8" is text beside "007", and a column may be empty in one part."""
    ending = f".{compression}" if compression else ""
    folder = tmp_path / f"items.{form}{ending}"
    (folder / "dt=1").mkdir(parents=True)
    for number, text in enumerate(PARTS[form]):
        data = text.encode()
        if compression:
            data = pa.compress(data, codec={"gz": "gzip", "zst": "zstd"}[compression], asbytes=True)
        (folder / "dt=1" / f"part-{number}.{form}{ending}").write_bytes(data)
    (folder / "_SUCCESS").write_bytes(b"")
    (folder / ".part-0.crc").write_bytes(b"x")
    assert find_table(tmp_path, "items") == folder
    expected = {"item_id": ["007", "8"], "n": [1, 2.5], "size": [None, "XL"]}
    assert read_table(folder, ("item_id",)).to_pydict() == expected


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"items\.csv: the folder holds no csv file"),
        (
            {"a.csv": "item_id,x\n1,2\n", "b.csv": "item_id,y\n1,2\n"},
            r"b\.csv: the columns differ from .*a\.csv \(x, y\)",
        ),
        ({"a.csv": "item_id\n1\n", "b.jsonl": '{"item_id": 1}'}, r"b\.jsonl: a file of another form in a table of csv"),
        (
            {"a.csv": "item_id,x\n1,2\n", "b.csv": "item_id,x\n1,XL\n"},
            r"items\.csv: a column has types that do not fit",
        ),
        ({"a.csv": "item_id,x\n1,2\n", "b.csv": "item_id,x\n1\n"}, r"b\.csv: cannot be read as csv"),
        ({"a.csv": "x,x\n1,2\n", "b.csv": "x,x\n1,2\n"}, r"a\.csv: column 'x' is there 2 times"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_named(tmp_path, files, message):
    folder = tmp_path / "items.csv"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_table(folder)


@pytest.mark.parametrize("name", ["items.txt", "items.xlsx", "items.json", "ITEMS.csv.zip", "items/"])
def test_a_table_in_another_form_is_named_and_not_taken_for_absent(tmp_path, name):
    if name.endswith("/"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part-0.csv").write_text("item_id\n1\n")
    else:
        (tmp_path / name).write_text("item_id\n1\n")
    with pytest.raises(ValueError, match=rf"{name.rstrip('/')}: a table in a form that is not read"):
        find_table(tmp_path, "items")


def test_other_files_are_not_taken_for_tables(tmp_path):
    (tmp_path / "items.md").write_text("about the items")
    (tmp_path / "items_of_2020.txt").write_text("1")
    (tmp_path / "items").mkdir()
    assert find_table(tmp_path, "items") is None


@pytest.mark.parametrize(
    "data",
    [
        "item_id,catégorie\n1,a\n".encode("latin-1"),
        "item_id,title\n1,é\n".encode("latin-1"),
        "item_id,colour\n1,é\n".encode("latin-1"),
        "item_id,title\n1,a\n".encode("utf-16"),
    ],
)
def test_text_that_is_not_utf_8_is_named_with_the_remedy(tmp_path, data):
    (tmp_path / "items.csv").write_bytes(data)
    with pytest.raises(ValueError, match=r"items\.csv: .*(UTF-8|UTF8|UTF-16).*save the file as UTF-8"):
        read_table(tmp_path / "items.csv")


def test_a_compressed_file_that_was_cut_off(tmp_path):
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"item_id\n" + b"123456\n" * 1000)[:-20])
    with pytest.raises(ValueError, match=r"t\.csv\.gz: cannot be read as csv"):
        read_table(tmp_path / "t.csv.gz")


def test_csv_text_is_not_read_as_numbers(tmp_path):
    columns = {
        "item_id": [1, 2],
        "title": ["1984", "007"],
        "brand": ["4711", "0815"],
        "image": ["01", "02"],
        "n": [1, 2],
    }
    assert read_table(write_table(tmp_path / "t.csv", columns)).to_pydict() == columns


def test_csv_with_a_byte_order_mark_and_newlines_in_quotes(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes('\ufeffitem_id,title\r\n1,"two\nlines, and a ""quote"""\r\n2,\r\n'.encode())
    assert read_table(path).to_pydict() == {"item_id": [1, 2], "title": ['two\nlines, and a "quote"', None]}


@pytest.mark.parametrize("format", ["csv", "jsonl"])
def test_a_row_of_megabytes_and_a_column_that_changes_its_type_late(tmp_path, format):
    long = "猫" * 1_500_000
    path = write_table(tmp_path / f"long.{format}", {"item_id": [1, 2], "title": ["a", long]})
    assert read_table(path).column("title").to_pylist() == ["a", long]
    if format == "csv":  # one megabyte of numbers, then a word
        path = write_table(tmp_path / "late.csv", {"item_id": range(200_000), "size": ["12345"] * 199_999 + ["XL"]})
    else:
        path = tmp_path / "late.jsonl"
        path.write_text(
            '{"item_id": 5, "size": null, "x": "aaaaaaaaa"}\n' * 40_000 + '{"item_id": 7, "size": "XL", "x": "a"}\n'
        )
    sizes = read_table(path).column("size")
    assert sizes[0].as_py() == ("12345" if format == "csv" else None) and sizes[-1].as_py() == "XL"


def test_missing_and_repeated_columns(tmp_path):
    path = write_table(tmp_path / "t.parquet", {"itemid": [1], "x": [2]})
    with pytest.raises(ValueError, match=r"t\.parquet: column 'item_id' is missing; did you mean 'itemid'\?"):
        read_table(path, ("item_id",))
    with pytest.raises(ValueError, match=r"column 'timestamp' is missing; columns there: itemid, x"):
        read_table(path, ("timestamp",))
    both = r"columns 'item_id', 'label' are missing; did you mean 'itemid' for 'item_id'\?; columns there: itemid, x$"
    with pytest.raises(ValueError, match=both):
        read_table(path, ("item_id", "x", "label"))
    (tmp_path / "t.csv").write_text("item_id,a,item_id\n1,2,3\n")
    with pytest.raises(ValueError, match=r"t\.csv: column 'item_id' is there 2 times; keep one"):
        read_table(tmp_path / "t.csv")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("content", [b"", b"\x00\xff\xfe not a table", b'"open quote\n1'])
def test_a_file_that_is_no_table(tmp_path, format, content):
    (tmp_path / f"t.{format}").write_bytes(content)
    with pytest.raises(ValueError, match=rf"t\.{format}: "):
        read_table(tmp_path / f"t.{format}", ("item_id",))


def test_find_table(tmp_path):
    assert find_table(tmp_path, "items") is None and find_table(tmp_path / "nowhere", "items") is None
    write_table(tmp_path / "items.csv", {"item_id": [1]})
    assert find_table(tmp_path, "items") == tmp_path / "items.csv"
    write_table(tmp_path / "items.jsonl", {"item_id": [1]})
    with pytest.raises(ValueError, match=r"both items\.csv and items\.jsonl are there; keep one"):
        find_table(tmp_path, "items")


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (pa.array([1.0, None, np.nan, 2.0**53 - 1]), [1, None, None, 2**53 - 1]),  # what pandas makes of a gap
        (pa.array(np.array([1, np.nan, 2**24 - 1], np.float32)), [1, None, 2**24 - 1]),
        (pa.array([], pa.float64()), []),
        (pa.array([np.nan, np.nan]), [None, None]),
        (pa.array([None, None]), [None, None]),
        (pa.array([2**63 - 1], pa.uint64()), [2**63 - 1]),
        (pa.array([-3, 4], pa.int8()), [-3, 4]),
        (pa.array(["b", None, "a", "b"]).dictionary_encode(), ["b", None, "a", "b"]),
        (pa.array([5, 6, 5]).dictionary_encode(), [5, 6, 5]),
        (pa.array(["é", "", "猫"], pa.large_string()), ["é", "", "猫"]),
        (pa.array(["a"], pa.string_view()), ["a"]),
    ],
)
def test_as_ids(array, expected):
    ids = as_ids(array, "item_id", "t")
    assert ids.to_pylist() == expected and ids.type in (pa.int64(), pa.string())
    halves = pa.chunked_array([array[:1], array[1:]], type=array.type)
    assert as_ids(halves, "item_id", "t").equals(ids)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (pa.array([2.0**53]), "floats that are not exact ids"),  # 2^53 + 1 reads the same
        (pa.array(np.array([2**24], np.float32)), "floats that are not exact ids"),
        (pa.array([1.5]), "floats that are not exact ids"),
        (pa.array([float("inf")]), "floats that are not exact ids"),
        (pa.array([2**63], pa.uint64()), r"integers above 2\^63"),
        (pa.array([True]), "type bool; ids are integers or strings"),
        (pa.array([[1]]), "ids are integers or strings"),
        (pa.array([datetime.datetime(2024, 1, 1)]), "ids are integers or strings"),
    ],
)
def test_what_cannot_be_an_id(array, expected):
    with pytest.raises(ValueError, match=rf"t\.parquet: column 'item_id' .*{expected}"):
        as_ids(array, "item_id", "t.parquet")


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (pa.array(["a", "", "  ", None, " b\n", "\u3000猫\u00a0"]), ["a", None, None, None, "b", "猫"]),
        (pa.array(["x" * 5_000_000]), ["x" * 5_000_000]),
        (pa.array([1, None, -7]), ["1", None, "-7"]),
        (pa.array([1.5, None, float("nan"), 3.0]), ["1.5", None, None, "3"]),
        (pa.array([True, None]), ["true", None]),
        (pa.array([None, None]), [None, None]),
        (pa.array(["a", "b", "a", None]).dictionary_encode(), ["a", "b", "a", None]),
        (pa.array([["a", "b"], [], None, ["c", None, "d"], [None]]), ["a b", None, None, "c d", None]),
        (pa.array([[1, 2]], pa.list_(pa.int64(), 2)), ["1 2"]),
        (pa.array([[["a", "b"], ["c"]]]), ["a b c"]),
        (pa.array(["größe".encode(), b"\xff\xfea"]), ["größe", "\ufffd\ufffda"]),
        (pa.array([b"\xffa", b"b "]).view(pa.string()), ["\ufffda", "b"]),  # text that is no UTF-8
        (pa.array([{"a": 1}]), ["{'a': 1}"]),
        (pa.array([datetime.date(2024, 1, 2)]), ["2024-01-02"]),
        (pa.array([decimal.Decimal("1.50")]), ["1.50"]),
        (pa.array([], pa.int64()), []),
    ],
)
def test_as_text(array, expected):
    assert as_text(pa.chunked_array([array])).to_pylist() == expected
    halves = pa.chunked_array([array[:1], array[1:]], type=array.type)
    assert as_text(halves).to_pylist() == expected


def test_rows_of():
    known = pa.array(["b", None, "a", "a", "c"])
    wanted = pa.array(["a", "zz", None, "c", "b", "A", "a "])
    assert rows_of(wanted, known, "x").tolist() == [2, -1, -1, 4, 0, -1, -1]  # of a repeated one the first
    big = [2**31 + 1, 2**53 + 1, 2**53, -1]
    assert rows_of(pa.array(big[::-1]), pa.array(big), "x").tolist() == [3, 2, 1, 0]
    assert rows_of(pa.array([], pa.int64()), pa.array(["a"]), "x").tolist() == []
    assert rows_of(pa.array([1, 2]), pa.array([], pa.string()), "x").tolist() == [-1, -1]
    assert rows_of(pa.array([None, None], pa.int64()), pa.array(["a"]), "x").tolist() == [-1, -1]


def test_rows_of_never_mixes_integers_and_strings():
    with pytest.raises(ValueError, match=r"log: ids are int64 on one side and string on the other \(1 and '1'\)"):
        rows_of(pa.array([None, 1]), pa.array(["1"]), "log")


def test_examples():
    assert examples(pa.array([1, None, 3, 4])) == [1, None, 3]
    assert examples(np.arange(2)) == [0, 1] and type(examples(np.arange(2))[0]) is int
    assert examples(["a", "b"], 1) == ["a"]
