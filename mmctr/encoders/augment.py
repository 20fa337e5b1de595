"""Augmentation of training pictures: random crops, flips and colours of a whole batch at once, on the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mmctr.config import Config


class AugmentConfig(Config):
    """Random changes of training pictures, on the device. Off by default: product photos are taken alike."""

    crop: float = Field(default=1.0, gt=0, le=1)
    """smallest side of a random crop, as a fraction of the side of the picture; 1: no crops"""
    flip: float = Field(default=0.0, ge=0, le=1)
    """probability that a picture is mirrored; keep 0 where pictures hold writing"""
    brightness: float = Field(default=0.0, ge=0, lt=1)
    """largest relative change of brightness"""
    contrast: float = Field(default=0.0, ge=0, lt=1)
    """largest relative change of contrast"""
    saturation: float = Field(default=0.0, ge=0, lt=1)
    """largest relative change of saturation; keep 0 where people search by colour"""


def augmented(pixels: Tensor, config: AugmentConfig) -> Tensor:
    """Change each picture of a batch by a random crop, flip and colour of that picture.

    Args:
        pixels: (U, 3, S, S) in [0, 1].
        config: how large the changes may be.

    Returns:
        (U, 3, S, S) in [0, 1].
    """
    n = len(pixels)
    if config.crop < 1 or config.flip > 0:
        scale = 1 - torch.rand(n, device=pixels.device) * (1 - config.crop)
        shift = (torch.rand(n, 2, device=pixels.device) * 2 - 1) * (1 - scale)[:, None]
        mirror = 1 - 2 * (torch.rand(n, device=pixels.device) < config.flip).float()
        theta = torch.zeros(n, 2, 3, device=pixels.device)
        theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = scale * mirror, scale, shift
        grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
        pixels = F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)
    for change, largest in (
        (with_brightness, config.brightness),
        (with_contrast, config.contrast),
        (with_saturation, config.saturation),
    ):
        if largest:
            pixels = change(pixels, 1 + (torch.rand(n, 1, 1, 1, device=pixels.device) * 2 - 1) * largest)
    return pixels


def with_brightness(pixels: Tensor, factor: Tensor) -> Tensor:
    """Scale the brightness of pictures.

    Args:
        pixels: (U, 3, S, S) in [0, 1].
        factor: (U, 1, 1, 1); 0 gives black, 1 the picture.

    Returns:
        (U, 3, S, S) in [0, 1].
    """
    return (pixels * factor).clamp(0, 1)


def with_contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    """Scale the contrast of pictures.

    Args:
        pixels: (U, 3, S, S) in [0, 1].
        factor: (U, 1, 1, 1); 0 gives the mean grey of the picture, 1 the picture.

    Returns:
        (U, 3, S, S) in [0, 1].
    """
    return _blend(pixels, _grey(pixels).mean((1, 2, 3), keepdim=True), factor)


def with_saturation(pixels: Tensor, factor: Tensor) -> Tensor:
    """Scale the saturation of pictures.

    Args:
        pixels: (U, 3, S, S) in [0, 1].
        factor: (U, 1, 1, 1); 0 gives the picture in grey, 1 the picture.

    Returns:
        (U, 3, S, S) in [0, 1].
    """
    return _blend(pixels, _grey(pixels), factor)


def _grey(pixels: Tensor) -> Tensor:
    """(U, 1, S, S) luma of pictures (U, 3, S, S), with the weights of ITU-R BT.601."""
    return (pixels * pixels.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _blend(pixels: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """(1 - factor) other + factor pixels, clamped to [0, 1]."""
    return (other + factor * (pixels - other)).clamp(0, 1)
