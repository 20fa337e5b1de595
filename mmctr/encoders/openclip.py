"""Any open_clip model as an encoder: built-in names, pretrained tags, hf-hub: names, or a small model from a config."""

from __future__ import annotations

import difflib
import json
import logging
import tempfile
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from mmctr.encoders.base import EncoderBase, EncoderOptions, TowerMode
from mmctr.files import write_json

CONFIG_NAME = "open_clip_config.json"


class OpenClipEncoderConfig(EncoderOptions):
    """A model of open_clip: pretrained weights by name, or a fresh architecture."""

    name: Literal["openclip"] = "openclip"
    model: str | None = None
    """open_clip's name ("ViT-B-32"), or "hf-hub:org/name", or "local-dir:path"; None when `architecture` is given"""
    pretrained: str | None = None
    """open_clip's tag or a weights file for built-in names; the other kinds bring their own weights"""
    architecture: dict[str, Any] | str | None = None
    """an open_clip model config (embed_dim, vision_cfg, text_cfg), or a JSON file of one: a small model from scratch"""
    image: TowerMode = "full"
    """how the image tower trains: `full`, `lora` (adapters alone) or `frozen`"""
    text: TowerMode = "full"
    """how the text tower trains: `full`, `lora` (adapters alone) or `frozen`"""

    @property
    def modes(self) -> dict[str, TowerMode]:
        return {"image": self.image, "text": self.text}

    def build(self, folder: Path | None = None) -> OpenClipEncoder:
        """From names and weights; or, given the folder `save` wrote, the same architecture with fresh weights."""
        return OpenClipEncoder(self, folder)


class OpenClipEncoder(EncoderBase):
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
        # the task owns temperature and bias; a second pair here would be parameters without a gradient
        if folder is None and (config.pretrained or (config.model or "").startswith(("hf-hub:", "local-dir:"))):
            self.logit_scale = float(model.logit_scale)
            self.logit_bias = None if getattr(model, "logit_bias", None) is None else float(model.logit_bias)
        model.logit_scale.requires_grad_(False)
        if getattr(model, "logit_bias", None) is not None:
            model.logit_bias.requires_grad_(False)
        self.tokenizer_key = f"openclip {json.dumps(self._architecture.get('text_cfg'), sort_keys=True)}"
        self.set_up(folder)

    def tower(self, name: str) -> list[nn.Module]:
        if name == "image":
            return [self.model.visual]
        if hasattr(self.model, "text"):
            return [self.model.text]
        modules = [self.model.transformer, self.model.token_embedding, self.model.ln_final]
        projection = self.model.text_projection
        return [*modules, projection] if isinstance(projection, nn.Module) else modules

    def tower_parameters(self, name: str) -> list[nn.Parameter]:
        parameters = super().tower_parameters(name)
        if name == "text" and not hasattr(self.model, "text"):
            outside = (self.model.positional_embedding, self.model.text_projection)
            parameters += [p for p in outside if isinstance(p, nn.Parameter)]
        return parameters

    def encode_image(self, image: Tensor) -> Tensor:
        with self.gradient("image"):
            return self.model.encode_image(self.transform(self.training)(image))

    def encode_text(self, input_ids: Tensor) -> Tensor:
        with self.gradient("text"):
            return self.model.encode_text(input_ids)

    def tokenize(self, texts: list[str]) -> Tensor:
        return self._tokenizer(texts)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        preprocess = _open_clip().get_model_preprocess_cfg(self.model)
        write_json(folder / CONFIG_NAME, {"model_cfg": self._architecture, "preprocess_cfg": preprocess})
        self.save_adapters(folder)
        hf = getattr(self._tokenizer, "tokenizer", None)
        if hf is not None and hasattr(hf, "save_pretrained"):
            hf.save_pretrained(folder)


def _open_clip() -> Any:
    """Imported when a model is made: a second and 250 MB that rankers without an encoder need not pay."""
    import open_clip

    return open_clip


def _from_folder(folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    # never fetch weights for the towers: they come from the run, so open_clip's warning that there are none is noise
    open_clip, name = _open_clip(), f"local-dir:{folder}"
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        model = open_clip.create_model(name, load_weights=False, pretrained_text=False, pretrained_image=False)
    finally:
        logging.disable(disabled)
    return model, open_clip.get_tokenizer(name), open_clip.get_model_config(name)


def _from_architecture(architecture: dict[str, Any] | str) -> tuple[Any, Any, dict[str, Any]]:
    if isinstance(architecture, str):
        try:
            architecture = json.loads(Path(architecture).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"encoder.architecture: {architecture} is not a readable JSON file: {error}") from None
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - set(architecture)
    if missing:
        raise ValueError(f"encoder.architecture: {sorted(missing)[0]!r} is missing (open_clip's model config format)")
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / CONFIG_NAME, {"model_cfg": architecture, "preprocess_cfg": {}})
        try:
            return _from_folder(Path(folder))
        except (TypeError, AssertionError, KeyError) as error:
            raise ValueError(f"encoder.architecture: open_clip cannot build it: {error}") from None


def _from_name(name: str, pretrained: str | None) -> tuple[Any, Any, dict[str, Any]]:
    open_clip = _open_clip()
    try:
        architecture = open_clip.get_model_config(name)
        if architecture is None:
            known = {model.lower(): model for model in open_clip.list_models()}
            close = [known[match] for match in difflib.get_close_matches(name.lower(), known, n=3)]
            hint = f"did you mean {' or '.join(close)}?" if close else "open_clip.list_models() names them"
            raise ValueError(f"encoder.model: open_clip has no model {name!r}; {hint}")
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
