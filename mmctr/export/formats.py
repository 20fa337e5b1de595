"""`mmctr export`: item vectors in the file formats of other programs, with the config lines that use the files.

Tested with FuxiCTR 2.3.10 and RecBole 1.2.1, which load the files (`benchmarks/exports.py`), and with the documentation
and readers of TorchEasyRec as of 2026.
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
from mmctr.manifests import require_replaceable, write_manifest

COLUMN = "item_vector"
"""name of the column of vectors in files where the column becomes a feature"""
RECBOLE_OWN = ("inter", "user", "item", "kg", "link", "net")
"""suffixes of files that RecBole reads as other kinds of data"""
PANDAS_GAPS = (
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>"),
    *("N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
)
"""texts that pandas, which RecBole uses to read files, takes for a missing value"""


def export(source: str, form: str, out: str | Path) -> str:
    """Write item vectors in the format of another program; an error leaves no partial file.

    Args:
        source: embedding folder or file of vectors.
        form: one of `FORMATS`.
        out: file or folder to write.

    Returns:
        Lines for the user.

    Raises:
        ValueError: an unknown format, a path with a wrong suffix, or ids that the format cannot represent.
    """
    if form not in FORMATS:
        near = difflib.get_close_matches(form, FORMATS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"it is one of {', '.join(FORMATS)}"
        raise ValueError(f"--format {form}: unknown; {hint}")
    return FORMATS[form](source, Path(out))


def _of_table(write: Callable[[EmbeddingTable, Path], str | None], ending: str = ".yaml") -> Callable[[str, Path], str]:
    """A format of item vectors, from a function that writes a table and returns the config lines of the program, or
    None."""

    def run(source: str, out: Path) -> str:
        table = EmbeddingTable.read(source)
        if not len(table):
            raise ValueError(f"{source}: holds no vectors")
        lines = write(table, out)
        message = f"{out}: {len(table)} vectors of {table.dim} dimensions"
        if lines is None:
            return message
        config = out.with_name(out.name + ending)
        write_text(config, lines)
        return f"{message}\n{config}:\n\n{lines}"

    return run


def _write_parquet(columns: dict[str, Any], out: Path) -> None:
    """Write columns as a Parquet file."""
    table = pa.table(columns)
    replace_file(out, lambda path: pyarrow.parquet.write_table(table, path))


def _parquet(table: EmbeddingTable, out: Path) -> None:
    """Write a Parquet file with `item_id` and `vector`, a fixed-size list of float32."""
    require_suffix(out, ".parquet")
    values = pa.array(table.vectors.ravel())
    _write_parquet({"item_id": table.ids, "vector": pa.FixedSizeListArray.from_arrays(values, table.dim)}, out)


def _safetensors(table: EmbeddingTable, out: Path) -> None:
    """Write a safetensors file with `vectors` (n, D) and `item_id`: integers (n,), or the concatenated UTF-8 bytes of
    text ids with the offsets `item_id_offsets` (n + 1,), because metadata could only be parsed as a whole."""
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
    """Write a folder for `datasets.load_from_disk`, with `item_id` and `vector`."""
    from datasets import Dataset, Features, List, Value

    require_replaceable(out, "mmctr.json", ("dataset_info.json", "state.json", "data-*.arrow"), "exported dataset")
    kind = Value("int64" if pa.types.is_integer(table.ids.type) else "string")
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(table.vectors.ravel()), table.dim)
    features = Features({"item_id": kind, "vector": List(Value("float32"), length=table.dim)})
    dataset = Dataset(pa.table({"item_id": table.ids, "vector": vectors}, schema=features.arrow_schema))

    def write(folder: Path) -> None:
        dataset.save_to_disk(folder)
        write_manifest(folder / "mmctr.json", {"vectors": len(table)}, [path.name for path in folder.iterdir()])

    replace_folder(out, write)


def _fuxictr(table: EmbeddingTable, out: Path) -> str:
    """Write an .npz file with `key` and `value`, which FuxiCTR matches with the values of a column."""
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
    """Write an atomic file of RecBole: `iid:token`, a tab, and `item_vector:float_seq` with spaces between numbers."""
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
    """Each row of (n, D) as text, with the shortest decimals that parse to the same float32."""
    texts = pa.array(vectors.ravel()).cast(pa.string())
    offsets = pa.array(np.arange(len(vectors) + 1, dtype=np.int32) * vectors.shape[1])
    return pc.binary_join(pa.ListArray.from_arrays(offsets, texts), separator)


def _torcheasyrec(table: EmbeddingTable, out: Path) -> str:
    """Write `item_id` and `item_vector`: lists in Parquet (TorchEasyRec cannot read fixed-size lists), text in CSV."""
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
"""the formats of `mmctr export --format`: functions from source and path to lines for the user"""
