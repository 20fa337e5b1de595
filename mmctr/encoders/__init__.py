"""Encoders: modules that turn pictures and texts into features.

A new encoder is a module of this package and one more member of the union `EncoderConfig`.
"""

from typing import Annotated

from pydantic import Field

from mmctr.encoders.hf import HFEncoderConfig
from mmctr.encoders.openclip import OpenClipEncoderConfig
from mmctr.encoders.towers import TowersEncoderConfig

EncoderConfig = Annotated[
    OpenClipEncoderConfig | HFEncoderConfig | TowersEncoderConfig,
    Field(discriminator="name"),
]
