"""Small encoders with several layers, what they give and how they learn."""

from __future__ import annotations

from typing import Any

import torch

from mmctr.encoders.base import EncoderBase
from tests.encoders.test_encoders import ENCODERS, build, pixels

VIT = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 3, "head_width": 16}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
RESNET = {"image_size": 32, "layers": [1, 2, 1, 1], "width": 8, "head_width": 8}
DEEP = {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT}
CLIP = ENCODERS["hf"]["architecture"]
SIGLIP = {"model_type": "siglip", "vision_config": CLIP["vision_config"], "text_config": CLIP["text_config"]}


def open_clip(**values: Any) -> EncoderBase:
    return build("openclip", **{"architecture": DEEP, **values})


def features_of(encoder: EncoderBase) -> list[torch.Tensor]:
    ids = encoder.tokenize(["a red circle", "", "a blue star"]).long()
    return [encoder.encode_image(pixels(3, encoder.image_size)), encoder.encode_text(ids)]


def gradients_of(encoder: EncoderBase, seed: int = 0) -> dict[str, torch.Tensor]:
    """Of a weighted sum of all features, so that no direction is lost."""
    torch.manual_seed(seed)
    features = features_of(encoder)
    generator = torch.Generator().manual_seed(1)
    torch.stack(
        [(f * torch.randn(f.shape, generator=generator)).sum() for f in features if f.requires_grad]
    ).sum().backward()
    found = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
    encoder.zero_grad()
    return found


def open_adapters(encoder: EncoderBase) -> EncoderBase:
    """As if trained: B is not zero any more."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in encoder.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return encoder
