"""Models of open_clip as encoders: built-in names, pretrained tags, `hf-hub:` names, or a fresh architecture."""

from __future__ import annotations

import difflib
import json
import logging
import tempfile
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from mmctr.encoders.base import EncoderBase, EncoderOptions, TowerMode
from mmctr.encoders.sources import check_open_clip, check_preprocessing, check_tokenizer, config_of_folder
from mmctr.files import read_json, write_json

CONFIG_NAME = "open_clip_config.json"
TEXT_MODEL = "text"
"""folder of the transformers config of the text tower, inside the folder of an encoder"""


class OpenClipEncoderConfig(EncoderOptions):
    """A model of open_clip: pretrained weights by name, or a fresh architecture."""

    name: Literal["openclip"] = "openclip"
    model: str | None = None
    """a name of open_clip ("ViT-B-32"), "hf-hub:org/name", or "local-dir:path"; None when `architecture` is given"""
    pretrained: str | None = None
    """a tag of open_clip or a file of weights, for built-in names; models of a hub or folder include the weights"""
    architecture: dict[str, Any] | str | None = None
    """a model config of open_clip (embed_dim, vision_cfg, text_cfg), or a JSON file with one, for fresh weights"""
    image: TowerMode = "full"
    """how the image tower trains: `full`, `lora` (adapters alone) or `frozen`"""
    text: TowerMode = "full"
    """how the text tower trains: `full`, `lora` (adapters alone) or `frozen`"""

    @property
    def modes(self) -> dict[str, TowerMode]:
        """The training mode of each tower, by the names "image" and "text"."""
        return {"image": self.image, "text": self.text}

    def build(self, folder: Path | None = None) -> OpenClipEncoder:
        """The encoder; given a folder that `save` wrote, the same architecture with fresh weights."""
        return OpenClipEncoder(self, folder)


class OpenClipEncoder(EncoderBase):
    """A model of open_clip.

    Args:
        config: the model, and how the towers train.
        folder: a folder that `save` wrote, for the same architecture with fresh weights.

    Raises:
        ValueError: not exactly one of `model` and `architecture` is given, or open_clip cannot build the model.
    """

    def __init__(self, config: OpenClipEncoderConfig, folder: Path | None = None):
        if folder is not None:
            model, self._tokenizer, self._architecture = _from_folder(folder)
        elif config.architecture is not None:
            if config.model is not None:
                raise ValueError("encoder: give either `model` or `architecture`, not both")
            model, self._tokenizer, self._architecture = _from_architecture(config.architecture)
        elif config.model is not None:
            model, self._tokenizer, self._architecture = _from_name(config.model, config.pretrained)
        else:
            raise ValueError("encoder: give `model` (an open_clip name) or `architecture` (a small model's config)")
        preprocess = _open_clip().get_model_preprocess_cfg(model)
        super().__init__(tuple(preprocess["mean"]), tuple(preprocess["std"]), config)
        self.model = model
        size = preprocess["size"]
        self.image_size = size if isinstance(size, int) else size[0]
        self.image_dim = self.text_dim = int(self._architecture["embed_dim"])
        # the objectives train temperature and bias; those of the model would be parameters without a gradient
        if folder is None and (config.pretrained or (config.model or "").startswith(("hf-hub:", "local-dir:"))):
            self.logit_scale = float(model.logit_scale)
            self.logit_bias = None if getattr(model, "logit_bias", None) is None else float(model.logit_bias)
        model.logit_scale.requires_grad_(False)
        if getattr(model, "logit_bias", None) is not None:
            model.logit_bias.requires_grad_(False)
        self.tokenizer_key = f"openclip {json.dumps(self._architecture.get('text_cfg'), sort_keys=True)}"
        self.set_up(folder)

    def tower(self, name: str) -> list[nn.Module]:
        """The modules of the tower "image" or "text"."""
        if name == "image":
            return [self.model.visual]
        if hasattr(self.model, "text"):
            return [self.model.text]
        modules = [self.model.transformer, self.model.token_embedding, self.model.ln_final]
        projection = self.model.text_projection
        return [*modules, projection] if isinstance(projection, nn.Module) else modules

    def tower_parameters(self, name: str) -> list[nn.Parameter]:
        """All parameters of the tower "image" or "text", parameters outside the modules of the tower included."""
        parameters = super().tower_parameters(name)
        if name == "text" and not hasattr(self.model, "text"):
            outside = (self.model.positional_embedding, self.model.text_projection)
            parameters += [p for p in outside if isinstance(p, nn.Parameter)]
        return parameters

    def encode_image(self, image: Tensor) -> Tensor:
        """Features (U, image_dim) of pictures (U, 3, H, W) uint8."""
        with self.gradient("image"):
            return self.model.encode_image(self.transform(self.training)(image))

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """Features (U, text_dim) of tokens (U, T) int."""
        with self.gradient("text"):
            return self.model.encode_text(input_ids)

    def tokenize(self, texts: list[str]) -> Tensor:
        """Tokens (n, T) int of n texts."""
        return self._tokenizer(texts)

    def save(self, folder: Path) -> None:
        """Write the config of model and preprocessing, the adapters and the tokenizer, without weights."""
        folder.mkdir(parents=True, exist_ok=True)
        preprocess = _open_clip().get_model_preprocess_cfg(self.model)
        write_json(folder / CONFIG_NAME, {"model_cfg": self._architecture, "preprocess_cfg": preprocess})
        self.save_adapters(folder)
        hf = getattr(self._tokenizer, "tokenizer", None)
        if hf is not None and hasattr(hf, "save_pretrained"):
            hf.save_pretrained(folder)
        if self._architecture["text_cfg"].get("hf_model_name"):
            self.model.text.config.save_pretrained(folder / TEXT_MODEL)


def _open_clip() -> Any:
    """The module open_clip, imported when a model is made: rankers without an encoder save a second and 250 MB."""
    import open_clip

    return open_clip


def _from_folder(folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    """Model with fresh weights, tokenizer and model config, from a folder that `OpenClipEncoder.save` wrote.

    The folder may be a stranger's: nothing in it is executed, and neither the hub nor files outside it are read.
    """
    path = folder / CONFIG_NAME
    config = read_json(path)
    architecture = config.get("model_cfg") if isinstance(config, dict) else None
    check_open_clip(architecture, str(path), own=False)
    assert architecture is not None
    text, preprocess = architecture["text_cfg"], config.get("preprocess_cfg", {})
    check_preprocessing(preprocess, str(path))
    if text.get("hf_tokenizer_name"):
        check_tokenizer(folder)
        text = text | {"hf_tokenizer_name": str(folder)}
    if text.get("hf_model_name"):
        config_of_folder(folder / TEXT_MODEL)
        text = text | {"hf_model_name": str(folder / TEXT_MODEL)}
    return *_build(architecture | {"text_cfg": text}, preprocess, str(path)), architecture


def _from_architecture(architecture: dict[str, Any] | str) -> tuple[Any, Any, dict[str, Any]]:
    """Model with fresh weights, tokenizer and model config, from a model config or a JSON file with one."""
    source = "encoder.architecture"
    if isinstance(architecture, str):
        source = f"encoder.architecture: {architecture}"
        try:
            architecture = read_json(Path(architecture))
        except ValueError as error:
            raise ValueError(f"encoder.architecture: {error}") from None
    check_open_clip(architecture, source, own=True)
    assert isinstance(architecture, dict)
    return *_build(architecture, {}, source), architecture


def _build(architecture: dict[str, Any], preprocess: dict[str, Any], source: str) -> tuple[Any, Any]:
    """Model with fresh weights, and tokenizer.

    Args:
        architecture: the checked model config.
        preprocess: mean, standard deviation and size of the pictures; empty: those of open_clip.
        source: what holds the config, for messages.
    """
    open_clip, text = _open_clip(), architecture["text_cfg"]
    # the weights come from the run, so the warning of open_clip that the folder has no weights is misleading
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = {"model_cfg": architecture, "preprocess_cfg": preprocess}
            (Path(folder) / CONFIG_NAME).write_text(json.dumps(config), encoding="utf-8")
            name = f"local-dir:{folder}"
            model = open_clip.create_model(name, load_weights=False, pretrained_text=False, pretrained_image=False)
            if not text.get("hf_tokenizer_name"):
                return model, open_clip.get_tokenizer(name)
        # get_tokenizer looks for the tokenizer beside the config, whatever the config names
        length, mode = text.get("context_length", 77), text.get("tokenizer_mode")
        options = (text.get("tokenizer_kwargs") or {}) | {"trust_remote_code": False}
        return model, open_clip.tokenizer.HFTokenizer(text["hf_tokenizer_name"], length, tokenizer_mode=mode, **options)
    except (TypeError, AssertionError, KeyError, AttributeError, ValueError, RuntimeError, OSError) as error:
        raise ValueError(f"{source}: open_clip cannot build it: {error}") from None
    finally:
        logging.disable(disabled)


def _from_name(name: str, pretrained: str | None) -> tuple[Any, Any, dict[str, Any]]:
    """Model, tokenizer and model config of a name of open_clip, a hub or a folder."""
    open_clip = _open_clip()
    try:
        architecture = open_clip.get_model_config(name)
        if architecture is None:
            known = {model.lower(): model for model in open_clip.list_models()}
            close = [known[match] for match in difflib.get_close_matches(name.lower(), known, n=3)]
            hint = f"did you mean {' or '.join(close)}?" if close else "open_clip.list_models() names them"
            raise ValueError(f"encoder.model: open_clip has no model {name!r}; {hint}")
        check_open_clip(architecture, f"encoder.model {name!r}", own=True)
        load = pretrained is not None or ":" in name
        model = open_clip.create_model(name, pretrained=pretrained, load_weights=load)
        return model, open_clip.get_tokenizer(name), architecture
    except ValueError:
        raise
    except Exception as error:  # hubs raise many kinds
        raise ValueError(
            f"encoder.model {name!r}, pretrained {pretrained!r}: cannot load it: {error}. Weights come from a "
            f"hub: check the network, or use `architecture` for a small model from scratch"
        ) from None
