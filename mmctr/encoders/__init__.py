"""Encoders: pictures and texts into one space. To add one: a module, then its config in the union below."""

from typing import Annotated

from pydantic import Field

from mmctr.encoders.hf import HFEncoderConfig
from mmctr.encoders.openclip import OpenClipEncoderConfig
from mmctr.encoders.towers import TowersEncoderConfig

EncoderConfig = Annotated[
    OpenClipEncoderConfig | HFEncoderConfig | TowersEncoderConfig,
    Field(discriminator="name"),
]
