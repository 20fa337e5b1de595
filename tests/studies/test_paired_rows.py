"""Paired differences of a study on predictions with chosen scores."""

from __future__ import annotations

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from mmctr.studies.config import StudyConfig
from mmctr.studies.result_types import StudyResults
from mmctr.studies.results import study_results
from mmctr.studies.table import study_table
from tests.helpers.damage import rewrite
from tests.helpers.studies import kept, with_scores, write_study

pytestmark = pytest.mark.slow


def test_seeds_that_disagree_widen_the_interval(copied_study):
    study, out, _ = copied_study
    noise = np.random.default_rng(0).random(100_000)

    def agree(method, seed, columns):
        return noise[: len(columns["label"])] + 0.2 * columns["label"] * (method == "content")

    with_scores(out, agree)
    methods = study_results(study, kept(study, out)).to_json()["protocols"]["held_out"]["methods"]
    found = methods["content"]["difference"]["all"]
    # seeds that agree add nothing to the spread of users
    low, high = found["gauc_ci"]
    assert low > 0.05 and high - low == pytest.approx(np.diff(found["seeds"][0]["gauc_ci"])[0], rel=0.3)

    def disagree(method, seed, columns):
        return noise[: len(columns["label"])] + 0.2 * columns["label"] * (method == "content") * (1 if seed else -1)

    with_scores(out, disagree)
    results = study_results(study, kept(study, out))
    found = results.to_json()["protocols"]["held_out"]["methods"]["content"]["difference"]["all"]
    ends = [one["gauc_ci"] for one in found["seeds"]]
    assert ends[0][1] < 0 < ends[1][0]  # each seed alone is sure of itself
    assert found["gauc_ci"][0] < ends[0][1] and found["gauc_ci"][1] > ends[1][0]
    table = study_table(results)
    assert f"{found['gauc']:+.4f}".replace("0.", ".") + " *" not in table


def test_a_star_takes_users_enough(copied_study):
    study, out, _ = copied_study
    noise = np.random.default_rng(0).random(100_000)
    with_scores(
        out, lambda method, _, columns: noise[: len(columns["label"])] + 0.4 * columns["label"] * (method != "ids")
    )

    def of_users(count: int) -> StudyResults:
        for path in out.glob("runs/*/*/seed*/predictions.parquet"):
            table = pq.read_table(path)
            user, label = (table[name].to_numpy() for name in ("user", "label"))
            both = [one for one in np.unique(user) if len(set(label[user == one])) == 2][:count]
            pq.write_table(table.filter(np.isin(user, both)), path)
            rewrite(path.with_name("metrics.json"), {})
        return study_results(study, kept(study, out))

    for count, stars in ((12, True), (4, False)):
        results = of_users(count)
        found = results.to_json()["protocols"]["held_out"]["methods"]["content"]["difference"]["all"]
        assert found["num_users"] == found["seeds"][0]["num_users"] == count and found["gauc_ci"][0] > 0
        assert (f"{found['gauc']:+.4f}".replace("0.", ".") + " *" in study_table(results)) == stars


def test_gap_closed_is_the_share_of_the_oracles_difference(finished_study, toy_folder, tmp_path):
    def three(values):
        values["methods"]["half"] = values["methods"]["content"]
        values["oracle"] = "content"

    study = StudyConfig.load(write_study(tmp_path, toy_folder, three))
    out = tmp_path / "out"
    for seed in (0, 3):
        for name in study.methods:
            method = "ids" if name == "ids" else "content"
            source = finished_study[1] / "out" / "runs" / "held_out" / method / f"seed{seed}"
            shutil.copytree(source, out / "runs" / "held_out" / name / f"seed{seed}")
    noise = np.random.default_rng(0).random(100_000)
    strength = {"ids": 0.0, "half": 0.1, "content": 0.4}
    with_scores(out, lambda method, _, columns: noise[: len(columns["label"])] + strength[method] * columns["label"])
    methods = study_results(study, kept(study, out)).to_json()["protocols"]["held_out"]["methods"]
    found = methods["half"]["gap_closed"]
    cold = {name: methods[name]["difference"]["cold"]["gauc"] for name in ("half", "content")}
    assert found["share"] == pytest.approx(cold["half"] / cold["content"])
    assert found["seeds"] == pytest.approx([found["share"]] * 2)
    assert 0 < found["share_ci"][0] < found["share"] < found["share_ci"][1] < 1
    assert methods["ids"]["gap_closed"] is None and methods["content"]["gap_closed"] is None
    with_scores(out, lambda _, __, columns: noise[: len(columns["label"])])
    methods = study_results(study, kept(study, out)).to_json()["protocols"]["held_out"]["methods"]
    assert methods["half"]["gap_closed"] is None  # no gap, no share of it


def test_runs_on_other_rows_and_without_predictions_are_named(copied_study):
    study, out, _ = copied_study
    path = out / "runs" / "held_out" / "content" / "seed0" / "predictions.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)
    rewrite(path.with_name("metrics.json"), {})
    with pytest.raises(ValueError, match=r"content/seed0: its test rows are not those of .*ids/seed0"):
        study_results(study, kept(study, out))
    path.unlink()
    with pytest.raises(ValueError, match=r"content/seed0/predictions.parquet: missing; run the recipe again"):
        study_results(study, kept(study, out))
