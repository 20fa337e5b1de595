from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from accelerate import Accelerator

from mmctr.data.prepare import open_dataset
from mmctr.data.splits import ColdItemsSplit, GivenSplit, SplitConfig, split_interactions
from mmctr.evaluation.pretraining import ValidationCoClicks, evaluate_pretraining
from mmctr.evaluation.probes import (
    coclick_auc,
    coclick_recall,
    neighbour_agreement,
    retrieval_both_ways,
    zero_shot_accuracy,
)
from mmctr.runs.config import DataConfig, PretrainConfig
from mmctr.runs.content import item_content
from mmctr.runs.pretrain_data import PretrainData, item_keys
from tests.helpers.tiny import ARCHITECTURE
from tests.helpers.worlds import log_columns, picture, write_dataset
from tests.tasks.test_pretrain import pretrain_task

SPLIT = ColdItemsSplit(cold=0.2, validation_cold=0.1)


def data_of(folder, task, seed=0, attributes=(), split: SplitConfig = SPLIT, **config) -> PretrainData:
    dataset = open_dataset(folder)
    content = item_content(dataset, DataConfig(path=str(folder), **config), task, Accelerator(cpu=True))
    return PretrainData.make(
        dataset,
        content,
        task,
        split,
        validation=0.15,
        same=["text", "image"],
        attributes=attributes,
        source=str(folder),
        seed=seed,
    )


def test_items_to_train_on(toy_folder):
    """For pictures against texts those with both; with behaviour all that have either; held-out ones never."""
    pairs = data_of(toy_folder, pretrain_task())
    behavior = data_of(toy_folder, pretrain_task(objectives={"clip": {}, "behavior": {}}))
    content = pairs.content
    both, either = content.has_image & content.has_text, content.has_image | content.has_text
    assert set(pairs.train_rows) | set(pairs.validation.rows) == set(np.flatnonzero(both))
    assert set(behavior.train_rows) | set(behavior.validation.rows) == set(np.flatnonzero(either))
    assert len(behavior.train_rows) > len(pairs.train_rows)
    for data in (pairs, behavior):
        assert set(data.train_rows).isdisjoint(data.validation.rows) and len(data.validation.rows) > 10
    assert pairs.validation.rows.tolist() == behavior.validation.rows.tolist()
    assert data_of(toy_folder, pretrain_task(), seed=5).validation.rows.tolist() == pairs.validation.rows.tolist()
    assert pairs.counts["train_items"] == len(pairs.train_rows) and not pairs.partners.samplers


def test_partners_come_from_training_clicks_alone(toy_folder):
    task = pretrain_task(objectives={"behavior": {"hard_negatives": True}})
    data = data_of(toy_folder, task)
    splits = split_interactions(open_dataset(toy_folder).interactions, 120, SPLIT)
    known = set(np.flatnonzero(splits.seen)) - set(data.validation.rows)
    clicked = {
        (int(u), int(i)) for u, i, y in zip(splits.train.user, splits.train.item, splits.train.label, strict=True) if y
    }
    together = {(a, b) for u, a in clicked for v, b in clicked if u == v}
    found = 0
    collate = data.collator()
    for step in range(30):
        batch = collate(np.arange(len(data.train_rows)), step)
        rows = batch.items.row
        for name in ("clicked", "shown"):
            partner = batch.partners[name]
            drawn = rows[partner.item][partner.has_partner].tolist()
            assert set(drawn) <= known
            found += len(drawn)
        clicks = batch.partners["clicked"]
        pairs = zip(
            rows[batch.anchor][clicks.has_partner].tolist(), rows[clicks.item][clicks.has_partner].tolist(), strict=True
        )
        assert all(pair in together for pair in pairs)
    assert found > 1000


def test_held_out_pairs_are_the_next_clicks_of_the_validation_part(toy_folder):
    splits = split_interactions(open_dataset(toy_folder).interactions, 120, SPLIT)
    part, has = splits.validation, np.ones(120, bool)
    expected = []
    for row in range(len(part)):
        history = part.history[part.history_start[row] : part.history_end[row]]
        if part.label[row] and len(history) and history[-1] != part.item[row]:
            expected.append((int(history[-1]), int(part.item[row])))
    found = ValidationCoClicks.make(splits, has)
    pairs = zip(found.rows[found.anchors].tolist(), found.rows[found.targets].tolist(), strict=True)
    assert sorted(pairs) == sorted(expected) and len(expected) > 30
    assert found.cold.tolist() == [splits.seen[row] == 0 for row in found.rows[found.targets]] and found.cold.any()
    assert found.rows.tolist() == list(range(120))
    assert ValidationCoClicks.make(splits, np.zeros(120, bool)) is None


def test_keys_tell_equal_pictures_texts_and_values(tmp_path):
    red, blue = picture((200, 0, 0)), picture((0, 0, 200))
    items = {
        "item_id": list(range(6)),
        "title": ["shirt", "shirt", "coat", None, None, "hat"],
        "image": pa.array([red, blue, red, None, None, b"broken"], pa.binary()),
        "brand": ["x", None, None, "y", "x", "z"],
    }
    folder = write_dataset(tmp_path / "d", items)
    task, dataset = pretrain_task(), open_dataset(folder)
    content = item_content(dataset, DataConfig(path=str(folder)), task, Accelerator(cpu=True))
    keys = item_keys(dataset.catalog, content, ["text", "image", "brand"]).tolist()

    def equal(column: int) -> set[tuple[int, int]]:
        return {(a, b) for a in range(6) for b in range(a) if keys[a][column] == keys[b][column]}

    assert [row[0] for row in keys] == list(range(6)) and len(keys[0]) == 4
    assert equal(1) == {(1, 0)} and equal(2) == {(2, 0)} and equal(3) == {(4, 0)}
    with pytest.raises(ValueError, match="'brend'"):
        item_keys(dataset.catalog, content, ["brend"])


def test_numbers_are_those_of_the_vectors(toy_folder):
    task = pretrain_task(objectives={"clip": {}, "behavior": {}}, item_vector="concat").eval()
    data = data_of(toy_folder, task, attributes=["factor_shape"])
    numbers = evaluate_pretraining(task, data.validation, Accelerator(cpu=True))
    rows = torch.from_numpy(data.validation.rows)
    with torch.no_grad():
        batch = data.content.batch(rows)
        images, texts = task.image_features(batch).numpy(), task.text_features(batch).numpy()
        items = task.embed(batch)[0].numpy()
        candidates = task.embed(data.content.batch(torch.from_numpy(data.validation.coclicks.rows)))[0].numpy()
        values = (
            open_dataset(toy_folder)
            .catalog.table.column("factor_shape")
            .take(pa.array(data.validation.rows))
            .to_pylist()
        )
        prompts = sorted(set(values))
        ids = task.encoder.tokenize(prompts).long()
        prompt_vectors = torch.nn.functional.normalize(task.encoder.encode_text(ids), dim=1).numpy()
    for name, value in retrieval_both_ways(images, texts).items():
        assert numbers[name] == pytest.approx(value)
    assert numbers["neighbours_share_factor_shape"] == pytest.approx(neighbour_agreement(items, values))
    labels = np.array([prompts.index(value) for value in values])
    assert numbers["zero_shot_factor_shape"] == pytest.approx(zero_shot_accuracy(images, prompt_vectors, labels))
    hit = coclick_recall(candidates, data.validation.coclicks.anchors, data.validation.coclicks.targets)
    assert numbers["coclick_recall"] == pytest.approx(hit.mean())
    cold = data.validation.coclicks.cold
    for name, mask in (("warm", ~cold), ("cold", cold)):
        anchors, targets = data.validation.coclicks.anchors[mask], data.validation.coclicks.targets[mask]
        expected = coclick_auc(candidates, anchors, targets, np.unique(targets))
        assert numbers[f"coclick_auc_{name}"] == pytest.approx(expected) and expected > 0
    assert {"alignment", "uniformity", "modality_gap"} <= numbers.keys()


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        ({"group": {"column": "colour"}}, "'colour'"),
        ({"query": {}}, "interactions.*'query'"),
        ({"query": {"column": "position"}}, None),
        ({"distillation": {"path": "nowhere"}}, "nowhere: no such embedding"),
    ],
)
def test_what_the_dataset_lacks_is_said(toy_folder, objectives, message):
    task = pretrain_task(objectives=objectives)
    if message is None:
        assert data_of(toy_folder, task).partners.queries is not None  # numbers are words too
        return
    with pytest.raises(ValueError, match=message):
        data_of(toy_folder, task)


def test_a_split_by_a_column_that_is_not_there_is_said_without_behavior_too(toy_folder):
    with pytest.raises(ValueError, match="column 'fold' is missing"):
        data_of(toy_folder, pretrain_task(), split=GivenSplit(column="fold"))


def test_a_log_without_pairs_is_said(tmp_path):
    columns = {"item_id": list(range(40)), "title": [f"item {i}" for i in range(40)]}
    columns["image"] = pa.array([picture((i, 0, 0)) for i in range(40)], pa.binary())
    # one click a user, the first of its impressions
    rows = [(user, (user + at) % 40, at, int(at == 0)) for user in range(30) for at in range(30)]
    log = log_columns(rows)
    folder = write_dataset(tmp_path / "d", columns, log)
    with pytest.raises(ValueError, match="no user has two training clicks near each other"):
        data_of(folder, pretrain_task(objectives={"behavior": {}}))


def test_several_texts_and_pictures_from_the_config(toy_folder):
    task = pretrain_task()
    data = data_of(toy_folder, task, text_fields={"description": 0.5}, images={"image": 1.0})
    assert [field.weight for field in data.content.texts] == [1.0, 0.5]
    batch = data.collator()(np.arange(20), 0)
    assert len(batch.items.input_ids) == len(batch.items)
    whole = data.content.batch(torch.arange(20))
    assert whole.text_item is not None and len(whole.input_ids) > 20
    numbers = evaluate_pretraining(task.eval(), data.validation, Accelerator(cpu=True))
    assert numbers["mean_recall"] >= 0
    with pytest.raises(ValueError, match="'photos'"):
        data_of(toy_folder, task, images={"photos": 1.0})


def test_the_number_that_chooses_the_weights_is_one_the_objectives_move():
    values = {"data": {"path": "x"}, "run_dir": "y", "attributes": ["shape"]}
    encoder = {"name": "openclip", "architecture": ARCHITECTURE}
    expected = {
        "mean_recall": ({"clip": {}}, {"clip": {}, "group": {"column": "shape"}}, {"group": {"column": "colour"}}),
        "coclick_recall": ({"clip": {}, "behavior": {}}, {"query": {}}),
        "neighbours_share_shape": ({"group": {"column": "shape"}},),
    }
    for primary, given in expected.items():
        for objectives in given:
            config = PretrainConfig.parse(values | {"task": {"encoder": encoder, "objectives": objectives}})
            assert config.primary_metric == primary
    head = {"encoder": encoder, "objectives": {}, "head": {"name": "beta_vae"}}
    assert PretrainConfig.parse(values | {"task": head}).primary_metric == "head_elbo"
