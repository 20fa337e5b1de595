"""mmctr: item embeddings from pictures and texts, and click-through-rate rankers that read them.

The public names are loaded when they are first used, so `import mmctr` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmctr.api import Comparison as Comparison
    from mmctr.api import ItemSearch as ItemSearch
    from mmctr.api import Ranker as Ranker
    from mmctr.api import compare as compare
    from mmctr.api import load as load
    from mmctr.api import train as train
    from mmctr.data.embeddings import EmbeddingTable as EmbeddingTable
    from mmctr.data.prepare import open_dataset as open_dataset
    from mmctr.data.splits import split_interactions as split_interactions
    from mmctr.datasets.toy_world import ToyWorld as ToyWorld
    from mmctr.datasets.toy_world import ToyWorldConfig as ToyWorldConfig
    from mmctr.evaluation.metrics import auc as auc
    from mmctr.evaluation.metrics import gauc as gauc
    from mmctr.retrieval.index import ItemIndex as ItemIndex
    from mmctr.run_folder import RunFolder as RunFolder
    from mmctr.runs.config import FinetuneConfig as FinetuneConfig
    from mmctr.runs.config import PretrainConfig as PretrainConfig
    from mmctr.runs.item_encoder import ItemEncoder as ItemEncoder
    from mmctr.tasks import PretrainTask as PretrainTask
    from mmctr.tasks import RankingTask as RankingTask
    from mmctr.training.fit import fit as fit

_PUBLIC = {
    "load": "mmctr.api",
    "train": "mmctr.api",
    "compare": "mmctr.api",
    "ItemEncoder": "mmctr.runs.item_encoder",
    "ItemSearch": "mmctr.api",
    "Ranker": "mmctr.api",
    "Comparison": "mmctr.api",
    "PretrainConfig": "mmctr.runs.config",
    "FinetuneConfig": "mmctr.runs.config",
    "EmbeddingTable": "mmctr.data.embeddings",
    "ItemIndex": "mmctr.retrieval.index",
    "RunFolder": "mmctr.run_folder",
    "PretrainTask": "mmctr.tasks",
    "RankingTask": "mmctr.tasks",
    "fit": "mmctr.training.fit",
    "open_dataset": "mmctr.data.prepare",
    "split_interactions": "mmctr.data.splits",
    "auc": "mmctr.evaluation.metrics",
    "gauc": "mmctr.evaluation.metrics",
    "ToyWorld": "mmctr.datasets.toy_world",
    "ToyWorldConfig": "mmctr.datasets.toy_world",
}
"""public name -> the module that defines it"""

__all__ = [
    "Comparison",
    "EmbeddingTable",
    "FinetuneConfig",
    "ItemEncoder",
    "ItemIndex",
    "ItemSearch",
    "PretrainConfig",
    "PretrainTask",
    "Ranker",
    "RankingTask",
    "RunFolder",
    "ToyWorld",
    "ToyWorldConfig",
    "auc",
    "compare",
    "fit",
    "gauc",
    "load",
    "open_dataset",
    "split_interactions",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mmctr' has no attribute {name!r}; public names are {', '.join(_PUBLIC)}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
