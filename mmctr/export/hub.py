"""Export of a finished run as a folder with a model card, and upload to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from mmctr.tasks.sharing import Shareable, loading_code


def export_run(source: str, out: str, data: str | None = None, int8: bool = False) -> list[str]:
    """Write the task of a run as a folder with a model card (`save_pretrained`).

    Args:
        source: run folder of either kind.
        out: the folder to write.
        data: must be None; only the ONNX export has the option.
        int8: must be False; only the ONNX export has the option.

    Returns:
        Lines for the user.

    Raises:
        ValueError: the run is not finished, or an option of the ONNX export is given.
    """
    if int8:
        raise ValueError("--int8 is for --format onnx: a pretrained folder holds the weights as they were trained")
    if data is not None:
        raise ValueError("--data is for --format onnx: a pretrained folder holds no dataset")
    task = load_task(source)
    task.save_pretrained(out, run=source)
    return [f"{out}: load it with {loading_code(task, out)}"]


def push_run(source: str, repo_id: str, private: bool) -> list[str]:
    """Upload the task of a run to the Hugging Face Hub.

    Args:
        source: run folder of either kind.
        repo_id: the repository, `org/name`.
        private: whether a new repository is private.

    Returns:
        Lines for the user.

    Raises:
        ValueError: the run is not finished, or the hub refuses the upload.
    """
    task = load_task(source)
    lines = [task.push_to_hub(repo_id, run=source, private=private or None)]
    vocabulary = getattr(task, "vocabulary", None)
    if vocabulary is not None:
        counts = f"{len(vocabulary.user_ids)} users and {len(vocabulary.item_ids)} items"
        lines.append(f"note: the repository holds the ids of {counts}")
    return lines


def load_task(source: str | Path) -> Shareable:
    """The task of a run folder of either kind.

    Raises:
        ValueError: the folder holds no finished run.
    """
    from mmctr.tasks import PretrainTask, RankingTask
    from mmctr.tasks.folder import task_kind

    return (PretrainTask if task_kind(Path(source)) == "pretrain" else RankingTask).load(source)
