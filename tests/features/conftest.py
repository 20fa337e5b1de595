from __future__ import annotations

import pytest

from mmctr.data.prepare import Dataset, open_dataset
from mmctr.data.splits import ColdItemsSplit, Splits, split_interactions
from mmctr.features.columns import CategoricalFeature, MultiValuedFeature, NumericFeature
from mmctr.features.vocabulary import FeatureConfigs

FEATURES = FeatureConfigs(
    item={"brand": CategoricalFeature(), "title": MultiValuedFeature(separator=" ")},
    user={"region": CategoricalFeature()},
    context={"position": NumericFeature()},
)


@pytest.fixture(scope="module")
def world(toy_folder) -> tuple[Dataset, Splits]:
    dataset = open_dataset(toy_folder)
    return dataset, split_interactions(dataset.interactions, len(dataset.catalog), ColdItemsSplit(cold=0.2))
