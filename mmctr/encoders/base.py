"""What every encoder shares: the protocol, pixels on the device, how its towers train, and where models are found."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmctr.config import Config
from mmctr.encoders.augment import AugmentConfig, augmented
from mmctr.encoders.layers import Trace, checkpointing, find_layers, trace
from mmctr.encoders.lora import LoraConfig, adaptable, add_adapters, choose, merge_adapters, require_peft
from mmctr.files import read_json, write_json

TowerMode = Literal["full", "lora", "frozen"]
"""`lora`: the weights stay, low-rank adapters are trained"""
ADAPTERS_NAME = "adapters.json"


class Encoder(Protocol):
    """Features of pictures and of texts, not normalised."""

    image_dim: int
    text_dim: int
    shares_space: bool
    """whether features of pictures and texts can be compared with each other as they are"""
    image_size: int
    tokenizer_key: str
    """changes whenever the tokenizer does"""
    logit_scale: float | None
    """temperature the weights were trained with, None for fresh ones"""
    logit_bias: float | None

    def encode_image(self, image: Tensor) -> Tensor:
        """(U, 3, H, W) uint8 -> (U, image_dim)."""
        ...

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """(U, T) int -> (U, text_dim)."""
        ...

    def transform(self, train: bool) -> Callable[[Tensor], Tensor]:
        """Pixels as the tower wants them: (U, 3, H, W) uint8 -> (U, 3, S, S) float, augmented when `train`."""
        ...

    def tokenize(self, texts: list[str]) -> Tensor:
        """(n, T) int; "" gives a row of padding and marks, which a mask keeps from being read."""
        ...

    def save(self, folder: Path) -> None:
        """Write what is needed to build the same architecture and tokenizer again, without weights."""
        ...


class EncoderOptions(Config):
    """How the towers of any encoder train, and how fast."""

    augment: AugmentConfig = AugmentConfig()
    """random changes of training pictures"""
    lora: LoraConfig = LoraConfig()
    """of the towers whose mode is `lora`"""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """the learning rate of layer l of the L of a tower is lr * layer_decay^(L - l); 0 counts as the number of what is
    below the first layer, L as that of heads and projections (ELECTRA, BEiT; 0.65 to 0.9 when fine-tuning)"""
    gradient_checkpointing: bool = False
    """keep what goes from layer to layer alone and compute the rest again in the backward pass: a fraction of the
    memory, a quarter to a third slower"""
    channels_last: bool = False
    """lay out pictures and convolutions as (N, H, W, C) in memory: convolutional towers gain from it, others do not
    lose"""
    compile: bool = False
    """torch.compile the towers, which takes a minute or more at the first steps. On a CPU convolutional towers gain,
    transformers hardly"""

    @property
    def modes(self) -> dict[str, TowerMode]:
        """Of the towers "image" and "text"."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _choices_fit_the_modes(self) -> EncoderOptions:
        modes = set(self.modes.values())
        if self.lora != LoraConfig() and "lora" not in modes:
            raise ValueError("lora is set, but no tower has the mode lora")
        if modes == {"frozen"}:
            for name, is_set in (
                ("layer_decay", self.layer_decay < 1),
                ("gradient_checkpointing", self.gradient_checkpointing),
            ):
                if is_set:
                    raise ValueError(f"{name} is for towers that train, but both are frozen")
        return self


class EncoderBase(nn.Module):
    """Pixels to normalised floats on the device, and towers that are trained, adapted or frozen."""

    image_mean: Tensor
    image_std: Tensor
    image_dim: int
    text_dim: int
    shares_space = True
    image_size: int
    tokenizer_key: str
    logit_scale: float | None = None
    logit_bias: float | None = None

    def __init__(self, image_mean: tuple[float, ...], image_std: tuple[float, ...], options: EncoderOptions):
        super().__init__()
        self.register_buffer("image_mean", torch.tensor(image_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(image_std).view(1, 3, 1, 1), persistent=False)
        self.options, self.augment = options, options.augment
        self.modes: dict[str, TowerMode] = {}
        self.adapters: dict[str, list[str]] = {}
        """by tower, the modules that have an adapter"""
        self._unadapted: list[str] = []

    def set_up(self, folder: Path | None) -> None:
        """Freeze, adapt and speed up the towers as the options say; the last thing a constructor does.

        Frozen towers get no gradient and stay in evaluation mode (dropout off, batch statistics fixed). Towers with
        adapters run as in training.

        Args:
            folder: the one the encoder is built from, if `save` wrote it.

        Raises ValueError, before it changes anything, for what a tower cannot do.
        """
        modes, adapters = self._modes_and_adapters(folder)
        trained = [name for name, mode in modes.items() if mode != "frozen"]
        for name in trained:
            if self.options.layer_decay < 1 and not find_layers(self.tower(name)):
                kind = type(self.tower(name)[0]).__name__
                raise ValueError(f"encoder.layer_decay: no layers are found in the {name} tower ({kind}); set it to 1")
        if self.options.compile:
            _require_compiler()
        checkpoints = trained if self.options.gradient_checkpointing else []
        switches = [checkpointing(name, self.tower(name)) for name in checkpoints]

        self.modes, self.adapters = modes, adapters
        self._freeze_and_adapt()
        if self.options.channels_last:
            for root in self.tower("image"):
                root.to(memory_format=torch.channels_last)
        for switch_on in switches:
            switch_on()
        if self.options.compile:
            for root in [*self.tower("image"), *self.tower("text")]:
                if len(root._modules):
                    root.compile()
        self.train(self.training)

    def _modes_and_adapters(self, folder: Path | None) -> tuple[dict[str, TowerMode], dict[str, list[str]]]:
        modes = dict(self.options.modes)
        if folder is None:
            towers = [name for name, mode in modes.items() if mode == "lora"]
            if towers:
                require_peft()
            return modes, self._choose_adapters(towers)
        adapters = read_json(folder / ADAPTERS_NAME) if (folder / ADAPTERS_NAME).is_file() else {}
        if adapters:
            require_peft()
        for name, mode in modes.items():
            if mode == "lora" and name not in adapters:  # they were merged
                modes[name] = "full"
        return modes, adapters

    def _freeze_and_adapt(self) -> None:
        own = list(self.named_parameters())
        for name, mode in self.modes.items():
            mine = {id(p) for p in self.tower_parameters(name)}
            if mode == "lora":
                self._unadapted += [key for key, p in own if id(p) in mine and p.requires_grad]
            if mode != "full":
                for p in self.tower_parameters(name):
                    p.requires_grad_(False)
        prefixes = {module: f"{key}." for key, module in self.named_modules()}
        for name, chosen in self.adapters.items():
            for root in self.tower(name):
                prefix = prefixes[root]
                below = [key.removeprefix(prefix) for key in chosen if key.startswith(prefix)]
                if below:
                    add_adapters(root, below, self.options.lora)

    def _choose_adapters(self, towers: list[str]) -> dict[str, list[str]]:
        prefixes = {module: f"{key}." for key, module in self.named_modules()}
        found: dict[str, dict[str, nn.Module]] = {}
        inside: set[nn.Module] = set()
        for name in towers:
            seen = self._trace(name)
            roots = self.tower(name)
            below = {prefixes[root] + key: module for root in roots for key, module in adaptable(root, seen).items()}
            found[name] = below
            inside |= {module for layer in find_layers(roots) for module in layer.modules()}
        return choose(found, inside, self.options.lora)

    def merge_lora(self) -> None:
        """Fold the adapters into the weights they adapt, which are trained in full from then on; saved now, the encoder
        is one without adapters.

        Call it on a trained encoder before it embeds a catalog or serves: features are the same up to rounding, and
        cost what they cost without adapters. Not before training that should go on with adapters. Without any it does
        nothing.
        """
        for name in self.adapters:
            trained = any(p.requires_grad for p in self.tower_parameters(name))
            for root in self.tower(name):
                merge_adapters(root)
            mine = {id(p) for p in self.tower_parameters(name)}
            for key, p in self.named_parameters():
                if key in self._unadapted and id(p) in mine:
                    p.requires_grad_(trained)
            self.modes[name] = "full"
        self.adapters, self._unadapted = {}, []

    def save_adapters(self, folder: Path) -> None:
        """Which modules have adapters, for `save` to tell a constructor that is given its folder."""
        (folder / ADAPTERS_NAME).unlink(missing_ok=True)
        if self.adapters:
            write_json(folder / ADAPTERS_NAME, self.adapters)

    def depth_of(self) -> dict[str, tuple[int, int]]:
        """(l, L) by name of each parameter that trains: it is in layer l of the L of its tower, 0 being what is below
        the first layer and L + 1 what is behind the last."""
        depth: dict[nn.Parameter, tuple[int, int]] = {}
        for name in self.modes:
            if any(p.requires_grad for p in self.tower_parameters(name)):
                seen = self._trace(name)
                depth |= {p: (layer, seen.num_layers) for p, layer in seen.depth.items()}
        return {name: depth[p] for name, p in self.named_parameters() if p in depth}

    def lr_scales(self) -> dict[nn.Parameter, float]:
        """What to multiply the learning rate of parameters with, see `layer_decay`; 1 for those that are left out."""
        decay = self.options.layer_decay
        if decay == 1:
            return {}
        own = dict(self.named_parameters())
        return {own[name]: decay ** max(0, total - layer) for name, (layer, total) in self.depth_of().items()}

    def _trace(self, tower: str) -> Trace:
        """Of an empty picture or a short text, in evaluation mode: no random number is drawn."""
        was_training = self.training
        self.eval()
        device = self.image_mean.device
        try:
            if tower == "image":
                picture = torch.zeros(1, 3, self.image_size, self.image_size, dtype=torch.uint8, device=device)
                return trace(self.tower(tower), lambda: self.encode_image(picture))
            input_ids = self.tokenize(["a"]).long().to(device)
            return trace(self.tower(tower), lambda: self.encode_text(input_ids))
        finally:
            self.train(was_training)

    def tower(self, name: str) -> list[nn.Module]:
        """The modules of the "image" or "text" tower."""
        raise TypeError(f"{type(self).__name__} names no towers")

    def tower_parameters(self, name: str) -> list[nn.Parameter]:
        """All parameters of a tower, also those that stand outside its modules."""
        return [p for module in self.tower(name) for p in module.parameters()]

    def train(self, mode: bool = True) -> EncoderBase:
        super().train(mode)
        for name, tower_mode in self.modes.items():
            if tower_mode == "frozen":
                for module in self.tower(name):
                    module.eval()
        return self

    def encode_image(self, image: Tensor) -> Tensor:
        """(U, 3, H, W) uint8 -> (U, image_dim)."""
        raise NotImplementedError

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """(U, T) int -> (U, text_dim)."""
        raise NotImplementedError

    def tokenize(self, texts: list[str]) -> Tensor:
        """(n, T) int."""
        raise NotImplementedError

    def gradient(self, tower: str):
        """Context for a tower's forward pass: no graph is kept through a frozen one."""
        return torch.no_grad() if self.modes.get(tower) == "frozen" else nullcontext()

    def transform(self, train: bool) -> Callable[[Tensor], Tensor]:
        def apply(image: Tensor) -> Tensor:
            pixels = image.float() / 255
            if pixels.shape[-1] != self.image_size:
                size = (self.image_size, self.image_size)
                pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
            if train:
                pixels = augmented(pixels, self.augment)
            pixels = (pixels - self.image_mean) / self.image_std
            return pixels.contiguous(memory_format=torch.channels_last) if self.options.channels_last else pixels

        return apply


def _require_compiler() -> None:
    names = (os.environ.get("CXX", "c++"), "g++", "clang++", "cl")
    if not any(shutil.which(name) for name in names):
        raise ValueError(
            "encoder.compile: torch.compile needs a C++ compiler, and none is found; install one, or leave it out"
        )


def model_source(name: str) -> str:
    """A model name as the libraries take it. `package:NAME/folder` is a folder inside an installed Python package."""
    if not name.startswith("package:"):
        return name
    package, _, folder = name.removeprefix("package:").partition("/")
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"model {name!r}: the package {package!r} is not installed; pip install {package.replace('_', '-')}"
        )
    path = Path(spec.submodule_search_locations[0]) / folder
    if not path.is_dir():
        raise ValueError(f"model {name!r}: {path} is not a folder of that package")
    return str(path)
