"""How towers train: learning rates by layer, gradient checkpointing, memory layout, compiled towers."""

from __future__ import annotations

import copy
import functools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mmctr.encoders.base import EncoderBase
from mmctr.encoders.layers import find_layers
from mmctr.tasks import PretrainTask, PretrainTaskConfig
from mmctr.tasks.folder import save_weights
from mmctr.training.optimizers import OptimizerConfig, load_optimizer_tensors, make_optimizer, optimizer_tensors
from tests.encoders.test_encoders import ENCODERS, build, pixels, with_modes
from tests.helpers.towers import CLIP, DEEP, RESNET, SIGLIP, features_of, gradients_of, open_adapters, open_clip
from tests.tasks.test_pretrain import pair_batch

# Learning rates by layer --------------------------------------------------------------------------


def bert_folder(folder: Path) -> str:
    from transformers import BertConfig

    text = {k: v for k, v in ENCODERS["towers"]["text"]["architecture"].items() if k != "model_type"}
    BertConfig(**text | {"num_hidden_layers": 2}).save_pretrained(folder)
    return str(folder)


def architectures(folder: Path) -> dict[str, tuple[EncoderBase, dict[str, tuple[str, str, int]]]]:
    """Encoders, and by the beginning of parameter names: the pattern of layers, that of what is below them, and L."""
    text = (r"resblocks\.(\d+)", r"token_emb|positional_emb", 2)
    siglip = (r"layers\.(\d+)", r"embeddings\.", 1)
    custom = DEEP | {"custom_text": True}
    timm = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160}
    bert = {"hf_model_name": bert_folder(folder), "hf_pooler_type": "mean_pooler", "hf_proj_type": "mlp"}
    vit = (r"resblocks\.(\d+)", r"visual\.(class|pos|conv1|ln_pre)", 3)
    return {
        "clip": (open_clip(), {"model.visual.": vit, "model.": text}),
        "custom text, timm": (
            open_clip(architecture=custom | {"vision_cfg": timm}),
            {"model.visual.": (r"blocks\.(\d+)", r"cls_token|(pos|patch)_embed|reg_token", 6), "model.text.": text},
        ),
        "BERT inside": (
            open_clip(architecture=custom | {"text_cfg": bert}),
            {"model.visual.": vit, "model.text.": (r"layer\.(\d+)", r"embeddings\.", 2)},
        ),
        "transformers CLIP": (
            build("hf"),
            {"model.vision_model": (r"layers\.(\d+)", r"embeddings\.|pre_layrnorm", 1), "model.": siglip},
        ),
        "SigLIP": (build("hf", architecture=SIGLIP), {"model.": siglip}),
        "towers": (
            build("towers"),
            {
                "image": (r"layers?\.(\d+)", r"embeddings\.", 1),
                "text": (r"layer\.(\d+)", r"embeddings\.", 1),
            },
        ),
    }


def test_depths_are_those_that_names_say(tmp_path):
    for kind, (encoder, patterns) in architectures(tmp_path).items():
        depths, covered = encoder.depth_of(), set()
        for name, p in encoder.named_parameters():
            if not p.requires_grad:
                continue
            layers, below, total = next(patterns[start] for start in patterns if name.startswith(start))
            number = re.search(layers, name)
            expected = int(number[1]) + 1 if number else 0 if re.search(below, name) else total + 1
            assert depths[name] == (expected, total), (kind, name)
            covered.add(expected)
        assert covered >= {0, 1}, kind


def test_depths_of_convolutional_towers():
    resnet = open_clip(architecture=DEEP | {"vision_cfg": RESNET}, text="frozen")
    first = {"layer1.0": 1, "layer2.0": 2, "layer2.1": 3, "layer3.0": 4, "layer4.0": 5}
    depths = resnet.depth_of()
    assert len(depths) == sum(p.requires_grad for p in resnet.parameters())
    for name, (depth, total) in depths.items():
        part = ".".join(name.split(".")[2:4])
        assert total == 5 and depth == first.get(part, 6 if "attnpool" in name else 0), name
    pytest.importorskip("efficientnet_lite_pytorch")
    image = {"name": "efficientnet_lite0", "pretrained": False, "image_size": 32}
    depths = build("towers", image=image, text=ENCODERS["towers"]["text"] | {"mode": "frozen"}).depth_of()
    for name, (depth, total) in depths.items():
        number = re.search(r"_blocks\.(\d+)\.", name)
        head = name.startswith(("image_backbone._conv_head", "image_backbone._bn1"))
        assert total == 16 and depth == (int(number[1]) + 1 if number else 17 if head else 0), name


def test_learning_rates_fall_with_the_distance_from_the_head():
    encoder = {"name": "openclip", "architecture": DEEP, "layer_decay": 0.5}
    values = {"encoder": encoder, "projection": {"dim": 8}}
    task = PretrainTask(PretrainTaskConfig.parse(values))
    before = copy.deepcopy(task.state_dict())
    config = OptimizerConfig.parse({"lr": 1.0, "weight_decay": 0.1, "groups": {"encoder": {"lr": 0.4}}})
    optimizer = make_optimizer(task, config)
    lrs = {id(p): group["base_lr"] for group in optimizer.param_groups for p in group["params"]}
    expected = {
        "encoder.model.visual.proj": 0.4,
        "encoder.model.visual.ln_post.weight": 0.4,
        "encoder.model.visual.transformer.resblocks.2.ln_1.bias": 0.4,
        "encoder.model.visual.transformer.resblocks.0.attn.in_proj_weight": 0.1,
        "encoder.model.visual.conv1.weight": 0.05,
        "encoder.model.transformer.resblocks.0.mlp.c_fc.weight": 0.2,
        "encoder.model.positional_embedding": 0.1,
        "encoder.model.text_projection": 0.4,
        "image_projection.0.weight": 1.0,
        "objectives.clip.logit_scale": 1.0,
    }
    parameters = dict(task.named_parameters())
    assert {name: lrs[id(parameters[name])] for name in expected} == pytest.approx(expected)
    assert all(group["lr"] == group["base_lr"] for group in optimizer.param_groups)
    assert optimizer.param_groups[0]["lr"] == 0.4  # what a run logs
    assert {id(p) for p in task.parameters() if p.requires_grad} == lrs.keys()
    for group in optimizer.param_groups:
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] == 0.1}
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items()) and task.training

    # the state of the optimiser finds its parameters again in another task, and goes on as if uninterrupted
    def steps(task, optimizer, first, last):
        for step in range(first, last):
            sum(task(pair_batch(task, first=10 * step)).values()).backward()
            optimizer.step()
            optimizer.zero_grad()

    steps(task, optimizer, 0, 2)
    state, tensors = copy.deepcopy(task.state_dict()), optimizer_tensors(optimizer)
    steps(task, optimizer, 2, 4)
    again = PretrainTask(PretrainTaskConfig.parse(values))
    again.load_state_dict(state)
    resumed = make_optimizer(again, config)
    load_optimizer_tensors(resumed, tensors)
    steps(again, resumed, 2, 4)
    assert all(torch.equal(value, task.state_dict()[name]) for name, value in again.state_dict().items())

    # without decay the groups are what they are without the option
    plain = make_optimizer(
        PretrainTask(PretrainTaskConfig.parse(values | {"encoder": encoder | {"layer_decay": 1}})), config
    )
    assert len(plain.param_groups) == 4 < len(optimizer.param_groups)


def test_a_tower_without_layers_is_refused(monkeypatch):
    monkeypatch.setattr("mmctr.encoders.base.find_layers", lambda roots: [])
    open_clip(layer_decay=1.0)
    with pytest.raises(ValueError, match=r"no layers are found in the image tower \(VisionTransformer\)"):
        open_clip(layer_decay=0.5)


def test_layers_are_lists_of_alike_modules():
    def block():
        return nn.ModuleDict({"one": nn.Linear(2, 2)})

    layers = [block(), block(), nn.Sequential(nn.Linear(2, 2))]
    tower = nn.ModuleDict(
        {
            "stem": nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()),
            "stages": nn.ModuleDict({"a": nn.Sequential(layers[0]), "b": nn.ModuleList([layers[1]])}),
            "mixed": nn.Sequential(block(), nn.ReLU()),
            "head": nn.Sequential(),
        }
    )
    tower.head.add_module("mlp", block())
    assert find_layers([tower]) == layers[:2]


# Gradient checkpointing ---------------------------------------------------------------------------

DROPOUT = {
    "openclip": {"architecture": DEEP},
    "hf": {
        "architecture": CLIP
        | {part: CLIP[part] | {"attention_dropout": 0.3} for part in ("vision_config", "text_config")}
    },
    "towers": {
        part: ENCODERS["towers"][part]
        | {
            "architecture": ENCODERS["towers"][part]["architecture"]
            | {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2}
        }
        for part in ("image", "text")
    },
}


@pytest.mark.parametrize("name", ENCODERS)
def test_checkpointing_gives_the_same_gradients(name):
    def made(image: str, text: str, checkpointing: bool) -> EncoderBase:
        values = DROPOUT[name]
        if name == "towers":
            values = {part: values[part] | {"mode": mode} for part, mode in (("image", image), ("text", text))}
        else:
            values = values | {"image": image, "text": text}
        encoder = open_adapters(build(name, **values, gradient_checkpointing=checkpointing))
        for module in encoder.modules():
            if isinstance(module, nn.MultiheadAttention):  # open_clip has no option for it
                module.dropout = 0.3
        return encoder.train()

    for image, text in (("full", "full"), ("lora", "lora"), ("frozen", "lora"), ("full", "frozen")):
        plain, checkpointed = made(image, text, False), made(image, text, True)
        calls: Counter[nn.Module] = Counter()
        for tower, mode in (("image", image), ("text", text)):
            for layer in find_layers(checkpointed.tower(tower)):
                inner = next(module for module in layer.modules() if isinstance(module, nn.LayerNorm))
                inner.register_forward_pre_hook(lambda module, _, calls=calls: calls.update([module]))
                calls[inner] = int(mode == "frozen")  # which runs once
        expected, found = gradients_of(plain), gradients_of(checkpointed)
        assert set(calls.values()) == {2}, (image, text)
        assert found.keys() == expected.keys() and len(found) > 3
        assert all(torch.equal(found[key], expected[key]) for key in found)
        assert not all(torch.equal(found[key], value) for key, value in gradients_of(checkpointed, seed=1).items())


def test_checkpointing_that_does_nothing_or_too_much_is_refused():
    resnet = DEEP | {"vision_cfg": RESNET}
    with pytest.raises(ValueError, match=r"image tower \(ModifiedResNet\) has batch normalisation"):
        open_clip(architecture=resnet, gradient_checkpointing=True)
    text_only = open_clip(architecture=resnet, gradient_checkpointing=True, image="frozen")
    assert text_only.model.transformer.grad_checkpointing
    encoder = open_clip()
    for module in encoder.model.transformer.modules():
        vars(module).pop("grad_checkpointing", None)
    encoder.options = open_clip(gradient_checkpointing=True).options
    with pytest.raises(ValueError, match=r"text tower \(Transformer\) has none"):
        encoder.set_up(None)
    assert not encoder.model.visual.transformer.grad_checkpointing


# Memory layout and compiled towers ----------------------------------------------------------------

CONVOLUTIONS = {
    "ViT": {"architecture": DEEP},
    "ResNet": {"architecture": DEEP | {"vision_cfg": RESNET}},
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_channels_last_changes_the_layout_alone(kind, tmp_path):
    plain, last = (build("openclip", **CONVOLUTIONS[kind], channels_last=on) for on in (False, True))
    assert last.model.visual.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert last.transform(False)(pixels()).is_contiguous(memory_format=torch.channels_last)
    assert plain.transform(False)(pixels()).is_contiguous()
    for train in (True, False):
        with torch.no_grad():
            for a, b in zip(features_of(plain.train(train)), features_of(last.train(train)), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    save_weights(last, tmp_path / "weights")
    weights = load_file(tmp_path / "weights")
    assert all(torch.equal(weights[key], value) for key, value in plain.state_dict().items() if "running" not in key)
    last.load_state_dict(weights)
    assert last.model.visual.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def compiled(monkeypatch, **values: Any) -> EncoderBase:
    """Captured and split as for the real compiler, which takes half a minute to start."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    return open_clip(**values, compile=True)


def test_compiled_towers_are_the_same_towers(monkeypatch, tmp_path):
    torch._dynamo.reset()
    plain, fast = open_clip(image="lora"), compiled(monkeypatch, image="lora", layer_decay=0.5)
    for encoder in (plain, fast):
        open_adapters(encoder)
    torch._dynamo.utils.counters.clear()
    for a, b in zip(features_of(plain), features_of(fast), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2  # both towers went through the compiler
    ours, theirs = gradients_of(fast), gradients_of(plain)
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-5)
    assert list(fast.state_dict()) == list(plain.state_dict())
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert fast.depth_of() == plain.depth_of()  # found without the compiler, which would hide layers
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs

    with torch.no_grad():
        expected = features_of(fast.eval())
        copied = copy.deepcopy(fast)
        fast.save(tmp_path)
        again = type(fast)(fast.options, tmp_path).eval()
        again.load_state_dict(fast.state_dict())
        fast.merge_lora()
        for encoder in (copied, again, fast):
            for a, b in zip(features_of(encoder), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_no_compiler_no_compiled_towers(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler"):
        open_clip(compile=True)


# Choices that contradict each other ---------------------------------------------------------------


def test_contradictions_are_refused():
    frozen = {"image": "frozen", "text": "frozen"}
    cases = {
        "lora is set, but no tower has the mode lora": {"lora": {"rank": 4}},
        "layer_decay is for towers that train": frozen | {"layer_decay": 0.9},
        "gradient_checkpointing is for towers that train": frozen | {"gradient_checkpointing": True},
        "greater than 0": {"layer_decay": 0.0},
        "less than or equal to 1": {"layer_decay": 1.5},
        "did you mean 'targets'": {"image": "lora", "lora": {"target": ["attn"]}},
        "at least 1 item": {"image": "lora", "lora": {"targets": []}},
        "'full', 'lora' or 'frozen'": {"image": "adapters"},
    }
    for message, values in cases.items():
        with pytest.raises(ValueError, match=message):
            PretrainTaskConfig.parse({"encoder": ENCODERS["openclip"] | values})
    towers = ENCODERS["towers"] | with_modes("towers", "frozen", "frozen")
    with pytest.raises(ValueError, match="layer_decay is for towers that train"):
        PretrainTaskConfig.parse({"encoder": towers | {"layer_decay": 0.9}})
    config = PretrainTaskConfig.parse({"encoder": ENCODERS["openclip"] | {"image": "lora", "lora": {"rank": 4}}})
    assert PretrainTaskConfig.parse(config.model_dump(mode="json")) == config
