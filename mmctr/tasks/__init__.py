"""Tasks: `batch -> named, weighted loss terms`; saved folders describe themselves."""

from __future__ import annotations

from mmctr.tasks.pretrain import PretrainTask, PretrainTaskConfig
from mmctr.tasks.ranking import RankingTask, RankingTaskConfig

__all__ = ["PretrainTask", "PretrainTaskConfig", "RankingTask", "RankingTaskConfig"]
