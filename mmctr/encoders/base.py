"""What every encoder shares: the protocol, pixels on the device, tower modes, and where models are found."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mmctr.config import Config

TowerMode = Literal["full", "frozen"]


class Encoder(Protocol):
    """Pictures and texts into one space. Features are not normalised."""

    dim: int
    image_size: int
    tokenizer_key: str
    """changes whenever the tokenizer does"""
    logit_scale: float | None
    """temperature the weights were trained with, None for fresh ones"""
    logit_bias: float | None

    def encode_image(self, image: Tensor) -> Tensor:
        """(U, 3, H, W) uint8 -> (U, dim)."""
        ...

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """(U, T) int -> (U, dim)."""
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


class AugmentConfig(Config):
    """Augmentation of training batches, on the device. Off by default: product photos are not snapshots."""

    crop: float = Field(default=1.0, gt=0, le=1)
    """smallest side of a random crop, as a fraction of the picture"""
    flip: float = Field(default=0.0, ge=0, le=1)
    """chance of a mirrored picture; leave at 0 where pictures hold writing"""
    brightness: float = Field(default=0.0, ge=0, lt=1)
    """largest relative change of brightness"""


class EncoderBase(nn.Module):
    """Pixels to normalised floats on the device, and towers that can be frozen."""

    image_mean: Tensor
    image_std: Tensor
    dim: int
    image_size: int
    tokenizer_key: str
    logit_scale: float | None = None
    logit_bias: float | None = None

    def __init__(self, image_mean: tuple[float, ...], image_std: tuple[float, ...], augment: AugmentConfig):
        super().__init__()
        self.register_buffer("image_mean", torch.tensor(image_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(image_std).view(1, 3, 1, 1), persistent=False)
        self.augment = augment
        self.modes: dict[str, TowerMode] = {}

    def set_modes(self, image: TowerMode, text: TowerMode) -> None:
        """Frozen towers get no gradient and stay in evaluation mode (dropout off, batch statistics fixed)."""
        self.modes = {"image": image, "text": text}
        for name, mode in self.modes.items():
            if mode == "frozen":
                for module in self.tower(name):
                    module.requires_grad_(False)
        self.train(self.training)

    def tower(self, name: str) -> list[nn.Module]:
        """The modules of the "image" or "text" tower, projections excluded where they are our own."""
        raise TypeError(f"{type(self).__name__} names no towers")

    def train(self, mode: bool = True) -> EncoderBase:
        super().train(mode)
        for name, tower_mode in self.modes.items():
            if tower_mode == "frozen":
                for module in self.tower(name):
                    module.eval()
        return self

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
            return (pixels - self.image_mean) / self.image_std

        return apply


def augmented(pixels: Tensor, config: AugmentConfig) -> Tensor:
    """Random crop, flip and brightness for each picture of a batch: (U, 3, S, S) in [0, 1] -> the same."""
    n = len(pixels)
    if config.crop < 1 or config.flip > 0:
        scale = 1 - torch.rand(n, device=pixels.device) * (1 - config.crop)
        shift = (torch.rand(n, 2, device=pixels.device) * 2 - 1) * (1 - scale)[:, None]
        mirror = 1 - 2 * (torch.rand(n, device=pixels.device) < config.flip).float()
        theta = torch.zeros(n, 2, 3, device=pixels.device)
        theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = scale * mirror, scale, shift
        grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
        pixels = F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)
    if config.brightness:
        factor = 1 + (torch.rand(n, 1, 1, 1, device=pixels.device) * 2 - 1) * config.brightness
        pixels = (pixels * factor).clamp(0, 1)
    return pixels


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
