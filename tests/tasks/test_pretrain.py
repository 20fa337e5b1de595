from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmctr.data.batches import ItemBatch, PairBatch, PartnerBatch
from mmctr.losses.contrastive import (
    clip_loss,
    multi_positive_loss,
    pair_loss,
    siglip_loss,
    similarity_distillation_loss,
)
from mmctr.losses.objectives import DistillationConfig, ObjectivesConfig
from mmctr.tasks import PretrainTask, PretrainTaskConfig, RankingTask
from tests.encoders.test_encoders import ENCODERS
from tests.helpers.tiny import ARCHITECTURE

OPENCLIP = {"name": "openclip", "architecture": ARCHITECTURE}
TOWERS = {"encoder": ENCODERS["towers"], "projection": {"dim": 8}}


def pretrain_task(encoder=OPENCLIP, **values) -> PretrainTask:
    torch.manual_seed(0)
    return PretrainTask(PretrainTaskConfig.parse({"encoder": encoder, **values}))


TEXTS = ["a red circle", "blue", "", "", "green star", "a blue square", "yellow", "one more"]


def item_batch(task: PretrainTask, n=5, first=0) -> ItemBatch:
    size = task.encoder.image_size
    g = torch.Generator().manual_seed(first)
    return ItemBatch(
        row=torch.arange(first, first + n),
        image=torch.randint(0, 256, (n, 3, size, size), generator=g, dtype=torch.uint8),
        has_image=torch.tensor([True, False, True, False, True, True, True, True])[:n],
        input_ids=task.encoder.tokenize(TEXTS[:n]).long(),
        has_text=torch.tensor([True, True, False, False, True, True, True, True])[:n],
    )


def pair_batch(task: PretrainTask, n=8, first=0) -> PairBatch:
    """The first 4 items are anchors, with partners among all."""
    items = item_batch(task, n, first)
    partner = torch.tensor([5, 4, 2, 7])
    there = torch.tensor([True, True, False, True])
    teacher = F.normalize(torch.randn(n, 3, generator=torch.Generator().manual_seed(9)), dim=1)
    return PairBatch(
        items=items,
        anchor=torch.tensor([0, 4, 2, 6]),
        keys=torch.stack([items.row, -1 - items.row], 1),
        partners={
            "clicked": PartnerBatch(partner, there, torch.tensor([0.5, 0.0, 0.0, -0.5])),
            "shown": PartnerBatch(torch.tensor([6, 6, 2, 0]), torch.tensor([True, True, False, False])),
            "group": PartnerBatch(partner, there),
        },
        query_ids=task.encoder.tokenize(["circle", "star", "", "yellow one"]).long(),
        has_query=torch.tensor([True, True, False, True]),
        query=torch.tensor([0, 1, 0, 1]),
        groups={"colour": torch.tensor([0, 1, -1, -1, 1, 0, 2, 2])[:n]},
        teacher=teacher,
        has_teacher=torch.tensor([True] * (n - 2) + [False, True]),
    )


@torch.no_grad()
def test_item_vectors_by_hand():
    """Both: mean or side by side; one alone stands in for the other; none: zeros and False. All of unit norm."""
    for item_vector in ("mean", "concat"):
        task = pretrain_task(item_vector=item_vector).eval()
        batch = item_batch(task)
        image, text = task.image_features(batch), task.text_features(batch)
        for features in (image, text):
            torch.testing.assert_close(features.norm(dim=1), torch.ones(5))
        vectors, has = task.embed(batch)
        assert has.tolist() == [True, True, True, False, True] and vectors.shape == (5, task.embedding_dim)
        for row, (i, t) in enumerate(
            [(image[0], text[0]), (text[1], text[1]), (image[2], image[2]), (None, None), (image[4], text[4])]
        ):
            if i is None:
                assert vectors[row].eq(0).all()
                continue
            whole = i + t if item_vector == "mean" else torch.cat([i, t])
            torch.testing.assert_close(vectors[row], whole / whole.norm())


@torch.no_grad()
def test_items_of_one_modality():
    task = pretrain_task().eval()
    batch = item_batch(task)
    vectors, has = task.embed(batch.only("text"))
    assert has.tolist() == batch.has_text.tolist()
    torch.testing.assert_close(vectors[0], task.text_features(batch)[0])
    vectors, has = task.embed(batch.only("image"))
    assert has.tolist() == batch.has_image.tolist()
    torch.testing.assert_close(vectors[0], task.image_features(batch)[0])


@torch.no_grad()
def test_several_pictures_and_texts_of_an_item():
    """Features of an item: the weighted sum of the unit vectors of its pictures."""
    task = pretrain_task().eval()
    single = item_batch(task)
    assert single.image is not None and single.input_ids is not None
    several = replace(
        single,
        image=single.image[[0, 2, 4, 1]],
        image_item=torch.tensor([0, 0, 4, 2]),
        image_weight=torch.tensor([0.75, 0.25, 1.0, 1.0]),
        input_ids=single.input_ids[[1, 0, 4]],
        text_item=torch.tensor([1, 0, 0]),
        text_weight=torch.tensor([1.0, 0.5, 0.5]),
        has_text=torch.tensor([True, True, False, False, False]),
    )
    image, text = (F.normalize(f(single), dim=1) for f in (task.image_features, task.text_features))
    torch.testing.assert_close(task.image_features(several)[0], F.normalize(0.75 * image[0] + 0.25 * image[2], dim=0))
    torch.testing.assert_close(task.image_features(several)[[4, 2]], image[[4, 1]])
    torch.testing.assert_close(task.text_features(several)[0], F.normalize(text[0] + text[4], dim=0))
    halves = [task.image_features(several.part(0, 2)), task.image_features(several.part(2, 5))]
    torch.testing.assert_close(torch.cat(halves), task.image_features(several))


@torch.no_grad()
def test_kept_features_of_frozen_towers_give_the_same():
    frozen = ENCODERS["towers"] | {part: ENCODERS["towers"][part] | {"mode": "frozen"} for part in ("image", "text")}
    task = pretrain_task(frozen, projection={"dim": 8, "hidden": [12]}).train()
    batch = item_batch(task)
    task.encoder.eval()
    kept = replace(
        batch,
        image=None,
        input_ids=None,
        image_features=task.encoder.encode_image(batch.image),
        text_features=task.encoder.encode_text(batch.input_ids),
    )
    torch.testing.assert_close(task.embed(kept)[0], task.embed(batch)[0])


OBJECTIVES = {
    "clip": {},
    "siglip": {},
    "behavior": {"hard_negatives": True},
    "query": {},
    "group": {"column": "colour"},
    "distillation": {"path": "x", "temperature": 0.2},
}


def expected_terms(task: PretrainTask, batch: PairBatch) -> dict[str, Tensor]:
    """Each loss on the vectors it is meant for."""
    image, text = task.image_features(batch.items), task.text_features(batch.items)
    item, has = task.embed(batch.items)
    anchor, clicked, shown, mate = batch.anchor, *(batch.partners[name] for name in ("clicked", "shown", "group"))
    both = (batch.items.has_image & batch.items.has_text)[anchor]
    keys, scale, ten = batch.keys[anchor], torch.tensor(1 / 0.07), torch.tensor(10.0)
    query = F.normalize(task.encode(None, batch.query_ids).query.float(), dim=1)
    if task.config.item_vector == "concat":
        query = F.normalize(torch.cat([query, query], 1), dim=1)
    asked = torch.cat([keys, batch.query[:, None]], 1)
    rows = torch.cat([anchor, mate.item])
    return {
        "clip": clip_loss(image[anchor], text[anchor], scale, keys, both),
        "siglip": siglip_loss(image[anchor], text[anchor], ten, torch.tensor(-10.0), keys, both),
        "behavior": pair_loss(
            item[anchor],
            item[clicked.item],
            scale,
            anchor_keys=keys,
            positive_keys=batch.keys[clicked.item],
            valid=clicked.has_partner & has[anchor] & has[clicked.item],
            log_q=clicked.log_q,
            negatives=item[shown.item],
            has_negative=shown.has_partner & has[shown.item],
        ),
        "query": pair_loss(
            query,
            item[anchor],
            scale,
            anchor_keys=asked,
            positive_keys=asked,
            valid=batch.has_query & has[anchor],
        ),
        "group": multi_positive_loss(
            item[rows],
            scale,
            batch.groups["colour"][rows],
            batch.keys[rows],
            torch.cat([torch.ones(4, dtype=torch.bool), mate.has_partner]) & has[rows],
        ),
        "distillation": similarity_distillation_loss(
            item[anchor],
            batch.teacher[anchor],
            torch.tensor(5.0),
            5.0,
            keys,
            has[anchor] & batch.has_teacher[anchor],
        ),
    }


@pytest.mark.parametrize("item_vector", ["mean", "concat"])
def test_terms_are_the_losses_named_and_weighted(item_vector):
    objectives = {name: {**values, "weight": w} for w, (name, values) in enumerate(OBJECTIVES.items(), start=1)}
    task = pretrain_task(objectives=objectives, item_vector=item_vector).eval()
    batch = pair_batch(task)
    terms, expected = task(batch), expected_terms(task, batch)
    assert list(terms) == list(OBJECTIVES)
    for weight, name in enumerate(OBJECTIVES, start=1):
        assert expected[name] > 0.01
        torch.testing.assert_close(terms[name], weight * expected[name], msg=name)


def test_every_objective_reaches_the_encoder_and_its_own_temperature():
    for name, values in OBJECTIVES.items():
        task = pretrain_task(objectives={name: values}).train()
        task(pair_batch(task))[name].backward()
        assert task.objectives[name].logit_scale.grad.abs() > 0
        gradient = task.encoder.model.token_embedding.weight.grad
        assert gradient is not None and gradient.abs().sum() > 0


def test_temperatures_start_where_the_papers_do_and_stay_within_their_bounds():
    task = pretrain_task(objectives=OBJECTIVES)
    starts = {name: objective.logit_scale.exp().item() for name, objective in task.objectives.items()}
    assert starts == pytest.approx(dict.fromkeys(OBJECTIVES, 1 / 0.07) | {"siglip": 10, "distillation": 5}, rel=1e-5)
    assert task.objectives["siglip"].logit_bias.item() == -10
    for given, kept in ((-3.0, 1.0), (9.0, 100.0), (2.0, 7.389056)):
        for objective in task.objectives.values():
            objective.logit_scale.data.fill_(given)
        task.after_step()
        assert all(o.logit_scale.exp().item() == pytest.approx(kept) for o in task.objectives.values())


def test_no_objective_or_an_unknown_one_is_refused():
    with pytest.raises(ValueError, match="give at least one of clip, siglip"):
        pretrain_task(objectives={})
    with pytest.raises(ValueError, match="did you mean 'behavior'"):
        ObjectivesConfig.parse({"behaviour": {}})
    assert list(ObjectivesConfig(distillation=DistillationConfig(path="x")).given) == ["distillation"]


def test_matryoshka_is_the_mean_over_the_first_dimensions():
    values = {"objectives": {"clip": {}, "behavior": {}}, "item_vector": "concat"}
    task = pretrain_task(**values, matryoshka=[4, 2]).eval()
    batch = pair_batch(task)
    terms = task(batch)
    with torch.no_grad():
        features = task.encode(batch.items)
        total = dict.fromkeys(terms, 0.0)
        plain = pretrain_task(**values).eval()
        for size in (16, 4, 2):
            cut = replace(features, image=features.image[:, :size], text=features.text[:, :size])
            for name, term in plain.terms(cut, batch).items():
                total[name] += term.item() / 3
        for name, term in terms.items():
            assert term.item() == pytest.approx(total[name], rel=1e-5)
        vectors, _ = task.embed(batch.items, 4)
        half = F.normalize(features.image[0, :4], dim=0)
        torch.testing.assert_close(vectors[0, :4], half / math.sqrt(2))
        assert vectors.shape == (8, 8)
    with pytest.raises(ValueError, match=r"task\.matryoshka: 16 is not less than the 16 dimensions"):
        pretrain_task(matryoshka=[16])


def test_parts_cover_every_trained_parameter_once():
    task = pretrain_task(objectives=OBJECTIVES, projection={"dim": 8}, queue={"momentum": 0.5})
    task.start_training(num_keys=1, num_items=8)
    parts = [p for part in task.parameter_parts().values() for p in part]
    assert {id(p) for p in parts} >= {id(p) for p in task.parameters() if p.requires_grad}
    assert len(parts) == len({id(p) for p in parts})


@pytest.mark.parametrize("item_vector", ["mean", "concat"])
@pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS.keys())
def test_a_saved_pretraining_task_loads_equal(encoder, item_vector, tmp_path):
    values = {"item_vector": item_vector, "objectives": {"siglip": {}}, "projection": {"dim": 6, "hidden": [7]}}
    task = pretrain_task(encoder, **values, queue={"size": 16}).eval()
    task.start_training(num_keys=1, num_items=8)
    with torch.no_grad():
        task.objectives["siglip"].logit_scale += 0.5
    task.save(tmp_path / "run")
    torch.manual_seed(99)
    again = PretrainTask.load(tmp_path / "run")
    assert not again.training and again.config == task.config
    batch = pair_batch(task)
    torch.testing.assert_close(
        again.encoder.tokenize(["a red circle", ""]), task.encoder.tokenize(["a red circle", ""])
    )
    with torch.no_grad():
        assert torch.equal(again.embed(batch.items)[0], task.embed(batch.items)[0])
        assert torch.equal(again(batch)["siglip"], task(batch)["siglip"])
    assert not list((tmp_path / "run").rglob("*.bin")) and not list((tmp_path / "run").rglob("*.pt"))


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not the folder of a finished run"):
        PretrainTask.load(tmp_path)
    task = pretrain_task()
    task.save(tmp_path)
    with pytest.raises(ValueError, match="a pretrain run; this needs a run of finetune"):
        RankingTask.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged, or changed .*run the recipe again"):
        PretrainTask.load(tmp_path)


def test_towers_without_a_shared_space_are_not_compared():
    task = pretrain_task(ENCODERS["towers"])
    for call in (lambda: task(pair_batch(task)), lambda: task.embed(item_batch(task))):
        with pytest.raises(ValueError, match=r"set task\.projection"):
            call()
    side_by_side = pretrain_task(ENCODERS["towers"], item_vector="concat")
    with pytest.raises(ValueError, match=r"task\.objectives\.clip: the towers share no space"):
        side_by_side(pair_batch(side_by_side))


def test_towers_without_a_shared_space_side_by_side():
    """Behaviour needs no space shared by pictures and texts; a missing one leaves zeros, the sizes being others."""
    towers = copy.deepcopy(ENCODERS["towers"])
    towers["text"]["architecture"]["hidden_size"] = 8
    task = pretrain_task(towers, item_vector="concat", objectives={"behavior": {}}, queue={"size": 8}).train()
    task.start_training(num_keys=2, num_items=8)
    batch = pair_batch(task)
    vectors, has = task.embed(batch.items)
    assert vectors.shape == (8, task.embedding_dim) == (8, 16 + 8) and has.tolist() == [i != 3 for i in range(8)]
    image, text = task.image_features(batch.items), task.text_features(batch.items)
    torch.testing.assert_close(vectors[0], torch.cat([image[0], text[0]]) / math.sqrt(2))
    torch.testing.assert_close(vectors[1], torch.cat([torch.zeros(16), text[1]]))
    torch.testing.assert_close(vectors[2], torch.cat([image[2], torch.zeros(8)]))
    texts, _ = task.embed(batch.items.only("text"))
    torch.testing.assert_close(texts[0], torch.cat([torch.zeros(16), text[0]]))
    task(batch)["behavior"].backward()
    task.after_step()
    assert task.image_features(batch.items).shape == (8, 16) and task.queue.text.shape == (8, 8)


def test_a_residual_projection_starts_as_none():
    plain = pretrain_task(ENCODERS["towers"], item_vector="concat", objectives={"behavior": {}}).eval()
    projection = {"residual": True, "hidden": [5], "dropout": 0.5}
    task = pretrain_task(
        ENCODERS["towers"], item_vector="concat", objectives={"behavior": {}}, projection=projection
    ).eval()
    batch = pair_batch(task)
    torch.testing.assert_close(task.embed(batch.items)[0], plain.embed(batch.items)[0])
    assert task.dims == plain.dims and not task.shares_space
    task(batch)["behavior"].backward()
    last = task.image_projection.change[-1]
    assert last.weight.grad.abs().sum() > 0
    with torch.no_grad():
        last.weight.add_(0.1)
    features = F.normalize(task.encoder.encode_image(batch.items.image), dim=1)
    expected = F.normalize(features + task.image_projection.change(features * 4), dim=1)  # the root of 16
    torch.testing.assert_close(task.image_features(batch.items), expected)


def test_pictures_against_texts_need_both():
    task = pretrain_task().eval()
    batch = pair_batch(task)
    with pytest.raises(ValueError, match="clip and siglip need pictures and texts"):
        task(replace(batch, items=batch.items.only("text")))
