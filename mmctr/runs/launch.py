"""What both recipes do around training: the accelerator, the run folder, the command line."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration

from mmctr.config import Config
from mmctr.config_reference import compact_text, reference
from mmctr.errors import exit_on_error, show_progress
from mmctr.run_folder import RunFolder
from mmctr.runs.config import FinetuneConfig, PretrainConfig
from mmctr.runs.folder import begin_folder
from mmctr.shipped import RECIPES, recipe_module, shipped_configs
from mmctr.training.context import RunContext
from mmctr.training.fit import FitConfig
from mmctr.training.sharding import set_up_sharding


def start_run(config: FinetuneConfig | PretrainConfig) -> RunContext:
    """The processes of this launch, and the run folder, begun with the config or found to hold a run of it.

    Raises ValueError where the folder holds a run of another config.
    """
    folder = RunFolder(Path(config.run_dir))
    accelerator = make_accelerator(config.fit, folder)
    return RunContext(folder, accelerator, config.seed, begin_folder(config, folder, accelerator))


def make_accelerator(config: FitConfig, folder: RunFolder) -> Accelerator:
    """One accelerator for CPU or GPU, one or many processes. Buffers are equal by construction, so not broadcast."""
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=config.tracker,
        project_config=ProjectConfiguration(project_dir=str(folder.path), logging_dir=str(folder.tracker)),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    set_up_sharding(accelerator)
    keep_heap()
    if accelerator.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // accelerator.num_processes))
    if config.tracker:
        accelerator.init_trackers("mmctr", init_kwargs={})
    return accelerator


def keep_heap() -> None:
    """Tell glibc to keep large blocks mapped: on a CPU each big temporary would be page-faulted anew otherwise.

    Measured 1.3 times the training rate of DIN on ml-1m. Costs memory that was used once anyway. No-op elsewhere.
    """
    if sys.platform == "linux":
        try:
            mallopt = ctypes.CDLL("libc.so.6").mallopt
        except (OSError, AttributeError):  # another C library
            return
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, 0x7FFFFFFF)  # M_TRIM_THRESHOLD


def end_run(context: RunContext) -> None:
    """Finish trackers and leave the process group, all processes together.

    The main process still writes when the others are done. One that leaves alone is now and then aborted by gloo, and
    the launcher then stops the main one as well: 3 of 24 runs of two processes, 1 of 102 since they wait.
    """
    context.accelerator.wait_for_everyone()
    context.accelerator.end_training()


def recipe_help(module: ModuleType, config_class: type[Config]) -> str:
    """The docstring of a recipe and the reference of all keys of the config."""
    text = (module.__doc__ or "").strip()
    recipe = Path(str(module.__file__)).parent.name
    files: list[Path] = []
    if recipe in RECIPES:
        text = text.replace(f"-m {recipe}.train", f"-m {recipe_module(recipe)}")
        files = shipped_configs(recipe)
    width = min(shutil.get_terminal_size().columns, 120)
    keys = compact_text(reference(config_class, files), width)
    return f"{text}\n\nConfig keys; `mmctr config KEY` tells more of one.\n\n{keys}"


ConfigT = TypeVar("ConfigT", bound=Config)


def run_recipe(main: Callable[[ConfigT], Any], config_class: type[ConfigT], argv: list[str] | None = None) -> None:
    """`python -m RECIPE CONFIG.yaml [key=value ...]`. A user's mistake is one line on stderr, not a traceback."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(recipe_help(sys.modules[main.__module__], config_class))
        sys.exit(0 if arguments else 2)
    show_progress()
    with exit_on_error():
        main(config_class.load(arguments[0], arguments[1:]))
