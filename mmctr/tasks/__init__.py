"""Tasks: trainable models that turn a batch into named, weighted loss terms, saved as self-describing folders."""

from __future__ import annotations

from mmctr.tasks.pretrain import PretrainTask, PretrainTaskConfig
from mmctr.tasks.ranking import RankingTask
from mmctr.tasks.ranking_config import RankingTaskConfig

__all__ = ["PretrainTask", "PretrainTaskConfig", "RankingTask", "RankingTaskConfig"]
