"""Tasks: `batch -> named, weighted loss terms`; saved folders describe themselves."""

from __future__ import annotations

from mmctr.tasks.pretrain import PretrainTask, PretrainTaskConfig
from mmctr.tasks.ranking import RankingTask
from mmctr.tasks.ranking_config import RankingTaskConfig

__all__ = ["PretrainTask", "PretrainTaskConfig", "RankingTask", "RankingTaskConfig"]
