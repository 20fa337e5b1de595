"""Config of ToyWorld."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from mmctr.config import Config


class ToyWorldConfig(Config):
    """Size, noise and click model of a ToyWorld.

    Example:
        ```python
        config = mmctr.ToyWorldConfig(num_items=100, num_users=20, string_ids=True)
        assert mmctr.ToyWorld(config).item_ids[7] == "toy-000007"
        ```
    """

    num_items: int = Field(default=1200, ge=50, le=10_000_000)
    """number of items of the catalog"""
    num_users: int = Field(default=1500, ge=1, le=10_000_000)
    """number of users of the click log"""
    impressions_per_user: int = Field(default=60, ge=1, le=10_000)
    """mean number of impressions per user; the distribution over users is log-normal"""
    session_length: int = Field(default=6, ge=1, le=20)
    """mean number of positions of a session"""
    image_size: int = Field(default=48, ge=16, le=512)
    """side of a picture in pixels"""
    seed: int = Field(default=0, ge=0)
    """seed of all random draws of the world"""
    title_noise: float = Field(default=0.05, ge=0, le=1)
    """probability that a title names a wrong value of a factor"""
    missing_picture: float = Field(default=0.03, ge=0, le=1)
    """probability that an item has no picture"""
    missing_title: float = Field(default=0.03, ge=0, le=1)
    """probability that an item has no title"""
    click_rate: float = Field(default=0.3, ge=0.01, le=0.99)
    """mean of the label, for which the bias of the click model is solved"""
    taste_strength: float = Field(default=2.5, ge=0, le=20)
    """logits per standard deviation of the utility of an item for a user"""
    quality_strength: float = Field(default=1.0, ge=0, le=20)
    """logits per standard deviation of the hidden quality of an item"""
    drift: float = Field(default=0.5, ge=0, le=1)
    """how far the taste of a user moves from a first to a second taste over the log: 0 stays at the first, 1 arrives at
    the second"""
    position_effect: float = Field(default=0.5, ge=0, le=10)
    """logits lost per unit of log(1 + position)"""
    popularity_exponent: float = Field(default=0.8, ge=0, le=2)
    """exponent a: the exposure of the item of popularity rank r is proportional to r^-a; 0 is uniform"""
    pictures: Literal["files", "bytes"] = "files"
    """whether items.parquet holds paths of files in images/ or the bytes of the JPEG files"""
    string_ids: bool = False
    """whether ids are strings such as "toy-000123" instead of integers beyond 32 bits"""

    @model_validator(mode="after")
    def _sessions_fit(self) -> Self:
        if self.impressions_per_user < self.session_length:
            raise ValueError(
                f"impressions_per_user: {self.impressions_per_user} is less than one session of session_length "
                f"{self.session_length}; raise the one or lower the other"
            )
        return self
