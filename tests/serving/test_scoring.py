"""A ranker's answers for one user; that they are those of evaluation is tested through the server."""

from __future__ import annotations

import shutil
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from accelerate import Accelerator

from mmctr.evaluation.predict import predict
from mmctr.runs.finished import all_impressions
from mmctr.serving.scoring import Scorer
from tests.helpers.tiny import finetune_values, start, write_config

pytestmark = pytest.mark.slow


def test_context_columns_are_those_given_or_the_latest(runs, toy_folder, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(toy_folder, data)
    log = pq.read_table(data / "interactions.parquet")
    places = pa.array([["top", "side"][n % 2] for n in range(len(log))])
    pq.write_table(log.append_column("place", places), data / "interactions.parquet")
    values = finetune_values(data, None, epochs=1)
    values["task"]["features"] = {"context": {"place": {"name": "categorical"}}}
    start(tmp_path, "finetune.train", write_config(tmp_path / "c.yaml", values), f"run_dir={tmp_path / 'run'}").ok()
    scorer = Scorer(tmp_path / "run")
    part, times = all_impressions(scorer.dataset.interactions), scorer.dataset.interactions.time
    expected = predict(scorer.task, scorer.ranking.collator(part), Accelerator())
    places = scorer.dataset.context["place"].to_pylist()
    for row in range(5, 600, 53):
        user, at = int(part.user[row]), int(times[row])
        history, item = scorer.history(user, at), part.item[row : row + 1]
        given = scorer.score(user, item, history, {"place": places[row]})
        np.testing.assert_allclose(given, expected[row], rtol=1e-5)
        other = scorer.score(user, item, history, {"place": {"top": "side", "side": "top"}[places[row]]})
        assert other[0] != given[0]
        latest = max(np.flatnonzero((part.user == user) & (times <= at)))
        np.testing.assert_array_equal(
            scorer.score(user, item, history, at=at), scorer.score(user, item, history, {"place": places[latest]})
        )
    assert scorer.score(scorer.stranger, item, history).shape == (1,)
    for context, message in (({"shop": 1}, "reads place"), ({"place": 7}, "7 is no")):
        with pytest.raises(ValueError, match=message):
            scorer.score(user, item, history, context)


def test_scores_do_not_depend_on_threads(runs):
    scorer = Scorer(runs / "table")
    rows, history = np.arange(50), scorer.history(1)
    expected = scorer.score(1, rows, history)
    found, barrier = [], threading.Barrier(8)

    def one():
        barrier.wait()
        found.append(scorer.score(1, rows, history))

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    for scores in found:
        np.testing.assert_allclose(scores, expected, rtol=1e-6)
