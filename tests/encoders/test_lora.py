"""Towers with low-rank adapters: what they compute, what trains, how they are saved, merged and refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmctr.embedders.item_embedder import ContentEncoder, ItemEmbedderConfig
from mmctr.rankers import DINConfig
from mmctr.tasks import PretrainTask, PretrainTaskConfig, RankingTask, RankingTaskConfig
from mmctr.training.optimizers import OptimizerConfig, make_optimizer
from tests.encoders.test_encoders import ENCODERS, build, with_modes
from tests.helpers.tiny import _server
from tests.helpers.towers import DEEP, RESNET, SIGLIP, features_of, gradients_of, open_adapters, open_clip
from tests.tasks.test_pretrain import item_batch
from tests.tasks.test_ranking import world  # noqa: F401

NAMES = {  # names of what has an adapter
    "openclip": {"attn", "c_fc", "c_proj"},
    "hf": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    "towers": {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "query", "key", "value", "dense"},
}


@pytest.mark.lowest
@pytest.mark.parametrize("name", ENCODERS)
def test_adapters_start_as_the_tower_without_them(name):
    base, adapted = build(name), build(name, **with_modes(name, "lora", "lora"))
    assert {key.rsplit(".", 1)[-1] for keys in adapted.adapters.values() for key in keys} == NAMES[name]
    base.requires_grad_(False)  # torch multiplies with weights that train by another kernel, which rounds otherwise
    for train in (True, False):  # evaluation takes the fast path of torch's attention
        with torch.no_grad():
            for a, b in zip(features_of(base.train(train)), features_of(adapted.train(train)), strict=True):
                assert torch.equal(a, b)
        for a, b in zip(features_of(base), features_of(adapted), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ENCODERS)
def test_adapters_are_low_rank_changes_of_the_weights(name):
    """Features and gradients of the tower whose weights are W + alpha / r B A; merging gives these weights."""
    encoder = open_adapters(build(name, **with_modes(name, "lora", "lora"), lora={"rank": 3, "alpha": 5.0}))
    plain, state = build(name), encoder.state_dict()
    weights = {key.replace("base_layer.", ""): value for key, value in state.items() if "lora_" not in key}
    pairs = {}
    for key in state:
        if ".lora_A." in key:
            a, b = state[key], state[key.replace("lora_A", "lora_B")]
            path = key.split(".lora_A.")[0].replace("base_layer.", "")
            pairs[key] = f"{path}.weight" if f"{path}.weight" in weights else f"{path}.in_proj_weight"
            weights[pairs[key]] = weights[pairs[key]] + 5 / 3 * b @ a
            assert a.shape[0] == b.shape[1] == 3 and b.abs().sum() > 0
    plain.load_state_dict(weights)
    ours, theirs = gradients_of(encoder), gradients_of(plain)
    assert set(ours) == {key for key in state if "lora_" in key}  # nothing else is trained
    for key, weight in pairs.items():
        a, b, whole = state[key], state[key.replace("lora_A", "lora_B")], theirs[weight]
        torch.testing.assert_close(ours[key], 5 / 3 * b.T @ whole, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(ours[key.replace("lora_A", "lora_B")], 5 / 3 * whole @ a.T, rtol=1e-3, atol=1e-5)

    before = {key: value.clone() for key, value in state.items()}
    with torch.no_grad():
        adapted, expected = features_of(encoder.eval()), features_of(plain.eval())
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    encoder.merge_lora()
    with torch.no_grad():
        merged = features_of(encoder)
    for a, b, c in zip(adapted, expected, merged, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(c, a, rtol=1e-5, atol=1e-5)
    assert encoder.state_dict().keys() == plain.state_dict().keys()
    assert encoder.modes == {"image": "full", "text": "full"}
    trains = {key for key, p in plain.named_parameters() if p.requires_grad}
    assert {key for key, p in encoder.named_parameters() if p.requires_grad} == trains
    encoder.merge_lora()


def test_a_tower_with_adapters_beside_others():
    encoder = open_clip(image="lora", text="full", lora={"targets": ["c_fc"]}).train()
    assert encoder.modes == {"image": "lora", "text": "full"} and encoder.model.visual.training
    trained = {name for name, p in encoder.named_parameters() if p.requires_grad}
    ends = ("lora_A.default.weight", "lora_B.default.weight")
    layers = [f"model.visual.transformer.resblocks.{i}.mlp.c_fc.{end}" for i in range(3) for end in ends]
    assert {name for name in trained if ".visual." in name} == set(layers)
    assert {"model.positional_embedding", "model.text_projection", "model.token_embedding.weight"} <= trained
    assert set(gradients_of(encoder)) == trained
    encoder = open_clip(image="frozen", text="lora").train()
    assert not encoder.model.visual.training and encoder.model.transformer.training
    assert all("lora_" in name for name in gradients_of(encoder))
    assert not any("visual" in name for name in gradients_of(encoder))


def test_dropout_of_adapters_and_of_the_tower():
    encoder = open_adapters(build("hf", **with_modes("hf", "lora", "frozen"), lora={"dropout": 0.5}))
    with torch.no_grad():
        a, b = (features_of(encoder.train())[0] for _ in range(2))
        assert not torch.equal(a, b)
        a, b = (features_of(encoder.eval())[0] for _ in range(2))
        assert torch.equal(a, b)


def test_a_convolution_can_be_adapted():
    architecture = DEEP | {"vision_cfg": RESNET}
    encoder = open_clip(architecture=architecture, image="lora", lora={"targets": ["conv2"]}, channels_last=True)
    assert len(encoder.adapters["image"]) == 6
    open_adapters(encoder)
    with torch.no_grad():
        adapted = features_of(encoder.eval())[0]
        encoder.merge_lora()
        torch.testing.assert_close(features_of(encoder)[0], adapted, rtol=1e-4, atol=1e-5)
        plain = features_of(open_clip(architecture=architecture).eval())[0]
        assert not torch.allclose(adapted, plain, rtol=1e-2)


def test_the_head_of_siglip_is_an_attention_too():
    """It is no layer, but can be named; the projection inside it cannot: it only lends its weights."""
    encoder = build("hf", architecture=SIGLIP, image="lora", lora={"targets": ["head.attention"]})
    assert encoder.adapters == {"image": ["model.vision_model.head.attention"]}
    assert len(gradients_of(encoder)) > 4
    with pytest.raises(ValueError, match=r"'head\.attention\.out_proj' names no module that can be adapted"):
        build("hf", architecture=SIGLIP, image="lora", lora={"targets": ["head.attention.out_proj"]})


def features_in_another_process(run: str, out: str, threads: int) -> None:
    torch.set_num_threads(threads)
    task = PretrainTask.load(run)
    with torch.no_grad():
        batch = item_batch(task)
        torch.save([task.image_features(batch), task.text_features(batch), task.encoder.modes], out)


def adapted_task(name: str) -> PretrainTask:
    torch.manual_seed(0)
    encoder = ENCODERS[name] | with_modes(name, "lora", "lora") | {"lora": {"rank": 2}}
    task = PretrainTask(PretrainTaskConfig.parse({"encoder": encoder, "projection": {"dim": 8}}))
    open_adapters(task.encoder)
    return task.eval()


@pytest.mark.parametrize("name", ENCODERS)
def test_a_saved_task_with_adapters_loads_equal(name, tmp_path):
    task = adapted_task(name)
    task.save(tmp_path / "run")
    torch.manual_seed(99)
    again = PretrainTask.load(tmp_path / "run")
    assert again.encoder.adapters == task.encoder.adapters and again.encoder.modes == task.encoder.modes
    batch = item_batch(task)
    with torch.no_grad():
        assert torch.equal(again.embed(batch)[0], task.embed(batch)[0])
        assert torch.equal(again.embed(batch)[0], task.embed(batch)[0])  # nothing moved by being called
    trained = {key for key, p in task.named_parameters() if p.requires_grad}
    assert {key for key, p in again.named_parameters() if p.requires_grad} == trained

    # merged, it is saved and loaded as a task without adapters, whatever its config says
    again.encoder.merge_lora()
    again.save(tmp_path / "run")
    merged = PretrainTask.load(tmp_path / "run")
    assert merged.encoder.modes == {"image": "full", "text": "full"} and not merged.encoder.adapters
    with torch.no_grad():
        assert torch.equal(merged.embed(batch)[0], again.embed(batch)[0])
        torch.testing.assert_close(merged.embed(batch)[0], task.embed(batch)[0], rtol=1e-5, atol=1e-5)


def test_adapters_load_equal_in_another_process(tmp_path):
    task = adapted_task("openclip")
    task.save(tmp_path / "run")
    arguments = (str(tmp_path / "run"), str(tmp_path / "features"), torch.get_num_threads())
    process = _server.Process(target=features_in_another_process, args=arguments)
    process.start()
    batch = item_batch(task)
    with torch.no_grad():
        expected = [task.image_features(batch), task.text_features(batch)]
    process.join(120)
    assert process.exitcode == 0
    *features, modes = torch.load(tmp_path / "features")
    assert modes == {"image": "lora", "text": "lora"}
    assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True))


def test_adapters_and_layer_decay_inside_a_ranker(world, tmp_path):  # noqa: F811
    dataset, splits, vocabulary, data, content, table = world
    torch.manual_seed(0)
    encoder = {"name": "openclip", "architecture": DEEP, "image": "lora", "text": "full", "layer_decay": 0.5}
    PretrainTask(PretrainTaskConfig.parse({"encoder": encoder})).save(tmp_path / "encoder")
    config = RankingTaskConfig(
        embedder=ItemEmbedderConfig(id_dim=4, content=ContentEncoder(run="x", dim=6, hidden=[5])),
        ranker=DINConfig(attention=[6], mlp=[8]),
    )
    task = RankingTask(config, vocabulary, table, PretrainTask.load(tmp_path / "encoder"), dataset.catalog.item_ids)
    optimizer = make_optimizer(task, OptimizerConfig(lr=0.1))
    lrs = {id(p): group["base_lr"] for group in optimizer.param_groups for p in group["params"]}
    parameters = dict(task.named_parameters())
    prefix = "embedder.encoder.encoder.model."
    adapter = prefix + "visual.transformer.resblocks.{}.mlp.c_fc.lora_A.default.weight"
    found = [lrs[id(parameters[adapter.format(i)])] for i in range(3)]
    assert found == pytest.approx([0.025, 0.05, 0.1])
    assert lrs[id(parameters[prefix + "token_embedding.weight"])] == pytest.approx(0.025)
    assert lrs[id(parameters["embedder.adapter.absent"])] == 0.1

    batch = data.collator(splits.train, content=content, encode_history=True)(np.arange(32))
    task.train()(batch)["log_loss"].backward()
    assert [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None] == []
    optimizer.step()
    assert parameters[adapter.format(0).replace("lora_A", "lora_B")].abs().sum() > 0
    task.eval().save(tmp_path / "ranker")
    again = RankingTask.load(tmp_path / "ranker")
    items = batch.items
    with torch.no_grad():
        vectors = task.embedder.encoder.embed(items)[0]
        assert torch.equal(again.embedder.encoder.embed(items)[0], vectors)


def test_impossible_adapters_are_refused_before_anything_changes(monkeypatch):
    efficientnet = {"name": "efficientnet_lite0", "pretrained": False, "mode": "lora", "image_size": 32}
    image, residual = {"image": "lora"}, {"architecture": DEEP | {"vision_cfg": RESNET}, "image": "lora"}
    cases = [
        (r"image tower hold nothing linear .* can name conv1", "openclip", residual, {}),
        (
            r"'qkv' names no module .*the image tower has conv1, attn, c_fc, c_proj",
            "openclip",
            image,
            {"targets": ["qkv"]},
        ),
        (r"'ln_1' names no module", "openclip", image, {"targets": ["attn", "ln_1"]}),
        (r"'out_proj' names no module", "openclip", image, {"targets": ["out_proj"]}),
        # the projections of its attention pool are linear layers that are never called
        (r"'q_proj' names no module", "openclip", residual, {"targets": ["q_proj"]}),
        (r"dropout: 'attn' of the image tower .* fused", "openclip", image, {"dropout": 0.1}),
        (
            r"none of the targets is in the text tower",
            "towers",
            with_modes("towers", "lora", "lora"),
            {"targets": ["fc1"]},
        ),
        # the pooler of BERT is called, but the features do not depend on it
        (
            r"'pooler\.dense' names no module",
            "towers",
            with_modes("towers", text="lora"),
            {"targets": ["pooler.dense"]},
        ),
        # convolutions that pad by themselves are none of torch's
        (r"hold nothing linear .* can name nothing", "towers", {"image": efficientnet}, {}),
    ]
    for message, name, values, lora in cases:
        if values.get("image") == efficientnet:
            pytest.importorskip("efficientnet_lite_pytorch")
        with pytest.raises(ValueError, match=message):
            build(name, **values, lora=lora)

    # the same encoder: nothing of it has changed
    encoder = open_clip()
    before = {name: p.requires_grad for name, p in encoder.named_parameters()}
    options = open_clip(image="lora").options
    encoder.options = options.model_copy(update={"lora": options.lora.model_copy(update={"targets": ["attn", "qkv"]})})
    with pytest.raises(ValueError, match="'qkv' names no module"):
        encoder.set_up(None)
    assert {name: p.requires_grad for name, p in encoder.named_parameters()} == before
    assert encoder.modes == {"image": "full", "text": "full"} and encoder.training

    monkeypatch.setattr("mmctr.encoders.lora.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'mmctr\[lora\]'"):
        open_clip(image="lora")
