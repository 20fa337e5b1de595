from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mmctr.cli.main import main
from mmctr.embedders.feature_embedder import FeatureEmbedder
from mmctr.features.columns import MultiValuedFeature, encode_table, learn_vocabularies
from mmctr.retrieval.codebooks import Codebooks, nearest
from mmctr.retrieval.semantic_ids import collisions, id_columns, semantic_ids, usage
from tests.cli.test_main import output, refused


def write_vectors(path: Path, vectors: np.ndarray, ids: list | None = None) -> str:
    np.savez(path, item_id=np.array(range(len(vectors)) if ids is None else ids), vectors=vectors)
    return str(path)


def two_levels(coarse: int = 4, fine: int = 5, each: int = 6, dim: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Vectors that are one of some far centres plus one of some near ones, and the (n, 2) numbers of both."""
    rng = np.random.default_rng(0)
    truth = np.stack(np.meshgrid(range(coarse), range(fine), range(each), indexing="ij"), -1).reshape(-1, 3)[:, :2]
    truth = rng.permutation(truth)
    far, near = 30 * rng.standard_normal((coarse, dim)), rng.standard_normal((fine, dim))
    near /= np.linalg.norm(near, axis=1, keepdims=True)
    return (far[truth[:, 0]] + near[truth[:, 1]]).astype(np.float32), truth


def same_groups(codes: np.ndarray, truth: np.ndarray) -> bool:
    pairs = set(zip(codes.tolist(), truth.tolist(), strict=True))
    return len(pairs) == len(set(codes.tolist())) == len(set(truth.tolist()))


def columns(path: Path | str, name: str = "sid") -> np.ndarray:
    table = pq.read_table(path)
    return np.stack([table[f"{name}_{n}"].to_numpy() for n in range(2)], 1)


def random_vectors(n: int = 400, dim: int = 24, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)


def test_two_levels_of_centres_are_found_again(tmp_path):
    vectors, truth = two_levels(coarse=5, fine=5)
    source = write_vectors(tmp_path / "v.npz", vectors)
    report = semantic_ids([source], tmp_path / "s.parquet", levels=2, codes=5, normalize_residuals=False)
    codes = columns(tmp_path / "s.parquet")
    assert same_groups(codes[:, 0], truth[:, 0]) and same_groups(codes[:, 1], truth[:, 1])
    for level in report["levels"]:
        assert level["used"] == 5 and level["perplexity"] == pytest.approx(5)
    # the first level leaves the variance of the near centres, the second nothing
    fine = vectors - np.stack([vectors[truth[:, 0] == group].mean(0) for group in range(5)])[truth[:, 0]]
    left = np.square(fine).sum() / np.square(vectors - vectors.mean(0)).sum()
    assert report["levels"][0]["unexplained"] == pytest.approx(left, rel=1e-3)
    assert report["levels"][1]["unexplained"] < 1e-9
    assert report["collisions"]["distinct ids"] == 25 and report["collisions"]["items that share an id"] == 150
    assert json.loads((tmp_path / "s.json").read_text()) == report


def test_a_level_has_no_more_centres_than_there_is_to_tell_apart(tmp_path):
    vectors, _ = two_levels(coarse=3, fine=2)
    source = write_vectors(tmp_path / "v.npz", vectors)
    report = semantic_ids([source], tmp_path / "s.parquet", levels=4, codes=6, normalize_residuals=False)
    # six different vectors fill the first level; then nothing is left
    assert [shape[0] for shape in report["codebook_shapes"]] == [6, 1, 1, 1]
    assert [level["perplexity"] for level in report["levels"]] == pytest.approx([6, 1, 1, 1])
    assert report["levels"][0]["unexplained"] < 1e-9


@pytest.mark.parametrize("normalize", [True, False])
def test_codes_equal_a_loop_over_levels(tmp_path, normalize):
    vectors = random_vectors()
    source = write_vectors(tmp_path / "v.npz", vectors)
    report = semantic_ids([source], tmp_path / "s.parquet", levels=2, codes=16, normalize_residuals=normalize)
    books = Codebooks.load(tmp_path / "s.codebooks.safetensors")
    assert books.normalize_residuals == normalize and books.dims == [24]
    mean = vectors.mean(0, dtype=np.float64)
    centred = (vectors - mean) / np.sqrt(np.square(vectors - mean).sum(1).mean())
    left = []
    for row, expected in zip(centred, columns(tmp_path / "s.parquet"), strict=True):
        for level, centres in enumerate(books.levels):
            length = np.linalg.norm(row) if normalize else 1.0
            code = int(np.square(row / length - centres).sum(1).argmin())
            assert code == expected[level]
            row = (row / length - centres[code]) * length
            left.append(np.square(row).sum())
    total = np.square(centred).sum()
    for level, value in enumerate(np.reshape(left, (-1, 2)).sum(0) / total):
        assert report["levels"][level]["unexplained"] == pytest.approx(value, rel=1e-4)
    assert report["levels"][1]["unexplained"] < report["levels"][0]["unexplained"] < 1


def test_long_residuals_do_not_take_all_centres_where_they_are_normalised(tmp_path):
    """Few items far out in directions of their own: with lengths kept they are the centres and the others share one."""
    vectors = random_vectors(300, 64)
    vectors[:20] *= 40
    source = write_vectors(tmp_path / "v.npz", vectors)
    perplexity = {
        normalize: semantic_ids([source], tmp_path / "s.parquet", codes=16, normalize_residuals=normalize)["levels"][0]
        for normalize in (True, False)
    }
    assert perplexity[False]["perplexity"] < 2 and perplexity[True]["perplexity"] > 8


def test_nearest_is_exact_and_does_not_depend_on_the_batch():
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((12, 64)).astype(np.float32)
    # points half way between two centres, but for the last digits
    first, second = rng.integers(0, 12, (2, 300))
    x = (centres[first] + centres[second]) / 2 + 1e-6 * rng.standard_normal((300, 64)).astype(np.float32)
    x += 100  # far from the origin, where a product of matrices rounds coarsely
    shifted = centres + 100
    expected = np.square(x[:, None].astype(np.float64) - shifted).sum(2).argmin(1)
    assert nearest(x, shifted).tolist() == expected.tolist()
    assert [int(nearest(row[None], shifted)[0]) for row in x] == expected.tolist()


def test_equal_centres_give_the_first():
    centres = np.zeros((6, 3), np.float32)
    assert nearest(np.ones((5, 3), np.float32), centres[:3]).tolist() == [0] * 5


def test_same_seed_same_codes_and_codebooks_apply_to_new_items(tmp_path):
    vectors = random_vectors()
    source = write_vectors(tmp_path / "v.npz", vectors)
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        semantic_ids([source], tmp_path / f"{name}.parquet", codes=16, seed=seed, sample=200)
    for ending in ("parquet", "codebooks.safetensors"):
        assert (tmp_path / f"a.{ending}").read_bytes() == (tmp_path / f"b.{ending}").read_bytes()
    assert (columns(tmp_path / "a.parquet") != columns(tmp_path / "c.parquet")).any()
    # one item of old and two new ones, in a catalog of their own
    new = np.concatenate([vectors[7:8], random_vectors(2, seed=9)])
    semantic_ids(
        [write_vectors(tmp_path / "n.npz", new)],
        tmp_path / "n.parquet",
        codebooks=str(tmp_path / "a.codebooks.safetensors"),
    )
    assert columns(tmp_path / "n.parquet")[0].tolist() == columns(tmp_path / "a.parquet")[7].tolist()
    assert not (tmp_path / "n.codebooks.safetensors").exists()


def test_several_tables_have_the_same_say_and_lacking_one_is_its_mean(tmp_path):
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 4, 60)
    text = np.eye(4)[groups] + 0.01 * rng.standard_normal((60, 4))
    image = 1e4 * (np.eye(5)[rng.integers(0, 5, 50)] + 0.01 * rng.standard_normal((50, 5)))
    ids = [f"i{n}" for n in range(60)]
    paths = [write_vectors(tmp_path / "t.npz", text, ids), write_vectors(tmp_path / "p.npz", image, ids[:50])]
    semantic_ids(paths, tmp_path / "s.parquet", levels=2, codes=4, normalize_residuals=False)
    books = Codebooks.load(tmp_path / "s.codebooks.safetensors")
    assert books.dims == [4, 5]
    table = pq.read_table(tmp_path / "s.parquet")
    assert table["item_id"].to_pylist() == ids
    x = np.zeros((60, 9))
    x[:, :4] = (text - text.mean(0)) / np.sqrt(np.square(text - text.mean(0)).sum(1).mean())
    x[:50, 4:] = (image - image.mean(0)) / np.sqrt(np.square(image - image.mean(0)).sum(1).mean())
    nearest_centre = np.square(x[:, None] - books.levels[0]).sum(2).argmin(1)
    assert nearest_centre.tolist() == table["sid_0"].to_pylist()
    other = [paths[1], paths[0]]
    with pytest.raises(ValueError, match=r"made for vectors of \[4, 5\] dimensions.* have \[5, 4\]"):
        semantic_ids(other, tmp_path / "x.parquet", codebooks=str(tmp_path / "s.codebooks.safetensors"))


def test_columns_collisions_and_usage_by_hand():
    codes = np.array([[3, 0], [3, 1], [3, 0], [0, 1], [3, 0]], np.int32)
    made = {name: column.to_pylist() for name, column in id_columns(codes, "s").items()}
    assert made == {
        "s_0": [3, 3, 3, 0, 3],
        "s_1": [0, 1, 0, 1, 0],
        "s_prefix_1": ["3", "3", "3", "0", "3"],
        "s_prefix_2": ["3-0", "3-1", "3-0", "0-1", "3-0"],
        "s_prefixes": [["3", "3-0"], ["3", "3-1"], ["3", "3-0"], ["0", "0-1"], ["3", "3-0"]],
    }
    assert collisions(codes) == {
        "distinct ids": 3,
        "items with an id of their own": 2,
        "share with an id of their own": 0.4,
        "items that share an id": 3,
        "largest number of items with one id": 3,
    }
    levels = usage(codes, [4, 2])
    assert [(level["codes"], level["used"]) for level in levels] == [(4, 2), (2, 2)]
    assert levels[0]["perplexity"] == pytest.approx(np.exp(-0.8 * np.log(0.8) - 0.2 * np.log(0.2)))
    # codes of many levels do not fit one integer, and are told apart all the same
    long = np.full((3, 12), 2000, np.int64)
    long[2, 0] = 1999
    assert collisions(long)["distinct ids"] == 2


def test_semantic_ids_are_the_sum_of_their_prefixes():
    """Singh et al. 2023 (arXiv 2306.08121): e(12, 7, 20) = e("12") + e("12-7") + e("12-7-20"), of one table."""
    codes = np.array([[12, 7, 20], [12, 7, 3], [4, 7, 20]])
    column = id_columns(codes, "sid")["sid_prefixes"]
    configs = {"sid_prefixes": MultiValuedFeature(dim=2, pooling="sum")}
    table = pa.table({"sid_prefixes": column})
    vocabularies = learn_vocabularies(configs, table, np.arange(2), "items table")
    model = FeatureEmbedder(configs, vocabularies, 0.5)
    vectors = model(encode_table(configs, vocabularies, table, "items table").columns, torch.zeros(3, 1))
    row = dict(zip(vocabularies["sid_prefixes"].values, model.tables["sid_prefixes"].weight[1:], strict=True))
    assert set(row) == {"12", "12-7", "12-7-20", "12-7-3"}
    expected = [row["12"] + row["12-7"] + row["12-7-20"], row["12"] + row["12-7"] + row["12-7-3"], torch.zeros(2)]
    torch.testing.assert_close(vectors, torch.stack(expected))  # of the last item training has seen no prefix


def test_commands(tmp_path, capsys):
    source = write_vectors(tmp_path / "v.npz", random_vectors(), [f"item {n}" for n in range(400)])
    out = tmp_path / "s.parquet"
    text = output(capsys, "semantic-ids", source, "--out", out, "--codes", 8, "--name", "code")
    assert "400 items" in text and "level 2: 8 of 8 codes used" in text and "distinct ids" in text
    table = pq.read_table(out)
    assert table["item_id"][5].as_py() == "item 5" and "code_prefix_3" in table.column_names
    before = out.read_bytes()
    books = tmp_path / "s.codebooks.safetensors"
    nan = random_vectors()
    nan[3, 2] = np.nan
    bad = {
        ("--codes", "500"): "400 items are too few for 500 codes a level; lower --codes",
        ("--codes", "1"): "--codes 1: at least 2 is needed",
        ("--levels", "0"): "--levels 0: at least 1 is needed",
        ("--sample", "100"): "--sample 100: at least 256 is needed",
        ("--name", "a b"): "--name 'a b'",
        ("--codebooks", str(tmp_path / "none")): "no such codebooks file",
        ("--codebooks", source): "not a file of codebooks",
        ("--codebooks", str(books), "--codes", "8"): "--codes is for learning codebooks",
        ("--codebooks", str(books), "--keep-lengths"): "--keep-lengths is for learning codebooks",
    }
    for arguments, message in bad.items():
        assert message in refused(capsys, "semantic-ids", source, "--out", out, *arguments), arguments
    assert "ends in .parquet" in refused(capsys, "semantic-ids", source, "--out", tmp_path / "s.csv")
    for name, vectors, message in (
        ("nan", nan, "the vector of item 3 is not finite"),
        ("same", np.ones((300, 4)), "all vectors are alike"),
    ):
        path = write_vectors(tmp_path / f"{name}.npz", vectors)
        assert f"{name}.npz: {message}" in refused(capsys, "semantic-ids", path, "--out", out)
    other = write_vectors(tmp_path / "numbers.npz", random_vectors())
    assert "ids are int64 on one side" in refused(capsys, "semantic-ids", source, other, "--out", out)
    narrow = write_vectors(tmp_path / "narrow.npz", random_vectors(dim=5))
    assert "made for vectors of [24]" in refused(
        capsys, "semantic-ids", narrow, "--out", out, "--codebooks", str(books)
    )
    assert out.read_bytes() == before
    with pytest.raises(SystemExit):
        main(["semantic-ids", "--out", str(out)])


def test_integer_ids_stay_integers(tmp_path):
    source = write_vectors(tmp_path / "v.npz", random_vectors(20), [2**40 + n for n in range(20)])
    semantic_ids([source], tmp_path / "s.parquet", codes=4)
    assert pq.read_table(tmp_path / "s.parquet").schema.field("item_id").type == pa.int64()
