from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from mmctr.data.embedding_export import write_embeddings
from mmctr.data.prepare import open_dataset
from mmctr.runs.config import DataConfig
from mmctr.runs.content import item_content
from mmctr.runs.frozen_features import with_frozen_features
from tests.encoders.test_encoders import ENCODERS
from tests.tasks.test_pretrain import pretrain_task


def towers(image="frozen", text="frozen", **more) -> dict:
    parts = {"image": image, "text": text}
    return ENCODERS["towers"] | {name: ENCODERS["towers"][name] | {"mode": mode} for name, mode in parts.items()} | more


@pytest.fixture
def dataset(toy_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MMCTR_CACHE", str(tmp_path / "cache"))
    return open_dataset(toy_folder)


def content_of(dataset, task):
    return item_content(dataset, DataConfig(path="unused"), task, Accelerator(cpu=True))


def test_features_are_the_towers_and_are_made_once(dataset, monkeypatch):
    task = pretrain_task(towers(), projection={"dim": 8}).train()
    content = content_of(dataset, task)
    rows = torch.tensor([7, 3, 90])
    batch = content.batch(rows)
    assert batch.image is None and batch.input_ids is None
    plain = pretrain_task(towers("full", "full"), projection={"dim": 8}).eval()
    live = content_of(dataset, plain).batch(rows)
    assert live.image_features is None and live.image is not None
    with torch.no_grad():
        torch.testing.assert_close(batch.image_features, plain.encoder.encode_image(live.image))
        expected = plain.encoder.encode_text(live.input_ids)
        torch.testing.assert_close(batch.text_features[live.has_text], expected[live.has_text])
        torch.testing.assert_close(task.eval().embed(batch)[0], plain.embed(live)[0])
    assert batch.has_image.equal(live.has_image) and batch.has_text.equal(live.has_text)

    def never(*_):
        raise AssertionError("encoded again")

    monkeypatch.setattr(task.encoder, "encode_image", never)
    monkeypatch.setattr(task.encoder, "encode_text", never)
    again = content_of(dataset, task)
    assert again.pictures[0].features.equal(content.pictures[0].features)
    assert len(list(dataset.folder.glob("features-*"))) == 2


def test_other_weights_have_other_features(dataset):
    first = content_of(dataset, pretrain_task(towers(text="full")))
    assert first.texts[0].features is None  # that tower learns
    task = pretrain_task(towers(text="full"))
    with torch.no_grad():
        next(task.encoder.text_backbone.parameters()).add_(1.0)  # the other tower: nothing is made again
    content_of(dataset, task)
    assert len(list(dataset.folder.glob("features-image-*"))) == 1
    with torch.no_grad():
        next(task.encoder.image_backbone.parameters()).add_(1.0)
    changed = content_of(dataset, task)
    assert len(list(dataset.folder.glob("features-image-*"))) == 2
    assert not changed.pictures[0].features.equal(first.pictures[0].features)


def test_augmented_pictures_are_encoded_each_time(dataset):
    content = content_of(dataset, pretrain_task(towers(augment={"flip": 0.5})))
    assert content.pictures[0].features is None and content.texts[0].features is not None


def test_a_killed_build_goes_on(dataset, monkeypatch):
    task = pretrain_task(towers())
    monkeypatch.setattr(
        "mmctr.runs.frozen_features.write_embeddings", lambda *a, **k: write_embeddings(*a, **k | {"shard_size": 50})
    )
    encode, calls = task.encoder.encode_image, [0]

    def failing(image):
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        return encode(image)

    monkeypatch.setattr(task.encoder, "encode_image", failing)
    with pytest.raises(KeyboardInterrupt):
        content_of(dataset, task)
    content = content_of(dataset, task)
    assert calls[0] == 1 + 3 - 1 + 1  # three shards, the second one twice
    reference = replace(content.pictures[0], features=None)
    with torch.no_grad():
        whole = encode(reference.take(torch.arange(120)))
    has = torch.from_numpy(reference.has)
    torch.testing.assert_close(content.pictures[0].features[has], whole[has])


def test_nothing_changes_for_towers_that_learn(dataset):
    task = pretrain_task()
    content = content_of(dataset, task)
    assert with_frozen_features(task.encoder, content, dataset.catalog, Accelerator(cpu=True)) == content
    assert task.encoder.training
