"""Sample items of an embedding folder with their nearest neighbours and pictures, for the comparison page."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from PIL import Image

from mmctr.data.catalog import Catalog
from mmctr.data.embeddings import EmbeddingTable
from mmctr.data.images import Resize
from mmctr.data.prepare import open_dataset
from mmctr.reports.page import ItemCard, NeighbourRow
from mmctr.retrieval.index import ItemIndex
from mmctr.run_folder import RunFolder


def sample_neighbours(
    runs: list[Path], embeddings: str | None, num_items: int = 6, num_neighbours: int = 6
) -> list[NeighbourRow] | None:
    """Sample items, spread evenly over an embedding table, with the items nearest to each of them.

    The embedding folder is `embeddings`, by default the first one that the content of a run was read from. None where
    no such folder, or not the dataset that the embedding folder was made from, exists.
    """
    folder = embeddings or _embedding_folder(runs)
    if folder is None:
        return None
    table = EmbeddingTable.read(folder)
    data = table.identity.data
    if data is None or not Path(data).is_dir():
        return None
    cards = CardMaker(open_dataset(data).catalog)
    index = ItemIndex.build(table)
    rows = []
    for position in np.linspace(0, len(table) - 1, num_items).astype(int):
        item_id = table.ids[int(position)].as_py()
        neighbours = index.search_item(item_id, num_neighbours)
        title = table.titles[position] if table.titles else None
        rows.append(
            NeighbourRow(
                query=cards.card(item_id, title),
                neighbours=[cards.card(one.item_id, one.title, one.score) for one in neighbours],
            )
        )
    return rows


def _embedding_folder(runs: list[Path]) -> str | None:
    """The first embedding folder that exists among the `content.path` of the runs' configs."""
    for run in runs:
        config = RunFolder(run).read_config()
        path = config.get("task", {}).get("embedder", {}).get("content", {}).get("path")
        for candidate in map(RunFolder(run).located, [path] if isinstance(path, str) else path or []):
            if (Path(candidate) / "manifest.json").is_file():
                return candidate
    return None


class CardMaker:
    """Makes cards of catalog items, with pictures where the catalog's folder holds a cache of pictures."""

    def __init__(self, catalog: Catalog):
        self.catalog, self.pictures = catalog, None
        folders = sorted(path.parent.name for path in catalog.folder.glob("pictures-*/report.json"))
        modes: dict[str, Resize] = {mode: mode for mode in get_args(Resize)}
        for name in folders:
            match = re.fullmatch(r"pictures-(\d+)-([a-z]+)", name)
            if match and match[2] in modes:
                self.pictures = catalog.pictures(int(match[1]), modes[match[2]])
                break

    def card(self, item_id: object, title: str | None, score: float | None = None) -> ItemCard:
        """The card of an item by raw id, with its picture as PNG. Raises UnknownId for an id not in the catalog."""
        image = None
        if self.pictures is not None:
            pixels, has_picture = self.pictures.take(torch.from_numpy(self.catalog.rows([item_id])))
            if has_picture[0]:
                buffer = io.BytesIO()
                Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).save(buffer, "PNG")
                image = buffer.getvalue()
        return ItemCard(item_id=str(item_id), title=title or "", image=image, score=score)
