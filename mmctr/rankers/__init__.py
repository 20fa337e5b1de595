"""Rankers: vectors in, logits out. To add one: a module, then its config in the union below."""

from mmctr.rankers.din import DINConfig

RankerConfig = DINConfig
