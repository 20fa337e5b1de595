"""`mmctr export`: item vectors in the files other programs read, with the lines of their configs that use them.

Checked against FuxiCTR 2.3.10 and RecBole 1.2.1, which load what is written here (`benchmarks/exports.py`), and the
documentation and readers of TorchEasyRec as of 2026.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from safetensors.numpy import save_file

from mmctr.data.arrow import pc
from mmctr.data.embeddings import EmbeddingTable, numpy_ids, require_suffix, save_arrays, write_npz
from mmctr.files import replace_file, replace_folder, write_text

COLUMN = "item_vector"
"""what the column of vectors is called where it becomes a feature"""
RECBOLE_OWN = ("inter", "user", "item", "kg", "link", "net")
"""endings of RecBole's files of other kinds"""
PANDAS_GAPS = (
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>"),
    *("N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
)
"""texts that pandas, through which RecBole reads, takes for a missing value"""


def export(source: str, form: str, out: str | Path) -> str:
    """Write `source` in one of `FORMATS` to `out`, whole or not at all; returns what to tell the user.

    Raises ValueError for an unknown format, an `out` that does not fit it, and ids that it cannot hold.
    """
    if form not in FORMATS:
        near = difflib.get_close_matches(form, FORMATS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"it is one of {', '.join(FORMATS)}"
        raise ValueError(f"--format {form}: unknown; {hint}")
    return FORMATS[form](source, Path(out))


def _of_table(write: Callable[[EmbeddingTable, Path], str | None], ending: str = ".yaml") -> Callable[[str, Path], str]:
    """A format of item vectors. `write` returns the config lines of the program that reads the file, if it has one."""

    def run(source: str, out: Path) -> str:
        table = EmbeddingTable.read(source)
        if not len(table):
            raise ValueError(f"{source}: holds no vectors")
        lines = write(table, out)
        told = f"{out}: {len(table)} vectors of {table.dim} dimensions"
        if lines is None:
            return told
        beside = out.with_name(out.name + ending)
        write_text(beside, lines)
        return f"{told}\n{beside}:\n\n{lines}"

    return run


def _write_parquet(columns: dict[str, Any], out: Path) -> None:
    table = pa.table(columns)
    replace_file(out, lambda path: pyarrow.parquet.write_table(table, path))


def _parquet(table: EmbeddingTable, out: Path) -> None:
    """`item_id` and `vector`, a fixed-size list of float32."""
    require_suffix(out, ".parquet")
    values = pa.array(table.vectors.ravel())
    _write_parquet({"item_id": table.ids, "vector": pa.FixedSizeListArray.from_arrays(values, table.dim)}, out)


def _safetensors(table: EmbeddingTable, out: Path) -> None:
    """`vectors` (n, D); integer ids as `item_id` (n,). Text ids are their UTF-8 bytes on end in `item_id` (uint8) and
    the (n + 1,) `item_id_offsets` into them: metadata of the format would have to be parsed as a whole."""
    require_suffix(out, ".safetensors")
    arrays = {"vectors": table.vectors}
    if pa.types.is_integer(table.ids.type):
        arrays["item_id"] = table.ids.to_numpy()
    else:
        lengths = pc.binary_length(table.ids).to_numpy(zero_copy_only=False)
        arrays["item_id_offsets"] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        arrays["item_id"] = np.frombuffer("".join(table.ids.to_pylist()).encode(), np.uint8)
    replace_file(out, lambda path: save_file({n: np.ascontiguousarray(a) for n, a in arrays.items()}, path))


def _datasets(table: EmbeddingTable, out: Path) -> None:
    """A folder for `datasets.load_from_disk`: `item_id` and `vector`."""
    from datasets import Dataset, Features, List, Value

    if out.exists() and not (out / "dataset_info.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: is there and holds no dataset of `datasets`; choose another folder")
    kind = Value("int64" if pa.types.is_integer(table.ids.type) else "string")
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(table.vectors.ravel()), table.dim)
    features = Features({"item_id": kind, "vector": List(Value("float32"), length=table.dim)})
    dataset = Dataset(pa.table({"item_id": table.ids, "vector": vectors}, schema=features.arrow_schema))
    replace_folder(out, lambda path: dataset.save_to_disk(path))


def _fuxictr(table: EmbeddingTable, out: Path) -> str:
    """An .npz of `key` and `value`, which FuxiCTR matches with the values of a column."""
    require_suffix(out, ".npz")
    save_arrays(out, key=numpy_ids(table.ids, out), value=table.vectors)
    return f"""\
# FuxiCTR: the item column among the feature_cols of dataset_config.yaml. Sequences of items read the same vectors with
# share_embedding: item_id. pretrain_usage is init (these vectors alone, through a linear layer where embedding_dim is
# another), or sum or concat (beside an ID embedding). dtype is str for integer ids too, so keep them as text in your
# Parquet: with int, FuxiCTR 2.3.10 fails to store the ids of items that are here and not in its training rows.
feature_cols:
    - name: item_id
      active: True
      dtype: str
      type: categorical
      pretrained_emb: {out}
      pretrain_dim: {table.dim}
      pretrain_usage: init
      freeze_emb: True
"""


def _recbole(table: EmbeddingTable, out: Path) -> str:
    """An atomic file: `iid:token`, a tab, `item_vector:float_seq` with blanks between the numbers."""
    dataset, _, suffix = out.name.rpartition(".")
    if not dataset or not suffix or suffix in RECBOLE_OWN:
        raise ValueError(
            f"--out {out}: RecBole finds the file by its name, DATASET.SUFFIX in the folder of the dataset, the suffix "
            f"being none of {', '.join(RECBOLE_OWN)}; for example {out.parent / (dataset or out.name)}.itememb"
        )
    tokens = table.ids.cast(pa.string())
    unfit = pc.or_(
        pc.match_substring_regex(tokens, '[\t\r\n"]'),
        pc.is_in(tokens, value_set=pa.array(PANDAS_GAPS)),
    )
    if pc.any(unfit).as_py():
        raise ValueError(
            f"{out}: RecBole would not read the item id {tokens.filter(unfit)[0].as_py()!r} as it is written: no tabs, "
            f"line breaks or quotes, and no word for a missing value; rename it"
        )

    def write(path: Path) -> None:
        with open(path, "wb") as file:
            file.write(f"iid:token\t{COLUMN}:float_seq\n".encode())
            options = pyarrow.csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")
            for start in range(0, len(table), 8192):
                part = table.vectors[start : start + 8192]
                columns = {"iid": tokens[start : start + 8192], COLUMN: _joined(part, " ")}
                pyarrow.csv.write_csv(pa.table(columns), file, options)

    replace_file(out, write)
    return f"""\
# RecBole, dataset {dataset!r}: a model gets the matrix by dataset.get_preload_weight("iid"), zeros for padding and for
# items without a vector. Where your config has a load_col, add to it: {suffix}: [iid, {COLUMN}]
additional_feat_suffix: [{suffix}]
alias_of_item_id: [iid]
preload_weight:
    iid: {COLUMN}
"""


def _joined(vectors: np.ndarray, separator: str) -> pa.Array:
    """Each row of (n, D) as text: the shortest decimals that read back to the same float32."""
    texts = pa.array(vectors.ravel()).cast(pa.string())
    offsets = pa.array(np.arange(len(vectors) + 1, dtype=np.int32) * vectors.shape[1])
    return pc.binary_join(pa.ListArray.from_arrays(offsets, texts), separator)


def _torcheasyrec(table: EmbeddingTable, out: Path) -> str:
    """`item_id` and `item_vector`: lists in Parquet (its reader knows none of a fixed size), text in CSV."""
    require_suffix(out, ".parquet", ".csv")
    separator = ""
    if out.suffix == ".parquet":
        offsets = pa.array(np.arange(len(table) + 1, dtype=np.int64) * table.dim)
        lists = pa.LargeListArray.from_arrays(offsets, pa.array(table.vectors.ravel()))
        _write_parquet({"item_id": table.ids, COLUMN: lists.cast(pa.list_(pa.float32()))}, out)
    else:
        separator = '        separator: "|"\n'
        columns = pa.table({"item_id": table.ids, COLUMN: _joined(table.vectors, "|")})
        replace_file(out, lambda path: pyarrow.csv.write_csv(columns, path))
    return f"""\
# TorchEasyRec reads one table of samples, so join the column {COLUMN} to yours by item_id first. The feature goes into
# a feature group of the model, with the others of the item.
feature_configs {{
    raw_feature {{
        feature_name: "{COLUMN}"
        expression: "item:{COLUMN}"
{separator}        value_dim: {table.dim}
    }}
}}
"""


FORMATS: dict[str, Callable[[str, Path], str]] = {
    "parquet": _of_table(_parquet),
    "npz": _of_table(write_npz),
    "safetensors": _of_table(_safetensors),
    "datasets": _of_table(_datasets),
    "fuxictr": _of_table(_fuxictr),
    "recbole": _of_table(_recbole),
    "torcheasyrec": _of_table(_torcheasyrec, ".config"),
}
"""what `mmctr export --format` knows: (source, out) -> what to tell the user"""
