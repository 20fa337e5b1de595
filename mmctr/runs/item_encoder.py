"""ItemEncoder: embeds pictures and texts in memory with the encoder of a finished pretraining run."""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmctr.data.batches import ItemBatch
from mmctr.data.images import PictureError, Resize, decode_picture
from mmctr.files import user_path
from mmctr.runs.finished import load_encoder
from mmctr.runs.folder import data_config

Picture = bytes | str | Path | Image.Image | np.ndarray
"""an encoded picture (JPEG, PNG, ...), the path of a file, a PIL image, or (H, W, 3) uint8 pixels"""
BATCH_SIZE = 256
"""items that are encoded at once"""


class ItemEncoder:
    """The encoder of a finished pretraining run, for items in memory.

    Pictures are resized and items embedded exactly as by `mmctr embed`, so the vectors can be compared with the vectors
    of an embedding folder of the same run. Thread-safe: one call runs at a time.

    Args:
        run: folder of `pretrain.train`.

    Raises:
        ValueError: the folder holds no finished pretraining run.

    Example:
        ```python
        encoder = mmctr.load("demo/pretrain")
        vectors = encoder.embed(texts=["red circle", "blue square"])
        assert vectors.shape == (2, encoder.dim)
        ```
    """

    def __init__(self, run: str | Path):
        self.run = user_path(run)
        self.task = load_encoder(self.run)
        self._resize: Resize = data_config(self.run, None, is_read=False).image_resize
        self._lock = threading.Lock()

    @property
    def dim(self) -> int:
        """D, the size of an item embedding."""
        return self.task.embedding_dim

    def embed(
        self,
        images: Picture | Sequence[Picture | None] | None = None,
        texts: str | Sequence[str | None] | None = None,
    ) -> np.ndarray:
        """Embeddings of N items, each from a picture, a text, or both.

        Args:
            images: a picture for each item, None for an item without picture; or the picture of a single item.
            texts: a text for each item, None for an item without text; or the text of a single item. The text of a
                catalog item is the columns `data.text` of the run, joined by a space.

        Returns:
            (N, D) float32, (D,) for a single item. The vectors have unit norm, or, where the run has a head, are the
            means of the latents.

        Raises:
            ValueError: lists of different length, an item with neither picture nor text, an empty text, or a picture
                that cannot be read; the message names the item.

        Example:
            ```python
            from PIL import Image

            encoder = mmctr.load("demo/pretrain")
            picture = Image.new("RGB", (200, 150), "red")
            vectors = encoder.embed(images=[picture, None], texts=["red circle", "blue square"])
            one_vector = encoder.embed(images=picture)
            ```
        """
        single = isinstance(images, Picture) or isinstance(texts, str)
        image_list: list[Picture | None] = _as_list(images, Picture)
        text_list: list[str | None] = _as_list(texts, str)
        num_items = max(len(image_list), len(text_list))
        image_list, text_list = image_list or [None] * num_items, text_list or [None] * num_items
        if not num_items:
            raise ValueError("nothing to embed: give images, texts, or both")
        if len(image_list) != len(text_list):
            raise ValueError(f"{len(image_list)} images and {len(text_list)} texts: give one of each an item, or None")
        names = [""] if num_items == 1 else [f"item {number}: " for number in range(num_items)]
        for name, image, text in zip(names, image_list, text_list, strict=True):
            if image is None and text is None:
                raise ValueError(f"{name}neither picture nor text; give one of the two")
            if text is not None and not text.strip():
                raise ValueError(f"{name}the text is empty; give at least one word, or None")
        vectors = []
        for start in range(0, num_items, BATCH_SIZE):
            part = slice(start, start + BATCH_SIZE)
            batch = self._batch(image_list[part], text_list[part], names[part])
            with self._lock, torch.inference_mode():
                vectors.append(self.task.embed(batch)[0].float().cpu().numpy())
        result = np.concatenate(vectors)
        return result[0] if single else result

    def _batch(self, images: list[Picture | None], texts: list[str | None], names: list[str]) -> ItemBatch:
        """The batch of some items; a modality that all items lack is None. Error messages begin with `names`."""
        has_image = torch.tensor([image is not None for image in images])
        has_text = torch.tensor([text is not None for text in texts])
        pixels = input_ids = None
        if has_image.any():
            side = self.task.encoder.image_size
            blank = torch.zeros(3, side, side, dtype=torch.uint8)
            pixels = torch.stack(
                [blank if x is None else self._pixels(x, name) for x, name in zip(images, names, strict=True)]
            )
        if has_text.any():
            input_ids = self.task.encoder.tokenize([text or "" for text in texts]).long()
        return ItemBatch(
            row=torch.zeros(len(images), dtype=torch.int64),
            image=pixels,
            has_image=None if pixels is None else has_image,
            input_ids=input_ids,
            has_text=None if input_ids is None else has_text,
        )

    def _pixels(self, image: Picture, name: str) -> torch.Tensor:
        """(3, S, S) uint8 pixels of a picture, where S is the side of the pictures that the encoder reads."""
        name += f"picture {image}" if isinstance(image, str | Path) else "picture"
        try:
            return decode_picture(_encoded(image), self.task.encoder.image_size, self._resize)
        except FileNotFoundError:
            raise ValueError(f"{name}: no such file") from None
        except (PictureError, TypeError) as error:
            raise ValueError(f"{name}: {error}") from None


def _as_list(values: Any, kind: Any) -> list[Any]:
    """The values as a list: several values, one value of a kind, or none."""
    if values is None:
        return []
    return [values] if isinstance(values, kind) else list(values)


def _encoded(image: Picture) -> bytes:
    """A picture as the bytes of an image file; pixels in memory become a PNG file, which is lossless."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path):
        return Path(image).read_bytes()
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise TypeError(f"pixels are (H, W, 3) uint8, not {image.shape} {image.dtype}")
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()
