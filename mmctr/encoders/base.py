"""The parts all encoders share: the protocol, pixel preparation on the device, tower training modes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmctr.config import Config
from mmctr.encoders.augment import AugmentConfig, augmented
from mmctr.encoders.layers import Trace, checkpointing, find_layers, trace
from mmctr.encoders.lora import LoraConfig, adaptable, add_adapters, choose, merge_adapters, require_peft
from mmctr.files import read_json, write_json
from mmctr.layers.batch_norm import share_statistics

TowerMode = Literal["full", "lora", "frozen"]
"""`full`: all weights are trained; `lora`: only low-rank adapters of the weights are trained; `frozen`: nothing is"""
ADAPTERS_NAME = "adapters.json"
"""file in the folder of an encoder that lists the modules with adapters, by tower"""


class Encoder(Protocol):
    """A model that gives features of pictures and of texts, not normalised."""

    image_dim: int
    """size of the features of a picture"""
    text_dim: int
    """size of the features of a text"""
    shares_space: bool
    """whether features of pictures and of texts can be compared with each other without a projection"""
    image_size: int
    """side S of the pictures the image tower reads, in pixels"""
    tokenizer_key: str
    """a name of the tokenizer: two tokenizers that give different tokens have different keys"""
    logit_scale: float | None
    """logarithm of the inverse temperature the weights were trained with; None for fresh weights"""
    logit_bias: float | None
    """bias of the sigmoid loss the weights were trained with; None for fresh weights and softmax losses"""

    def encode_image(self, image: Tensor) -> Tensor:
        """Features (U, image_dim) of pictures (U, 3, H, W) uint8."""
        ...

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """Features (U, text_dim) of tokens (U, T) int."""
        ...

    def transform(self, train: bool) -> Callable[[Tensor], Tensor]:
        """A function from pictures (U, 3, H, W) uint8 to the (U, 3, S, S) float input of the image tower.

        Args:
            train: whether the function augments the pictures.
        """
        ...

    def tokenize(self, texts: list[str]) -> Tensor:
        """Tokens (n, T) int of n texts; an empty text gives a row of padding and special tokens alone."""
        ...

    def save(self, folder: Path) -> None:
        """Write the files that build the same architecture and tokenizer again, without weights."""
        ...


class EncoderOptions(Config):
    """Training options of the towers of any encoder."""

    augment: AugmentConfig = AugmentConfig()
    """random changes of training pictures"""
    lora: LoraConfig = LoraConfig()
    """low-rank adapters of the towers whose mode is `lora`"""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """layer l of the L layers of a tower has the learning rate lr * layer_decay^(L - l). Parameters before the first
    layer count as l = 0, heads and projections as l = L (ELECTRA, BEiT; 0.65 to 0.9 are usual when fine-tuning)"""
    gradient_checkpointing: bool = False
    """store only the inputs of the layers and compute everything else again in the backward pass: a fraction of the
    memory, a quarter to a third slower"""
    channels_last: bool = False
    """lay out pictures and convolutions as (N, H, W, C) in memory: convolutional towers become faster, other towers
    stay as fast"""
    compile: bool = False
    """torch.compile the towers, which takes a minute or more at the first steps. On a CPU convolutional towers become
    faster, transformers hardly"""

    @property
    def modes(self) -> dict[str, TowerMode]:
        """The training mode of each tower, by the names "image" and "text"."""
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
    """Base class of encoders: it normalises pixels on the device, and trains, adapts or freezes the towers.

    Args:
        image_mean: mean of each colour channel, of pixels in [0, 1].
        image_std: standard deviation of each colour channel, of pixels in [0, 1].
        options: how the towers train.
    """

    image_mean: Tensor
    image_std: Tensor
    image_dim: int
    text_dim: int
    shares_space = True
    """whether features of pictures and of texts can be compared with each other without a projection"""
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
        """names of the modules that have an adapter, by tower"""
        self._unadapted: list[str] = []
        """names of the parameters that were trained before adapters froze the tower"""

    def set_up(self, folder: Path | None) -> None:
        """Freeze, adapt and speed up the towers as the options say; constructors call this last.

        Frozen towers get no gradient and stay in evaluation mode (dropout off, batch statistics fixed). Towers with
        adapters run in training mode. Batch normalisation of towers that train takes its statistics over all processes.

        Args:
            folder: the folder the encoder is built from, written by `save`; None for a new encoder.

        Raises:
            ValueError: an option asks for something a tower cannot do; nothing is changed then.
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
        for name in trained:
            for root in self.tower(name):
                share_statistics(root, self.options.compile)
        for switch_on in switches:
            switch_on()
        if self.options.compile:
            for root in [*self.tower("image"), *self.tower("text")]:
                if len(root._modules):
                    root.compile()
        self.train(self.training)

    def _modes_and_adapters(self, folder: Path | None) -> tuple[dict[str, TowerMode], dict[str, list[str]]]:
        """The mode of each tower and the modules with adapters, of the options or of a saved encoder."""
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
            if mode == "lora" and name not in adapters:  # the adapters of this tower were merged
                modes[name] = "full"
        return modes, adapters

    def _freeze_and_adapt(self) -> None:
        """Freeze the towers that are not trained in full, and add the adapters."""
        parameters = list(self.named_parameters())
        for name, mode in self.modes.items():
            tower_ids = {id(p) for p in self.tower_parameters(name)}
            if mode == "lora":
                self._unadapted += [key for key, p in parameters if id(p) in tower_ids and p.requires_grad]
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
        """The names of the modules that get an adapter, for each tower of mode `lora`."""
        prefixes = {module: f"{key}." for key, module in self.named_modules()}
        candidates: dict[str, dict[str, nn.Module]] = {}
        inside: set[nn.Module] = set()
        for name in towers:
            tower_trace = self._trace(name)
            roots = self.tower(name)
            candidates[name] = {
                prefixes[root] + key: module for root in roots for key, module in adaptable(root, tower_trace).items()
            }
            inside |= {module for layer in find_layers(roots) for module in layer.modules()}
        return choose(candidates, inside, self.options.lora)

    def merge_lora(self) -> None:
        """Add the adapters to the adapted weights, and remove the adapters.

        An encoder saved after this call has no adapters, and the merged weights are trained in full from then on.
        Call this on a trained encoder before the encoder embeds a catalog or serves: features are the same up to
        rounding and cost no more than without adapters. Do not call this before training that continues with
        adapters. An encoder without adapters is not changed.
        """
        for name in self.adapters:
            trained = any(p.requires_grad for p in self.tower_parameters(name))
            for root in self.tower(name):
                merge_adapters(root)
            tower_ids = {id(p) for p in self.tower_parameters(name)}
            for key, p in self.named_parameters():
                if key in self._unadapted and id(p) in tower_ids:
                    p.requires_grad_(trained)
            self.modes[name] = "full"
        self.adapters, self._unadapted = {}, []

    def save_adapters(self, folder: Path) -> None:
        """Write the names of the modules with adapters into the folder of a saved encoder, for a later constructor."""
        (folder / ADAPTERS_NAME).unlink(missing_ok=True)
        if self.adapters:
            write_json(folder / ADAPTERS_NAME, self.adapters)

    def depth_of(self) -> dict[str, tuple[int, int]]:
        """The layer of each trained parameter, by the name of the parameter.

        Returns:
            (l, L) for a parameter in layer l of a tower of L layers; l is 0 before the first layer and L + 1 behind the
            last layer.
        """
        depth: dict[nn.Parameter, tuple[int, int]] = {}
        for name in self.modes:
            if any(p.requires_grad for p in self.tower_parameters(name)):
                tower_trace = self._trace(name)
                depth |= {p: (layer, tower_trace.num_layers) for p, layer in tower_trace.depth.items()}
        return {name: depth[p] for name, p in self.named_parameters() if p in depth}

    def lr_scales(self) -> dict[nn.Parameter, float]:
        """Factors on the learning rate by parameter, as `layer_decay` asks; a missing parameter has the factor 1."""
        decay = self.options.layer_decay
        if decay == 1:
            return {}
        parameters = dict(self.named_parameters())
        return {parameters[name]: decay ** max(0, total - layer) for name, (layer, total) in self.depth_of().items()}

    def _trace(self, tower: str) -> Trace:
        """The trace of a forward pass of a black picture or a short text, in evaluation mode: nothing is random."""
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
        """The modules of a tower.

        Args:
            name: "image" or "text".

        Raises:
            TypeError: the class of the encoder does not override this method.
        """
        raise TypeError(f"{type(self).__name__} names no towers")

    def tower_parameters(self, name: str) -> list[nn.Parameter]:
        """All parameters of a tower, parameters outside the modules of the tower included.

        Args:
            name: "image" or "text".
        """
        return [p for module in self.tower(name) for p in module.parameters()]

    def train(self, mode: bool = True) -> EncoderBase:
        """Set the training mode; frozen towers stay in evaluation mode."""
        super().train(mode)
        for name, tower_mode in self.modes.items():
            if tower_mode == "frozen":
                for module in self.tower(name):
                    module.eval()
        return self

    def encode_image(self, image: Tensor) -> Tensor:
        """Features (U, image_dim) of pictures (U, 3, H, W) uint8."""
        raise NotImplementedError

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """Features (U, text_dim) of tokens (U, T) int."""
        raise NotImplementedError

    def tokenize(self, texts: list[str]) -> Tensor:
        """Tokens (n, T) int of n texts."""
        raise NotImplementedError

    def gradient(self, tower: str) -> AbstractContextManager[Any]:
        """A context for the forward pass of a tower: frozen towers keep no graph for the backward pass."""
        return torch.no_grad() if self.modes.get(tower) == "frozen" else nullcontext()

    def transform(self, train: bool) -> Callable[[Tensor], Tensor]:
        """A function from pictures (U, 3, H, W) uint8 to the normalised (U, 3, S, S) input of the image tower.

        Args:
            train: whether the function augments the pictures.
        """

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
    """Raise ValueError where no C++ compiler is installed."""
    names = (os.environ.get("CXX", "c++"), "g++", "clang++", "cl")
    if not any(shutil.which(name) for name in names):
        raise ValueError(
            "encoder.compile: torch.compile needs a C++ compiler, and none is found; install one, or leave it out"
        )
