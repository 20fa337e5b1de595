from __future__ import annotations

import pytest
import torch
from torchvision.transforms.v2 import functional

from mmctr.encoders.augment import AugmentConfig, augmented, with_brightness, with_contrast, with_saturation


def test_crop_flip_and_brightness():
    x = torch.rand(4, 3, 16, 16)
    assert torch.equal(augmented(x, AugmentConfig()), x)
    torch.testing.assert_close(augmented(x, AugmentConfig(flip=1.0)), x.flip(3), rtol=1e-4, atol=1e-4)
    torch.manual_seed(0)
    bright = augmented(torch.full((50, 3, 4, 4), 0.5), AugmentConfig(brightness=0.2))
    assert bright.min() >= 0.399 and bright.max() <= 0.601 and bright.std(0).min() > 0.03
    cropped = augmented(x, AugmentConfig(crop=0.5))
    assert cropped.shape == x.shape and not torch.allclose(cropped, x) and cropped.max() <= x.max() + 1e-5


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_colours_equal_those_of_torchvision(name):
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    factors = [0.0, 0.6, 1.5]
    ours = {"brightness": with_brightness, "contrast": with_contrast, "saturation": with_saturation}[name]
    found = ours(x, torch.tensor(factors).view(3, 1, 1, 1))
    for picture, result, factor in zip(x, found, factors, strict=True):
        torch.testing.assert_close(result, getattr(functional, f"adjust_{name}")(picture, factor), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["contrast", "saturation"])
def test_each_picture_is_changed_by_its_own_draw(name):
    torch.manual_seed(0)
    picture = torch.rand(3, 8, 8)
    x = picture.expand(200, -1, -1, -1)
    changed = augmented(x, AugmentConfig.parse({name: 0.3}))
    ours = {"contrast": with_contrast, "saturation": with_saturation}[name]
    low, high = (ours(picture[None], torch.full((1, 1, 1, 1), factor)) for factor in (0.7, 1.3))
    assert (changed >= torch.minimum(low, high) - 1e-5).all() and (changed <= torch.maximum(low, high) + 1e-5).all()
    assert changed.std(0).max() > 0.02
