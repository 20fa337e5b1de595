"""The ONNX graphs of a pretraining run: from a picture, a text, or both to the vector of an item."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmctr.data.batches import ItemBatch
from mmctr.export.onnx_graph import INT8_COSINE, Axis, Graph, Inputs, Port, Session, int8_entry, quantise, write_graph
from mmctr.run_folder import RunFolder
from mmctr.runs.finished import load_encoder
from mmctr.runs.folder import data_config
from mmctr.tasks import PretrainTask
from mmctr.tasks.item_features import unit

BATCH = Axis("B")
TEXTS: list[str] = ["a red striped shoe", "Blue linen shirt, size M", "x", "", "it's 100% cotton — naïve café"]


class ItemGraph(nn.Module):
    """The embedding of items as `PretrainTask.embed` computes it, from pictures, texts or both.

    Args:
        task: the pretrained task.
        embeds: whether the graph gives embeddings; False: it gives the features of one modality, for a task with
            separate towers without a common space.
    """

    def __init__(self, task: PretrainTask, embeds: bool = True):
        super().__init__()
        self.task, self.embeds = task, embeds

    def forward(self, inputs: Inputs) -> dict[str, Tensor]:
        """The vectors of B items.

        Args:
            inputs: `image` (B, 3, S, S) uint8, `input_ids` (B, T), or both with the masks `has_image` and `has_text`.

        Returns:
            `vector` (B, D), and with both modalities `has_content` (B,) bool.
        """
        image, input_ids = inputs.get("image"), inputs.get("input_ids")
        if image is not None and input_ids is not None:
            items = ItemBatch(
                row=inputs["has_image"].long(),
                image=image,
                has_image=inputs["has_image"],
                input_ids=input_ids,
                has_text=inputs["has_text"],
            )
            vector, has = self.task.embed(items)
            return {"vector": vector.float(), "has_content": has}
        values = image if image is not None else input_ids
        assert values is not None, "the graph reads a modality"
        mask = values.flatten(1)[:, 0] >= 0  # True for all items, in a shape that depends on the input
        if image is not None:
            items = ItemBatch(row=mask.long(), image=image, has_image=mask)
        else:
            items = ItemBatch(row=mask.long(), input_ids=values, has_text=mask)
        if self.embeds:
            return {"vector": self.task.embed(items)[0].float()}
        features = self.task.encode(items)
        return {"vector": unit(features.image if image is not None else features.text)}


def export_encoder(run: Path, out: Path, data: str | None, int8: bool) -> dict[str, Any]:
    """Write `image.onnx`, `text.onnx`, `item.onnx` and the tokenizer of a pretraining run.

    Args:
        run: folder of `pretrain.train`.
        out: folder to write.
        data: dataset folder whose pictures are described; None: the dataset of the run.
        int8: whether to write graphs with int8 weights as well.

    Returns:
        The manifest.

    Raises:
        ValueError: the run is not finished, or a graph differs from torch.
    """
    task = load_encoder(run).requires_grad_(False)
    config = data_config(run, data, is_read=data is not None)
    size = config.image_size or task.encoder.image_size
    embeds, left_out = True, {}
    try:
        task.require_space(objectives=False)
    except ValueError as error:
        embeds = False
        left_out["item.onnx"] = str(error)
    drawn = drawn_inputs(task, size)
    graphs = {}
    for graph in graphs_of(task, drawn, embeds):
        checks = []
        for count in (1, 2, len(drawn["input_ids"])):
            inputs = {name: drawn[name][-count:] for name in graph.inputs}
            with torch.no_grad():
                checks.append((inputs, graph.module(inputs)))
        entry = write_graph(graph, out, checks)
        if int8:
            entry["int8"] = _int8(out / f"{graph.name}.onnx", {name: drawn[name] for name in graph.inputs})
        graphs[f"{graph.name}.onnx"] = entry
    return {
        "graphs": graphs,
        "left_out": left_out,
        "weights": RunFolder(run).weights_fingerprint(),
        "vector": _vector_facts(task, embeds),
        "pictures": {
            "size": size,
            "resize": config.image_resize,
            "how": "RGB, EXIF rotation applied, transparency on white. shortest: the centre square, scaled; longest: "
            "scaled and padded with white; squash: both sides scaled. Bicubic with antialiasing, rounded to 0 ... 255",
            "mean": task.encoder.image_mean.flatten().tolist(),
            "std": task.encoder.image_std.flatten().tolist(),
            "normalisation": "inside the graph: (pixel / 255 - mean) / std",
        },
        "tokenizer": tokenizer_facts(task, out),
    }


def graphs_of(task: PretrainTask, example: Inputs, embeds: bool) -> list[Graph]:
    """The graphs of a task: image, text and, where the task has embeddings of items, item.

    Args:
        task: the pretrained task.
        example: example inputs of `drawn_inputs`.
        embeds: whether embeddings need no common space of pictures and texts, or have one.
    """
    size, length = example["image"].shape[-1], example["input_ids"].shape[1]
    ports = {
        "image": Port([BATCH, 3, size, size], "uint8", "RGB pixels, channels first"),
        "has_image": Port([BATCH], "bool", "false: the picture is not read; give zeros"),
        "input_ids": Port([BATCH, length], "int64", "tokens, padded; see tokenizer"),
        "has_text": Port([BATCH], "bool", "false: the text is not read"),
    }
    vectors = {"image": task.dims[0], "text": task.dims[1]} if not embeds else {}
    graphs = []
    for name, read in (("image", ["image"]), ("text", ["input_ids"]), ("item", list(ports))):
        if name == "item" and not embeds:
            continue
        outputs = {"vector": Port([BATCH, vectors.get(name, task.embedding_dim)], "float32", "see vector")}
        if name == "item":
            outputs["has_content"] = Port([BATCH], "bool", "whether there is a picture or a text")
        module = ItemGraph(task, embeds)
        graphs.append(Graph(name, module, example, {port: ports[port] for port in read}, outputs))
    return graphs


def drawn_inputs(task: PretrainTask, size: int, count: int = 24) -> Inputs:
    """Random smooth pictures and example texts, with all combinations of present and missing modalities.

    Args:
        task: the pretrained task, for the tokens.
        size: side of the pictures in pixels.
        count: number of items.
    """
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)
    noise = 0.1 * torch.randn(smooth.shape, generator=generator)
    texts = [f"{TEXTS[item % len(TEXTS)]} {item}" if item % 5 != 3 else "" for item in range(count)]
    number = torch.arange(count)
    return {
        "image": ((smooth + noise).clamp(0, 1) * 255).round().to(torch.uint8),
        "has_image": number % 3 != 1,
        "input_ids": task.encoder.tokenize(texts).long(),
        "has_text": number % 4 != 2,
    }


def _vector_facts(task: PretrainTask, embeds: bool) -> dict[str, Any]:
    """The entry of the manifest on the output vector."""
    if not embeds:
        meaning = "unit-norm features of one modality, as `mmctr embed` makes with --modality"
    elif task.head is not None:
        meaning = "mean of the latents of the variational head, not of unit norm"
    else:
        meaning = f"unit norm; {task.config.item_vector} of the features there are"
    return {"is": meaning, "dim": task.embedding_dim if embeds else list(task.dims)}


def tokenizer_facts(task: PretrainTask, out: Path) -> dict[str, Any]:
    """The entry of the manifest on the tokenizer; a tokenizer of transformers is written into the folder `out`."""
    encoder: Any = task.encoder
    tokenizer = getattr(encoder, "_tokenizer", None) or encoder.tokenizer
    hf = getattr(tokenizer, "tokenizer", None) or getattr(tokenizer, "hf", None)
    rows = encoder.tokenize(TEXTS).long()
    facts: dict[str, Any] = {
        "length": rows.shape[1],
        "examples": [{"text": text, "input_ids": row.tolist()} for text, row in zip(TEXTS, rows, strict=True)],
    }
    if hf is not None and hasattr(hf, "save_pretrained"):
        hf.save_pretrained(out / "tokenizer")
        return {
            "kind": "transformers",
            "files": "tokenizer/",
            "how": f"pad to {rows.shape[1]} tokens and cut off there, special tokens added",
            **facts,
        }
    return {
        "kind": "clip bpe",
        "how": "CLIP's byte pair encoding (bpe_simple_vocab_16e6, 49408 tokens) on lower-cased text with entities and "
        "white space cleaned; <start_of_text> before, <end_of_text> behind, zeros up to the length; too long: cut off, "
        "the last token is <end_of_text>",
        **facts,
    }


def _int8(path: Path, inputs: Inputs) -> dict[str, Any]:
    """Write a graph with int8 weights, and compare the vectors; the entry of the manifest."""
    quantised = quantise(path)
    exact, rough = (Session(p)(inputs)["vector"] for p in (path, quantised))
    masks = [name for name in ("has_image", "has_text") if name in inputs]
    has = np.ones(len(exact), bool) if not masks else np.any([inputs[name].numpy() for name in masks], axis=0)
    cosine = cosines(exact[has], rough[has])
    differences = {"min_cosine": float(cosine.min()), "mean_cosine": float(cosine.mean())}
    warning = ""
    if differences["min_cosine"] < INT8_COSINE:
        warning = f"int8 changes these vectors much (cosine down to {differences['min_cosine']:.4f}); use fp32"
    return {
        **int8_entry(quantised, differences, warning),
        "measured_on": f"{int(has.sum())} drawn pictures and texts",
    }


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The cosines (n,) of the rows of two matrices (n, D)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-30)
