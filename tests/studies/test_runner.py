"""`mmctr coldstart`: cells are runs made once, and what is said of them is what their predictions say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from mmctr.cli.main import main
from mmctr.data.embeddings import EmbeddingTable, write_npz
from mmctr.evaluation.metrics import gauc, log_loss, paired_difference
from mmctr.files import read_json
from mmctr.studies.config import StudyConfig
from mmctr.studies.controls import factor_table
from mmctr.studies.page import write_study_page
from mmctr.studies.plots import write_figures
from mmctr.studies.results import study_results
from mmctr.studies.runner import Outcome, run_study, study_cells
from mmctr.studies.table import study_table
from tests.helpers.tiny import finetune_values, log_lines, start, write_config
from tests.reports.test_compare import Page

pytestmark = pytest.mark.slow


class Launcher:
    """Runs cells in forked processes and remembers them."""

    def __init__(self, kill_at_rename: int | None = None) -> None:
        self.calls: list[str] = []
        self.kill_at_rename = kill_at_rename

    def __call__(self, arguments: Sequence[str], log: Path) -> int:
        self.calls.append(str(Path(log).with_suffix("").relative_to(log.parents[2])))
        run = start(log.with_suffix(".output"), "finetune.train", *arguments, kill_at_rename=self.kill_at_rename)
        code = run.wait()
        log.write_text(run.text, encoding="utf-8")
        return code


def write_study(folder: Path, data: Path, change: Callable[[dict], None] = lambda values: None) -> Path:
    """Two methods on the toy folder, with two seeds; their configs stand beside the study."""
    write_config(folder / "ids.yaml", finetune_values(data))
    content = {"name": "table", "path": "unset", "dim": 8, "hidden": [8]}
    write_config(folder / "table.yaml", finetune_values(data, content))
    values = {
        "data": str(data),
        "protocols": {"held_out": {"name": "cold_items", "cold": 0.3, "test": 0.3}},
        "tables": {"factors": {"name": "factors"}},
        "set": ["task.max_history=8", "task.user_dim=2"],
        "methods": {
            "ids": {"config": str(folder / "ids.yaml")},
            "content": {"config": str(folder / "table.yaml"), "table": "factors", "set": ["task.user_dim=4"]},
        },
        "baseline": "ids",
        "seeds": [0, 3],
        "bootstrap": 50,
        "out": str(folder / "out"),
    }
    change(values)
    return write_config(folder / "study.yaml", values)


@pytest.fixture(scope="module")
def made(toy_folder, tmp_path_factory):
    """(study, its folder, results, launched cells) of one finished study; not to be written to."""
    folder, launch = tmp_path_factory.mktemp("study"), Launcher()
    study = StudyConfig.load(write_study(folder, toy_folder))
    outcomes = run_study(study, folder / "out", launch=launch, jobs=2)
    assert [one.state for one in outcomes] == ["made"] * 4, [one.said for one in outcomes]
    return study, folder, study_results(study, outcomes), launch.calls


@pytest.fixture
def copied(made, tmp_path):
    """The same study and runs, where they may be changed; the paths of its configs stay those of the original."""
    study, folder, results, _ = made
    shutil.copytree(folder / "out", tmp_path / "out")
    # tables are named in the configs, so their place counts
    shutil.rmtree(tmp_path / "out" / "tables")
    (tmp_path / "out" / "tables").symlink_to(folder / "out" / "tables")
    return study, tmp_path / "out", results


def predictions(folder: str | Path) -> dict[str, np.ndarray]:
    table = pq.read_table(Path(folder) / "predictions.parquet")
    return {name: table[name].to_numpy() for name in table.column_names}


def test_cells_are_ordinary_runs_seed_by_seed(made):
    study, folder, _, calls = made
    expected = [f"held_out/{name}/seed{seed}" for seed in (0, 3) for name in ("ids", "content")]
    assert {*calls[:2]} == {*expected[:2]} and {*calls} == {*expected} and len(calls) == 4  # two at a time
    config = yaml.safe_load((folder / "out" / "runs" / "held_out" / "content" / "seed3" / "config.yaml").read_text())
    assert config["seed"] == 3 and config["split"]["cold"] == 0.3 and config["task"]["max_history"] == 8
    assert config["task"]["user_dim"] == 4  # of the method, after that of all
    assert config["task"]["embedder"]["content"]["path"] == str(folder / "out" / "tables" / "factors.npz")
    assert config["data"]["path"] == study.data


def test_a_second_call_runs_nothing_and_a_removed_cell_runs_alone(made):
    study, folder, results, _ = made
    again = Launcher()
    outcomes = run_study(study, folder / "out", launch=again)
    assert not again.calls and {one.state for one in outcomes} == {"kept"}
    assert study_results(study, outcomes) == results
    shutil.rmtree(folder / "out" / "runs" / "held_out" / "content" / "seed0")
    outcomes = run_study(study, folder / "out", launch=again)
    assert again.calls == ["held_out/content/seed0"]
    assert [one.state for one in outcomes] == ["kept", "made", "kept", "kept"]
    assert study_results(study, outcomes) == results  # one thread, fp32: bit for bit


def test_a_killed_cell_is_reported_and_goes_on(made):
    study, folder, results, _ = made
    cell = folder / "out" / "runs" / "held_out" / "ids" / "seed3"
    shutil.rmtree(cell)
    outcomes = run_study(study, folder / "out", launch=Launcher(kill_at_rename=4))
    assert [one.state for one in outcomes] == ["kept", "kept", "failed", "kept"]
    assert list((cell / "checkpoints").iterdir()) and not (cell / "metrics.json").exists()
    found = study_results(study, outcomes)
    assert [(one["method"], one["seed"]) for one in found["failed"]] == [("ids", 3)]
    methods = found["protocols"]["held_out"]["methods"]
    assert methods["ids"]["seeds"] == [0] and methods["content"]["seeds"] == [0, 3]
    assert [one["seed"] for one in methods["content"]["difference"]["cold"]["seeds"]] == [0]
    outcomes = run_study(study, folder / "out", launch=(launch := Launcher()))
    assert launch.calls == ["held_out/ids/seed3"] and study_results(study, outcomes) == results
    assert sum(line.get("step") == 1 and "loss" in line for line in log_lines(cell)) == 1  # not from the start again


def test_numbers_are_those_of_the_predictions(made):
    study, _, results, _ = made
    protocol = results["protocols"]["held_out"]
    ids, content = ([predictions(folder) for folder in protocol["methods"][name]["folders"]] for name in study.methods)
    cold = ids[0]["cold"]
    assert protocol["rows"] == {"all": len(cold), "warm": int((~cold).sum()), "cold": int(cold.sum())}
    for split, rows in (("all", cold | True), ("warm", ~cold), ("cold", cold)):
        values = [gauc(run["label"][rows], run["score"][rows], run["user"][rows]) for run in content]
        found = protocol["methods"]["content"]["test"][split]
        assert found["gauc"]["seeds"] == pytest.approx(values, abs=1e-9)
        expected = (np.mean(values), min(values), max(values))
        assert tuple(found["gauc"][key] for key in ("mean", "low", "high")) == pytest.approx(expected, abs=1e-9)
        losses = [log_loss(run["label"][rows], run["score"][rows]) for run in content]
        assert found["log_loss"]["mean"] == pytest.approx(np.mean(losses), abs=1e-6)
        difference = protocol["methods"]["content"]["difference"][split]
        base = [gauc(run["label"][rows], run["score"][rows], run["user"][rows]) for run in ids]
        assert difference["gauc"] == pytest.approx(np.mean(values) - np.mean(base), abs=1e-12)
        for number, one in enumerate(difference["seeds"]):
            pair = (run[number]["score"][rows] for run in (ids, content))
            by_hand = paired_difference(ids[0]["label"][rows], *pair, ids[0]["user"][rows], num_samples=50)
            assert {key: one[key] for key in by_hand} == by_hand
    assert protocol["methods"]["ids"]["difference"] is None
    buckets = protocol["methods"]["ids"]["buckets"]
    assert sum(bucket["num_impressions"] for bucket in buckets) == len(cold)
    zero = ids[0]["clicks"] == 0
    expected = [gauc(run["label"][zero], run["score"][zero], run["user"][zero]) for run in ids]
    assert buckets[0]["clicks"] == "0" and buckets[0]["gauc"]["seeds"] == pytest.approx(expected, abs=1e-9)
    curve = protocol["methods"]["ids"]["validation"]
    assert [point["epoch"] for point in curve] == [1, 2]
    logs = [log_lines(Path(folder)) for folder in protocol["methods"]["ids"]["folders"]]
    last = [[line["validation"] for line in lines if "validation" in line][-1] for lines in logs]
    for name in ("gauc", "log_loss"):
        assert curve[-1][name]["seeds"] == [line[name] for line in last]


def with_scores(out: Path, change: Callable[[str, int, dict], np.ndarray]) -> None:
    """Replace the scores of all runs of a study by those of (method, seed, columns)."""
    for path in out.glob("runs/*/*/seed*/predictions.parquet"):
        columns = predictions(path.parent)
        columns["score"] = change(path.parts[-3], int(path.parts[-2].removeprefix("seed")), columns).astype(np.float32)
        table = pq.read_table(path)
        place = table.column_names.index("score")
        pq.write_table(table.set_column(place, "score", [columns["score"]]), path)


def kept(study: StudyConfig, out: Path) -> list[Outcome]:
    return [Outcome(cell, "kept") for cell in study_cells(study, out)]


def test_seeds_that_disagree_widen_the_interval(copied):
    study, out, _ = copied
    noise = np.random.default_rng(0).random(100_000)

    def agree(method, seed, columns):
        return noise[: len(columns["label"])] + 0.2 * columns["label"] * (method == "content")

    with_scores(out, agree)
    found = study_results(study, kept(study, out))["protocols"]["held_out"]["methods"]["content"]["difference"]["all"]
    assert found["gauc_ci"][0] > 0.05 and found["gauc_ci"] == pytest.approx(found["seeds"][0]["gauc_ci"])

    def disagree(method, seed, columns):
        return noise[: len(columns["label"])] + 0.2 * columns["label"] * (method == "content") * (1 if seed else -1)

    with_scores(out, disagree)
    results = study_results(study, kept(study, out))
    found = results["protocols"]["held_out"]["methods"]["content"]["difference"]["all"]
    ends = [one["gauc_ci"] for one in found["seeds"]]
    assert ends[0][1] < 0 < ends[1][0]  # each seed alone is sure of itself
    assert found["gauc_ci"][0] < ends[0][1] and found["gauc_ci"][1] > ends[1][0]
    table = study_table(results)
    assert f"{found['gauc']:+.4f}".replace("0.", ".") + " *" not in table


def test_a_star_takes_users_enough(copied):
    study, out, _ = copied
    noise = np.random.default_rng(0).random(100_000)
    with_scores(
        out, lambda method, _, columns: noise[: len(columns["label"])] + 0.4 * columns["label"] * (method != "ids")
    )

    def of_users(count: int) -> dict:
        for path in out.glob("runs/*/*/seed*/predictions.parquet"):
            table = pq.read_table(path)
            user, label = (table[name].to_numpy() for name in ("user", "label"))
            both = [one for one in np.unique(user) if len(set(label[user == one])) == 2][:count]
            pq.write_table(table.filter(np.isin(user, both)), path)
        return study_results(study, kept(study, out))

    for count, stars in ((12, True), (4, False)):
        results = of_users(count)
        found = results["protocols"]["held_out"]["methods"]["content"]["difference"]["all"]
        assert found["num_users"] == found["seeds"][0]["num_users"] == count and found["gauc_ci"][0] > 0
        assert (f"{found['gauc']:+.4f}".replace("0.", ".") + " *" in study_table(results)) == stars


def test_gap_closed_is_the_share_of_the_oracles_difference(made, toy_folder, tmp_path):
    def three(values):
        values["methods"]["half"] = values["methods"]["content"]
        values["oracle"] = "content"

    study = StudyConfig.load(write_study(tmp_path, toy_folder, three))
    out = tmp_path / "out"
    for seed in (0, 3):
        for name in study.methods:
            source = made[1] / "out" / "runs" / "held_out" / ("ids" if name == "ids" else "content") / f"seed{seed}"
            shutil.copytree(source, out / "runs" / "held_out" / name / f"seed{seed}")
    noise = np.random.default_rng(0).random(100_000)
    strength = {"ids": 0.0, "half": 0.1, "content": 0.4}
    with_scores(out, lambda method, _, columns: noise[: len(columns["label"])] + strength[method] * columns["label"])
    methods = study_results(study, kept(study, out))["protocols"]["held_out"]["methods"]
    found = methods["half"]["gap_closed"]
    cold = {name: methods[name]["difference"]["cold"]["gauc"] for name in ("half", "content")}
    assert found["share"] == pytest.approx(cold["half"] / cold["content"])
    assert found["seeds"] == pytest.approx([found["share"]] * 2)
    assert 0 < found["share_ci"][0] < found["share"] < found["share_ci"][1] < 1
    assert methods["ids"]["gap_closed"] is None and methods["content"]["gap_closed"] is None
    with_scores(out, lambda _, __, columns: noise[: len(columns["label"])])
    methods = study_results(study, kept(study, out))["protocols"]["held_out"]["methods"]
    assert methods["half"]["gap_closed"] is None  # no gap, no share of it


def test_page_and_table_hold_the_numbers(made, tmp_path):
    results = made[2]
    hostile = {**results, "study": {**results["study"], "data": "<script>alert(1)</script>"}}
    cell = {"protocol": "held_out", "method": "ids", "seed": 0, "log": "a.log", "said": "<b onload='x'>"}
    write_study_page({**hostile, "failed": [cell]}, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    page, table = Page(html), study_table(results)
    assert "<script" not in html and "<b onload" not in html and "src=" not in html
    assert max(map(len, table.splitlines())) <= 100
    for found in results["protocols"]["held_out"]["methods"].values():
        for split in ("all", "warm", "cold"):
            assert f"{found['test'][split]['gauc']['mean']:.4f}" in page.text
            assert f"{found['test'][split]['gauc']['mean']:.4f}" in table
    difference = results["protocols"]["held_out"]["methods"]["content"]["difference"]["cold"]
    for one in (difference, *difference["seeds"]):
        assert f"{one['gauc']:+.4f}" in page.text and "[{:+.4f}, {:+.4f}]".format(*one["gauc_ci"]) in page.text
    assert "50 resamples" in page.text and "50 resamples" in " ".join(table.split())
    assert page.tags.count("svg") == 4 + 2 + 2 + 1 + 2  # four plots; marks in the legend and in three tables
    assert json.loads(json.dumps(results, allow_nan=False)) == results


def test_figures_are_files_that_stand_alone(made, tmp_path):
    results = made[2]
    nothing = {**results["protocols"]["held_out"], "methods": {}}
    written = write_figures({**results, "protocols": {**results["protocols"], "empty": nothing}}, tmp_path / "figures")
    names = [f"held_out_{name}.svg" for name in ("clicks", "epochs_gauc", "epochs_auc", "epochs_log_loss")]
    assert [path.name for path in written] == names
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == sorted(names)
    for path in written:
        root = ElementTree.parse(path).getroot()  # well-formed, with a namespace, or no viewer shows it
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and "var(--p0)" in path.read_text()
        words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
        assert words[-2:] == ["ids", "content"]
        assert len(list(root.iter("{http://www.w3.org/2000/svg}g"))) == 2 * 2  # a line and a key for each method


def test_command_goes_on_after_a_failed_cell_and_exits_with_1(made, toy_folder, tmp_path, capsys):
    def breaks(values):
        lost = {"config": str(tmp_path / "table.yaml"), "set": ["task.embedder.content.path=nowhere"]}
        values["methods"] = {"lost": lost, **values["methods"]}
        values["seeds"] = [0]

    path = write_study(tmp_path, toy_folder, breaks)
    study, out = StudyConfig.load(path), tmp_path / "out"
    for name in ("ids", "content"):
        shutil.copytree(
            made[1] / "out" / "runs" / "held_out" / name / "seed0", out / "runs" / "held_out" / name / "seed0"
        )
    config = out / "runs" / "held_out" / "content" / "seed0" / "config.yaml"
    config.write_text(config.read_text().replace(str(made[1] / "out"), str(out)))
    with pytest.raises(SystemExit) as caught:
        main(["coldstart", str(path), "--json", f"--html={tmp_path}/page.html", f"--figures={tmp_path}/svg"])
    said = capsys.readouterr()
    assert caught.value.code == 1 and "1 runs failed" in said.err and "FAILED with exit code 1" in said.err
    results = json.loads(said.out)
    assert results == read_json(out / "results.json") and (tmp_path / "page.html").is_file()
    assert (tmp_path / "svg" / "held_out_clicks.svg").is_file()
    (failed,) = results["failed"]
    assert failed["method"] == "lost" and "nowhere: no such embedding folder or file" in failed["said"]
    assert "no such embedding folder" in Path(failed["log"]).read_text()
    assert set(results["protocols"]["held_out"]["methods"]) == {"ids", "content"}
    assert study.seeds == [0]


def test_a_study_of_which_nothing_is_finished_is_reported(made, tmp_path):
    study, folder, _, _ = made
    outcomes = [Outcome(cell, "failed", "why") for cell in study_cells(study, folder / "out")]
    results = study_results(study, outcomes)
    assert len(results["failed"]) == 4 and not results["protocols"]["held_out"]["methods"]
    assert "no run is finished" in study_table(results) and study_table(results).count("FAILED") == 4
    write_study_page(results, tmp_path / "report.html")
    assert "No run is finished" in Page((tmp_path / "report.html").read_text(encoding="utf-8")).text


def test_a_cell_of_another_config_is_refused(made):
    study, folder, _, _ = made
    changed = study.model_copy(
        update={"methods": {"ids": study.methods["ids"].model_copy(update={"set": ["fit.epochs=9"]})}}
    )
    with pytest.raises(
        ValueError, match=r"ids/seed0: holds a run of another config \(fit.epochs: 2.0 there, 9.0 in the"
    ):
        run_study(changed, folder / "out", launch=Launcher())


def test_vectors_that_changed_since_a_cell_was_made_are_refused(made, toy_folder, tmp_path):
    def from_file(values):
        del values["methods"]["content"]["table"]
        values["methods"]["content"]["set"].append(f"task.embedder.content.path={tmp_path / 'v.npz'}")
        values["seeds"] = [0]

    table = EmbeddingTable.read(made[1] / "out" / "tables" / "factors.npz")
    write_npz(table, tmp_path / "v.npz")
    study, out = StudyConfig.load(write_study(tmp_path, toy_folder, from_file)), tmp_path / "out"
    run_study(study, out, launch=Launcher())
    more = study.model_copy(update={"seeds": [0, 1]})
    write_npz(EmbeddingTable(table.ids, table.vectors[::-1]), tmp_path / "v.npz")
    with pytest.raises(ValueError, match=r"content/seed0: was made with other vectors than .*v.npz holds now"):
        run_study(more, out, launch=(launch := Launcher()))
    assert not launch.calls
    write_npz(EmbeddingTable(table.ids, table.vectors + np.float32(1e-6)), tmp_path / "v.npz")  # rounding
    assert {one.state for one in run_study(study, out, launch=launch)} == {"kept"}
    (tmp_path / "v.npz").unlink()
    assert {one.state for one in run_study(study, out, launch=launch)} == {"kept"} and not launch.calls


def test_runs_on_other_rows_and_without_predictions_are_named(copied):
    study, out, _ = copied
    path = out / "runs" / "held_out" / "content" / "seed0" / "predictions.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)
    with pytest.raises(ValueError, match=r"content/seed0: its test rows are not those of .*ids/seed0"):
        study_results(study, kept(study, out))
    path.unlink()
    with pytest.raises(ValueError, match=r"content/seed0: has no predictions.parquet; write it with `mmctr evaluate"):
        study_results(study, kept(study, out))


def test_a_changed_table_is_refused(copied):
    study, out, _ = copied
    (out / "tables").unlink()
    table = factor_table(study.data)
    write_npz(EmbeddingTable(table.ids, 1 - table.vectors), out / "tables" / "factors.npz")
    ids_only = study.model_copy(update={"methods": {"ids": study.methods["ids"]}})
    with pytest.raises(ValueError, match=r"factors.npz: holds another table than `tables.factors` gives now"):
        run_study(ids_only, out, launch=Launcher())
