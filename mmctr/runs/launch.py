"""The launch of both recipes: accelerator, run folder and command line."""

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
from mmctr.distributed import start_processes
from mmctr.errors import exit_on_error, show_progress, write_any_character
from mmctr.locks import hold, release
from mmctr.run_folder import RunFolder
from mmctr.runs.config import FinetuneConfig, PretrainConfig
from mmctr.runs.folder import begin_folder
from mmctr.shipped import RECIPES, recipe_module, shipped_configs
from mmctr.training.context import RunContext
from mmctr.training.fit import FitConfig
from mmctr.training.sharding import set_up_sharding


def start_run(config: FinetuneConfig | PretrainConfig) -> RunContext:
    """Start the processes of a run, and begin or continue the run folder.

    Raises:
        ValueError: the folder holds a run of another config, or another process works in the folder.
    """
    folder = RunFolder(Path(config.run_dir))
    accelerator = make_accelerator(config.fit, folder)
    if accelerator.is_main_process:
        hold(folder.path)
    return RunContext(folder, accelerator, config.seed, begin_folder(config, folder, accelerator))


def make_accelerator(config: FitConfig, folder: RunFolder) -> Accelerator:
    """The Accelerator of a run, for CPU or GPU, one or many processes.

    Buffers are equal in all processes by construction, and are not broadcast.

    Args:
        config: precision and tracker.
        folder: the run folder, which gets the files of the tracker.

    Raises:
        ValueError: an option of the Accelerate config is not supported.
    """
    accelerator = start_processes(
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
    """Let glibc keep large blocks of memory, which otherwise cause page faults at every large temporary tensor.

    This makes the training of DIN on ml-1m on a CPU 1.3 times as fast; the peak memory stays the same. With another C
    library or operating system nothing is done.
    """
    if sys.platform == "linux":
        try:
            mallopt = ctypes.CDLL("libc.so.6").mallopt
        except (OSError, AttributeError):  # another C library
            return
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, 0x7FFFFFFF)  # M_TRIM_THRESHOLD


def end_run(context: RunContext) -> None:
    """Finish the trackers and leave the process group, all processes together.

    The other processes wait for the main process, which writes longest: gloo sometimes aborts a process that leaves
    alone, and the launcher then stops the main process as well (3 of 24 runs of two processes; 1 of 102 with the wait).
    """
    context.accelerator.wait_for_everyone()
    context.accelerator.end_training()
    release(context.folder.path)


def recipe_help(module: ModuleType, config_class: type[Config]) -> str:
    """The help text of a recipe: the docstring and a reference of all config keys.

    Args:
        module: the module of the recipe.
        config_class: the config of the recipe.
    """
    text = (module.__doc__ or "").strip()
    recipe = Path(str(module.__file__)).parent.name
    files: list[Path] = []
    if recipe in RECIPES:
        text = text.replace(f"-m {recipe}.train", f"-m {recipe_module(recipe)}")
        files = shipped_configs(recipe)
    width = min(shutil.get_terminal_size().columns, 120)
    keys = compact_text(reference(config_class, files), width)
    return f"{text}\n\nConfig keys; `mmctr config KEY` describes a key.\n\n{keys}"


ConfigT = TypeVar("ConfigT", bound=Config)


def run_recipe(main: Callable[[ConfigT], Any], config_class: type[ConfigT], argv: list[str] | None = None) -> None:
    """Run a recipe from the command line, `python -m RECIPE CONFIG.yaml [key=value ...]`.

    A ValueError, a mistake of the user, is printed as one line on stderr, without a traceback.

    Args:
        main: the recipe.
        config_class: the config of the recipe.
        argv: arguments; None: those of the process.
    """
    arguments = sys.argv[1:] if argv is None else argv
    write_any_character()
    with exit_on_error():
        if not arguments or arguments[0] in ("-h", "--help"):
            print(recipe_help(sys.modules[main.__module__], config_class))
            sys.exit(0 if arguments else 2)
        show_progress()
        main(config_class.load(arguments[0], arguments[1:]))
