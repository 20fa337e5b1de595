"""Sample items with their nearest neighbours, pictures included, for the report."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from mmctr.data.catalog import Catalog
from mmctr.data.embeddings import EmbeddingTable
from mmctr.data.prepare import open_dataset
from mmctr.reports.page import ItemCard, NeighbourRow
from mmctr.retrieval.index import ItemIndex


def sample_neighbours(
    runs: list[Path], embeddings: str | None, num_items: int = 6, num_neighbours: int = 6
) -> list[NeighbourRow] | None:
    """Rows of pictures for the report, from `embeddings` or the first embedding folder a run's content came from.

    None when no run used an embedding folder that is still there. Items are spread evenly over the catalog.
    """
    folder = embeddings or _embeddings_of(runs)
    if folder is None:
        return None
    table = EmbeddingTable.read(folder)
    data = table.identity.data
    if data is None or not Path(data).is_dir():
        return None
    card = Cards(open_dataset(data).catalog)
    index = ItemIndex.build(table)
    rows = []
    for position in np.linspace(0, len(table) - 1, num_items).astype(int):
        item_id = table.ids[int(position)].as_py()
        found = index.search_item(item_id, num_neighbours)
        cards = [card(neighbour.item_id, neighbour.title, neighbour.score) for neighbour in found]
        title = table.titles[position] if table.titles else None
        rows.append(NeighbourRow(query=card(item_id, title), neighbours=cards))
    return rows


def _embeddings_of(runs: list[Path]) -> str | None:
    for run in runs:
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        path = config.get("task", {}).get("embedder", {}).get("content", {}).get("path")
        for candidate in [path] if isinstance(path, str) else path or []:
            if (Path(candidate) / "manifest.json").is_file():
                return candidate
    return None


class Cards:
    """Items of a catalog as cards, with pictures from a cache that is there."""

    def __init__(self, catalog: Catalog):
        self.catalog, self.pictures = catalog, None
        folders = sorted(path.parent.name for path in catalog.folder.glob("pictures-*/report.json"))
        found = next(filter(None, (re.fullmatch(r"pictures-(\d+)-([a-z]+)", name) for name in folders)), None)
        if found:
            self.pictures = catalog.pictures(int(found[1]), found[2])  # type: ignore[arg-type]

    def __call__(self, item_id: object, title: str | None, score: float | None = None) -> ItemCard:
        image = None
        if self.pictures is not None:
            pixels, there = self.pictures.take(torch.from_numpy(self.catalog.rows([item_id])))
            if there[0]:
                buffer = io.BytesIO()
                Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).save(buffer, "PNG")
                image = buffer.getvalue()
        return ItemCard(item_id=str(item_id), title=title or "", image=image, score=score)
