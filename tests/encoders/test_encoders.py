from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from mmctr.encoders import EncoderConfig
from mmctr.encoders.base import EncoderBase
from mmctr.encoders.sources import model_source
from mmctr.tasks import PretrainTaskConfig
from tests.helpers.tiny import ARCHITECTURE

_VISION = {"image_size": 32, "patch_size": 16, "hidden_size": 16, "intermediate_size": 16}
_SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2}
ENCODERS = {
    "openclip": {"name": "openclip", "architecture": ARCHITECTURE},
    "hf": {
        "name": "hf",
        "architecture": {
            "model_type": "clip",
            "projection_dim": 8,
            "vision_config": _VISION | _SMALL,
            "text_config": _SMALL
            | {
                "vocab_size": 49408,
                "hidden_size": 16,
                "intermediate_size": 16,
                "max_position_embeddings": 12,
                "eos_token_id": 49407,
                "bos_token_id": 49406,
                "pad_token_id": 0,
            },
        },
    },
    "towers": {
        "name": "towers",
        "image": {"name": "hf", "architecture": {"model_type": "vit"} | _VISION | _SMALL},
        "text": {
            "name": "hf",
            "architecture": {"model_type": "bert", "vocab_size": 49408, "hidden_size": 16, "intermediate_size": 16}
            | _SMALL
            | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
            "context_length": 12,
        },
    },
}


def build(name: str, **values) -> EncoderBase:
    torch.manual_seed(0)
    return TypeAdapter(EncoderConfig).validate_python(ENCODERS[name] | values).build()


def with_modes(name: str, image: str = "full", text: str = "full") -> dict[str, Any]:
    """The values of `build` for towers of these modes."""
    if name != "towers":
        return {"image": image, "text": text}
    return {part: ENCODERS[name][part] | {"mode": mode} for part, mode in (("image", image), ("text", text))}


def pixels(n=3, size=32) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_padding_does_not_reach_the_features_of_a_text():
    """The features of a text are those it has beside longer ones; towers' mean ignores padding."""
    for name in ENCODERS:
        encoder = build(name).eval()
        with torch.no_grad():
            ids = encoder.tokenize(["red", "a large red striped circle"]).long()
            torch.testing.assert_close(encoder.encode_text(ids)[:1], encoder.encode_text(ids[:1]), rtol=1e-4, atol=1e-5)
    encoder = build("towers").eval()
    with torch.no_grad():
        ids = encoder.tokenize(["red"]).long()
        hidden = encoder.text_backbone(input_ids=ids[:, :3]).last_hidden_state  # start, red, end
        torch.testing.assert_close(encoder.encode_text(ids), hidden.mean(1), rtol=1e-4, atol=1e-5)


def test_pixels_are_scaled_normalised_and_resized():
    encoder = build("openclip")
    transform = encoder.transform(train=False)
    grey = torch.full((1, 3, 32, 32), 51, dtype=torch.uint8)  # 0.2
    expected = ((0.2 - encoder.image_mean) / encoder.image_std).expand(1, 3, 32, 32)
    torch.testing.assert_close(transform(grey), expected)
    torch.testing.assert_close(
        transform(torch.full((1, 3, 64, 64), 51, dtype=torch.uint8)), expected, rtol=1e-4, atol=1e-4
    )


def test_pictures_are_augmented_in_training_alone():
    encoder = build("openclip", augment={"crop": 0.5, "flip": 0.5, "brightness": 0.3})
    assert torch.equal(encoder.transform(False)(pixels()), encoder.transform(False)(pixels()))
    assert not torch.equal(encoder.transform(True)(pixels()), encoder.transform(True)(pixels()))


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("name", ENCODERS)
def test_a_frozen_tower_gets_no_gradient_and_stays_in_evaluation(name, tower):
    encoder = build(name, **with_modes(name, **{tower: "frozen"}))
    encoder.train()
    assert all(not module.training for part in encoder.tower(tower) for module in part.modules())
    other = "text" if tower == "image" else "image"
    assert all(module.training for part in encoder.tower(other) for module in part.modules())
    image, text = encoder.encode_image(pixels()), encoder.encode_text(encoder.tokenize(["a", "b", "c"]).long())
    (image.square().sum() + text.square().sum()).backward()
    assert all(p.grad is None for part in encoder.tower(tower) for p in part.parameters())
    assert any(
        p.grad is not None and p.grad.abs().sum() > 0 for part in encoder.tower(other) for p in part.parameters()
    )


def test_mistakes_are_explained():
    cases = {
        "give `model`": {"name": "openclip"},
        "not both": {"name": "openclip", "model": "ViT-B-32", "architecture": ARCHITECTURE},
        "no model 'vit-b-33'; did you mean ViT-B-32 or": {"name": "openclip", "model": "vit-b-33"},
        "no model 'something'; open_clip.list_models": {"name": "openclip", "model": "something"},
        "'text_cfg' is missing": {
            "name": "openclip",
            "architecture": {"embed_dim": 8, "vision_cfg": ARCHITECTURE["vision_cfg"]},
        },
        "encoder.architecture: /nowhere.json: no such file": {"name": "openclip", "architecture": "/nowhere.json"},
        "give either `model`": {"name": "hf"},
        "has no image and text features": {"name": "hf", "architecture": ENCODERS["towers"]["text"]["architecture"]},
        "cannot load it": {"name": "hf", "architecture": {"model_type": "no-such-type"}},
        "is not installed": {"name": "hf", "model": "package:no_such_package/model"},
    }
    for message, values in cases.items():
        config = PretrainTaskConfig.parse({"encoder": values}).encoder
        with pytest.raises(ValueError, match=message):
            config.build()
    with pytest.raises(ValueError, match="not a folder of that package"):
        model_source("package:mmctr/no/such/folder")
    assert model_source("package:mmctr/data").endswith("mmctr/data") and model_source("org/name") == "org/name"
    assert logging.root.manager.disable == 0  # building left logging as it was
