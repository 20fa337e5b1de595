"""Features of frozen towers: computed once for a catalog, stored on disk, and read in place of pictures and texts."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from mmctr.data.catalog import Catalog
from mmctr.data.content import ItemContent, PictureField, TextField
from mmctr.data.embedding_export import write_embeddings
from mmctr.data.embedding_identity import EmbeddingIdentity
from mmctr.data.embeddings import EmbeddingTable
from mmctr.encoders.augment import AugmentConfig
from mmctr.encoders.base import EncoderBase
from mmctr.files import fingerprint

logger = logging.getLogger(__name__)


def with_frozen_features(
    encoder: EncoderBase, content: ItemContent, catalog: Catalog, accelerator: Accelerator
) -> ItemContent:
    """The content with the features of each frozen tower in place of pictures or texts.

    All processes compute the features, in shards, so that a killed run continues. A frozen image tower with
    augmentation still reads pictures, because the features are different at each step.

    Args:
        encoder: the encoder.
        content: pictures and texts of the catalog.
        catalog: the catalog, whose folder gets the features.
        accelerator: processes and device.
    """
    pictures, texts = content.pictures, content.texts
    if encoder.modes.get("image") == "frozen" and encoder.augment == AugmentConfig():
        pictures = tuple(_with_features(encoder, "image", field, catalog, accelerator) for field in pictures)
    if encoder.modes.get("text") == "frozen":
        texts = tuple(_with_features(encoder, "text", field, catalog, accelerator) for field in texts)
    return ItemContent(pictures, texts)


def _with_features(
    encoder: EncoderBase, tower: str, field: PictureField | TextField, catalog: Catalog, accelerator: Accelerator
) -> Any:
    """A field with the features (N, D) of a tower, which are computed where the folder lacks them."""
    if isinstance(field, PictureField):
        # refused pictures that could be read later change the features, not the key
        report = field.pictures.report
        source = [field.pictures.folder.name, report["key"], *([report["revision"]] if report["revision"] else [])]
    else:
        source = [fingerprint(field.input_ids.numpy().tobytes())]
    identity = EmbeddingIdentity(
        weights=_tower_key(encoder, tower),
        catalog=fingerprint(catalog.item_ids.to_pylist()),
        modality=tower,
        source=fingerprint(source),
    )
    folder = catalog.cache_path(f"features-{tower}-{fingerprint(identity.to_json())}", "manifest.json")
    has = field.has

    @torch.inference_mode()
    def encode(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parts = []
        for start in range(0, len(rows), 128):
            values = field.take(torch.from_numpy(rows[start : start + 128])).to(accelerator.device)
            with accelerator.autocast():
                features = encoder.encode_image(values) if tower == "image" else encoder.encode_text(values)
            parts.append(features.float().cpu())
        return torch.cat(parts).numpy(), has[rows]

    if not (folder / "manifest.json").is_file():
        logger.info(f"the {tower} tower is frozen: features of {int(has.sum())} items are computed once, into {folder}")
    was_training = encoder.training
    encoder.eval()
    write_embeddings(
        folder,
        catalog.item_ids,
        None,
        encode,
        identity,
        shard_size=1024,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        wait=accelerator.wait_for_everyone,
    )
    encoder.train(was_training)
    features, _ = EmbeddingTable.read(folder).aligned(catalog.item_ids)
    return replace(field, features=features)


def _tower_key(encoder: EncoderBase, tower: str) -> str:
    """A fingerprint of the weights, the architecture and the pixel preparation of a tower, which does not depend on the
    other tower."""
    other = {id(p) for p in encoder.tower_parameters("text" if tower == "image" else "image")}
    weights = [
        fingerprint(name, value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for name, value in encoder.state_dict(keep_vars=True).items()
        if id(value) not in other
    ]
    pixels = [encoder.image_size, encoder.image_mean.flatten().tolist(), encoder.image_std.flatten().tolist()]
    return fingerprint(type(encoder).__name__, [str(module) for module in encoder.tower(tower)], weights, pixels)
