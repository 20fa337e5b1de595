"""A CLIP or SigLIP model of transformers as an encoder; model loading, tokenizers and pixel statistics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from mmctr.config import Config
from mmctr.encoders.base import EncoderBase, EncoderOptions, TowerMode
from mmctr.encoders.sources import config_of_folder, model_source, tokenizer_of_folder
from mmctr.files import read_json, write_json

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""mean and standard deviation of the colour channels of CLIP, for pixels in [0, 1]"""


class HFModelConfig(Config):
    """A model of transformers: pretrained weights by name, or a fresh architecture."""

    model: str | None = None
    """name on the hub, folder, or `package:NAME/folder` for a model inside an installed Python package"""
    architecture: dict[str, Any] | None = None
    """a transformers config with `model_type`, for a model with fresh weights"""

    def load(self, folder: Path | None) -> Any:
        """The model.

        Args:
            folder: a folder with a transformers config, for the same architecture with fresh weights; None: the model
                or architecture of this config.

        Raises:
            ValueError: not exactly one of `model` and `architecture` is given, or transformers cannot load the model.
        """
        from transformers import AutoConfig, AutoModel  # slow to import, and rankers without an encoder do without

        if folder is not None:
            return AutoModel.from_config(config_of_folder(folder), trust_remote_code=False)
        if (self.model is None) == (self.architecture is None):
            raise ValueError("encoder: give either `model` (a name) or `architecture` (a transformers config)")
        try:
            if self.model is not None:
                return AutoModel.from_pretrained(model_source(self.model), trust_remote_code=False)
            return AutoModel.from_config(AutoConfig.for_model(**(self.architecture or {})))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"encoder {self.model or 'architecture'!r}: transformers cannot load it: {error}"
            ) from None


class Tokenizer:
    """A tokenizer of transformers, or the byte pair encoding that open_clip ships.

    Args:
        source: name of a transformers tokenizer, a folder of the user with one, or the `Path` of a folder that a run
            wrote; None: the byte pair encoding of open_clip.
        context_length: tokens T of a text; longer texts are cut, shorter texts padded.
    """

    def __init__(self, source: str | Path | None, context_length: int):
        self.hf = None
        source = model_source(source) if isinstance(source, str) else source
        self.key = f"{source or 'open_clip bpe'} {context_length}"
        if source is None:
            import open_clip

            self._bpe = open_clip.SimpleTokenizer(context_length=context_length)
            self.pad, self.vocab_size = 0, self._bpe.vocab_size
        else:
            from transformers import AutoTokenizer

            if isinstance(source, Path):
                self.hf = tokenizer_of_folder(source)
            else:
                self.hf = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            self.pad, self.vocab_size = self.hf.pad_token_id or 0, len(self.hf)
            self._length = context_length
        self.context_length = context_length

    def __call__(self, texts: list[str]) -> Tensor:
        """Tokens (n, T) int of n texts."""
        if self.hf is None:
            return self._bpe(texts)
        encoded = self.hf(texts, padding="max_length", truncation=True, max_length=self._length, return_tensors="pt")
        return encoded["input_ids"]


class HFEncoderConfig(HFModelConfig, EncoderOptions):
    """A CLIP or SigLIP model of transformers."""

    name: Literal["hf"] = "hf"
    tokenizer: str | None = None
    """name or folder of a transformers tokenizer; None: the tokenizer of `model`, or the byte pair encoding of
    open_clip for a fresh architecture"""
    image: TowerMode = "full"
    """how the image tower trains: `full`, `lora` (adapters alone) or `frozen`"""
    text: TowerMode = "full"
    """how the text tower trains: `full`, `lora` (adapters alone) or `frozen`"""

    @property
    def modes(self) -> dict[str, TowerMode]:
        """The training mode of each tower, by the names "image" and "text"."""
        return {"image": self.image, "text": self.text}

    def build(self, folder: Path | None = None) -> HFEncoder:
        """The encoder; given a folder that `save` wrote, the same architecture with fresh weights."""
        return HFEncoder(self, folder)


class HFEncoder(EncoderBase):
    """A CLIP or SigLIP model of transformers.

    Args:
        config: the model, and how the towers train.
        folder: a folder that `save` wrote, for the same architecture with fresh weights.

    Raises:
        ValueError: the model cannot be loaded, gives no features of pictures and texts, or cannot train as asked.
    """

    def __init__(self, config: HFEncoderConfig, folder: Path | None = None):
        model = config.load(folder)
        if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
            raise ValueError(
                f"encoder {config.model!r}: {type(model).__name__} has no image and text features; use `towers`"
            )
        mean, std = pixel_statistics(config.model) if folder is None else saved_pixel_statistics(folder)
        super().__init__(mean, std, config)
        self.model = model
        vision, text = model.config.vision_config, model.config.text_config
        self.image_size = vision.image_size
        projection = getattr(model.config, "projection_dim", None)
        self.image_dim = self.text_dim = getattr(text, "projection_size", None) or projection or text.hidden_size
        source = config.tokenizer if config.tokenizer is not None else config.model
        self.tokenizer = Tokenizer(tokenizer_source(source, folder), text.max_position_embeddings)
        self.tokenizer_key = f"hf {config.model} {self.tokenizer.key}"
        if folder is None and config.model is not None:
            self.logit_scale = float(model.logit_scale)
            bias = getattr(model, "logit_bias", None)
            self.logit_bias = None if bias is None else float(bias)
        for name in ("logit_scale", "logit_bias"):  # the objectives of the task train scale and bias
            if getattr(model, name, None) is not None:
                getattr(model, name).requires_grad_(False)
        self.set_up(folder)

    def tower(self, name: str) -> list[nn.Module]:
        """The modules of the tower "image" or "text"."""
        modules = [self.model.vision_model if name == "image" else self.model.text_model]
        projection = getattr(self.model, "visual_projection" if name == "image" else "text_projection", None)
        return modules if projection is None else [*modules, projection]

    def encode_image(self, image: Tensor) -> Tensor:
        """Features (U, image_dim) of pictures (U, 3, H, W) uint8."""
        with self.gradient("image"):
            features = self.model.get_image_features(pixel_values=self.transform(self.training)(image))
        return features if isinstance(features, Tensor) else features.pooler_output

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """Features (U, text_dim) of tokens (U, T) int."""
        # SigLIP was trained without a mask; CLIP's causal mask hides padding from the end-of-text token
        with self.gradient("text"):
            features = self.model.get_text_features(input_ids=input_ids)
        return features if isinstance(features, Tensor) else features.pooler_output

    def tokenize(self, texts: list[str]) -> Tensor:
        """Tokens (n, T) int of n texts."""
        return self.tokenizer(texts)

    def save(self, folder: Path) -> None:
        """Write the config of the model, the pixel statistics, the adapters and the tokenizer, without weights."""
        self.model.config.save_pretrained(folder)
        save_pixel_statistics(self, folder)
        self.save_adapters(folder)
        if self.tokenizer.hf is not None:
            self.tokenizer.hf.save_pretrained(folder)


def pixel_statistics(source: str | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the colour channels a model was trained with, for pixels in [0, 1].

    Args:
        source: name or folder of the model; None for a fresh model.

    Returns:
        The statistics of the model, or those of CLIP where the model is fresh or has none.
    """
    if source is None:
        return CLIP_MEAN, CLIP_STD
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(model_source(source), trust_remote_code=False)
        return tuple(processor.image_mean), tuple(processor.image_std)
    except (OSError, ValueError, json.JSONDecodeError, AttributeError):
        return CLIP_MEAN, CLIP_STD


def saved_pixel_statistics(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the colour channels, as `save_pixel_statistics` wrote them.

    Raises:
        ValueError: `pixels.json` is missing or holds something else.
    """
    path = folder / "pixels.json"
    values = read_json(path)
    statistics = [values.get(name) if isinstance(values, dict) else None for name in ("mean", "std")]
    if not all(
        isinstance(three, list) and len(three) == 3 and all(isinstance(value, float | int) for value in three)
        for three in statistics
    ):
        raise ValueError(f"{path}: must hold `mean` and `std` with a number for each of the three colour channels")
    return tuple(values["mean"]), tuple(values["std"])


def tokenizer_source(name: str | None, folder: Path | None) -> str | Path | None:
    """What to give to `Tokenizer`: the name of the config for a new encoder, and for a saved encoder the folder.

    Args:
        name: name or folder of a tokenizer in the config of the encoder.
        folder: a folder that the encoder was saved to; None for a new encoder.
    """
    if folder is None:
        return name
    return folder if (folder / "tokenizer_config.json").is_file() else None


def save_pixel_statistics(encoder: EncoderBase, folder: Path) -> None:
    """Write `pixels.json`, the mean and the standard deviation of the colour channels, for `saved_pixel_statistics`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / "pixels.json",
        {"mean": encoder.image_mean.flatten().tolist(), "std": encoder.image_std.flatten().tolist()},
    )
