"""`mmctr embed`: embeds a whole catalog with the encoder of a finished run."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from mmctr.data.content import ItemContent
from mmctr.data.embedding_export import begun_identity, new_rows, write_embeddings
from mmctr.data.embedding_identity import EmbeddingIdentity
from mmctr.data.embeddings import EmbeddingTable, read_items
from mmctr.data.images import REMEDIES
from mmctr.data.stream import StreamContent
from mmctr.data.tables import as_text
from mmctr.distributed import start_processes
from mmctr.evaluation.predict import Modality, embed_batch, embed_items
from mmctr.files import fingerprint
from mmctr.locks import hold, release
from mmctr.run_folder import RunFolder
from mmctr.runs.behavior_splits import behavior_splits_of_run
from mmctr.runs.content import item_content, open_data
from mmctr.runs.finished import load_encoder
from mmctr.runs.folder import data_config
from mmctr.runs.launch import keep_heap
from mmctr.runs.precision import Precision, choose, lower
from mmctr.runs.pretrain_data import stream_content
from mmctr.tasks import PretrainTask

logger = logging.getLogger(__name__)

MEASURED = 32
"""items of a batch on which precisions are compared"""


def embed_run(
    run: str,
    out: str,
    data: str | None,
    modality: Modality,
    shard_size: int,
    precision: Precision | Literal["auto"] = "fp32",
    append: bool = False,
) -> EmbeddingTable | None:
    """Write the vectors of a catalog into an embedding folder; every process of a launch writes some of the shards.

    Args:
        run: folder of `pretrain.train`.
        out: the embedding folder; an unfinished folder of the same run and catalog is continued.
        data: dataset folder; None: the dataset of the run.
        modality: the part of the content to encode.
        shard_size: items of a shard.
        precision: precision of the towers. "auto": the precision of an unfinished folder, else the fastest precision
            with nearly the same vectors (`mmctr.runs.precision.choose`), which the main process measures on items of
            the catalog.
        append: encode only the items that `out`, a folder of an earlier state of the catalog, lacks.

    Returns:
        With `append`, on the main process, the table of the new items; None otherwise.

    Raises:
        ValueError: the run or the dataset cannot be read, `out` holds other vectors, or another process writes
            into that folder.
    """
    accelerator = start_processes()
    if accelerator.is_main_process:
        hold(Path(out))
    keep_heap()
    folder = Path(run)
    task = load_encoder(folder).to(accelerator.device)
    if precision != "fp32":  # stored features of frozen towers are in fp32
        task.encoder.modes = dict.fromkeys(task.encoder.modes, "full")
    config = data_config(folder, data)
    titles = part = None
    if config.stream is not None:
        content = stream_content(config, task)
        item_ids = content.items.item_ids()
        position = np.arange(len(item_ids))
    else:
        dataset = open_data(config, accelerator)
        item_ids = dataset.catalog.item_ids
        if "title" in dataset.catalog.table.column_names:
            titles = as_text(dataset.catalog.table.column("title")).to_pylist()
        position = np.arange(len(item_ids))
        if append:  # pictures and texts of the other items are not even looked at
            rows = new_rows(Path(out), item_ids)
            part = dataset.catalog.part(rows)
            dataset = replace(dataset, catalog=part)
            position[rows] = np.arange(len(rows))
        content = None
        if part is None or len(part):
            content = item_content(dataset, config, task, accelerator)
    facts = None
    if precision == "auto":
        num_items = len(item_ids) if part is None else len(part)
        precision, facts = _chosen_precision(task, content, num_items, modality, Path(out), accelerator)
    lower(task, precision)
    identity = EmbeddingIdentity(
        run=str(folder.resolve()),
        data=str(Path(config.path).resolve()),
        weights=RunFolder(folder).weights_fingerprint(),
        catalog=fingerprint(item_ids.to_pylist()),
        modality=modality,
        item_vector=task.config.item_vector,
        shard_size=shard_size,
        precision=None if precision == "fp32" else precision,
        behavior_splits=behavior_splits_of_run(folder) or None,
    )
    has_id = np.asarray(item_ids.is_valid())  # a row of a shard may have no id

    def encode(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logger.info(f"items {rows[0]}-{rows[-1]} of {len(item_ids)}")
        assert content is not None, "without new items nothing is encoded"
        vectors, has = embed_items(task, content, position[rows], accelerator.device, modality)
        return vectors, has & has_id[rows]

    new = write_embeddings(
        Path(out),
        item_ids,
        titles,
        encode,
        identity,
        append=append,
        facts=facts,
        shard_size=shard_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        wait=accelerator.wait_for_everyone,
    )
    if isinstance(content, StreamContent):  # pictures of shards are read on the way, by each process some
        for reason, entry in content.report.items():
            logger.warning(
                f"{entry['count']} items with the problem {reason!r}, like {entry['examples']}"
                + (f": {REMEDIES[reason]}" if reason in REMEDIES else "")
            )
    if accelerator.is_main_process:
        if part is not None:
            shutil.rmtree(part.folder, ignore_errors=True)
        manifest, _ = read_items(Path(out))
        logger.info(f"{out}: {manifest['vectors']} vectors, {manifest['without content']} items without content")
        release(Path(out))
    return new


@torch.inference_mode()
def _chosen_precision(
    task: PretrainTask, content: Any, num_items: int, modality: Modality, out: Path, accelerator: Accelerator
) -> tuple[Precision, dict[str, Any] | None]:
    """The precision that "auto" stands for, the same in every process, and the measured rates and cosines, None where
    an unfinished folder gives the precision."""
    result: list[Any] = [None, None]
    if accelerator.is_main_process:
        begun, _ = begun_identity(out)
        if begun is not None:
            result[0] = begun.precision or "fp32"
            logger.info(f"precision {result[0]}: as in {out}")
        else:
            # items spread over a catalog in memory; of a stream the first items, which are in one row group
            last = num_items - 1 if isinstance(content, ItemContent) else min(num_items, 2 * MEASURED) - 1
            rows = torch.from_numpy(np.unique(np.linspace(0, last, 2 * MEASURED).astype(np.int64)))
            batches = [content.batch(part).to(accelerator.device) for part in rows.split(MEASURED)]
            measured = choose(task, batches, lambda lowered, items: embed_batch(lowered, items, modality))
            logger.info(measured)
            result = [measured.precision, measured.facts()]
    if accelerator.num_processes > 1:
        broadcast_object_list(result)
    chosen, facts = result
    return chosen, facts
