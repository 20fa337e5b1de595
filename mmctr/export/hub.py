"""Folders that hold a finished model and its card, and their upload to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from mmctr.tasks.sharing import Shareable, loading_code


def export_run(source: str, out: str, data: str | None = None, int8: bool = False) -> list[str]:
    """Write a run folder of either kind as `save_pretrained` does; returns what there is to say."""
    if int8:
        raise ValueError("--int8 is for --format onnx: a pretrained folder holds the weights as they were trained")
    if data is not None:
        raise ValueError("--data is for --format onnx: a pretrained folder holds no dataset")
    task = load_task(source)
    task.save_pretrained(out, run=source)
    return [f"{out}: load it with {loading_code(task, out)}"]


def push_run(source: str, repo_id: str, private: bool) -> list[str]:
    """Upload a run folder of either kind; returns what there is to say."""
    task = load_task(source)
    lines = [task.push_to_hub(repo_id, run=source, private=private or None)]
    vocabulary = getattr(task, "vocabulary", None)
    if vocabulary is not None:
        lines.append(f"note: it holds the ids of {len(vocabulary.user_ids)} users and {len(vocabulary.item_ids)} items")
    return lines


def load_task(source: str | Path) -> Shareable:
    """The task of a run folder, whichever kind it is. Raises ValueError when it is none."""
    from mmctr.tasks import PretrainTask, RankingTask
    from mmctr.tasks.folder import task_kind

    return (PretrainTask if task_kind(Path(source)) == "pretrain" else RankingTask).load(source)
