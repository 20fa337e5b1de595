"""Pretraining that is spread over processes: FSDP2, and DeepSpeed where it is installed.

Accelerate spreads nothing on CPUs, though torch and DeepSpeed can. Run as a program, this file starts a recipe with an
accelerator that does.
"""

from __future__ import annotations

import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator, PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin, patch_environment
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch import nn
from torch.distributed.fsdp import FSDPModule

from mmctr.layers.row_table import RowTable
from mmctr.tasks import PretrainTask
from mmctr.training.sharding import Sharding, set_up_sharding
from tests.helpers.tiny import (
    ARCHITECTURE,
    CLONE,
    Run,
    all_ok,
    finetune_values,
    losses,
    pretrain_values,
    start,
    write_config,
)
from tests.test_distributed import check_same_run

FSDP: dict[str, Any] = {"fsdp_version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
MIXED = {
    "encoder": {
        "name": "openclip",
        "architecture": ARCHITECTURE,
        "text": "lora",
        "channels_last": True,
        "gradient_checkpointing": True,
    },
    "projection": {"dim": 8, "hidden": [12]},
    "objectives": {"siglip": {}, "behavior": {}},
    "queue": {"size": 40, "momentum": 0.5},
}
FROZEN = {
    "encoder": {"name": "openclip", "architecture": ARCHITECTURE, "image": "frozen", "layer_decay": 0.8},
    "projection": {"dim": 8},
    "objectives": {"siglip": {}},
}


class CpuFsdp(Accelerator):
    def __init__(self, **given):
        super().__init__(**given)
        PartialState._shared_state["distributed_type"] = self.state.distributed_type = DistributedType.FSDP
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin(**FSDP)

    def prepare(self, *given):
        task, optimizer = super().prepare(*given)
        parameters = list(task.parameters())
        share = sum(p.to_local().numel() for p in parameters) / sum(p.numel() for p in parameters)
        groups = sum(isinstance(module, FSDPModule) for module in task.modules())
        print(f"{share:.1f} of the weights, in {groups} groups")
        return task, optimizer


class CpuDeepSpeed(Accelerator):
    def __init__(self, **given):
        super().__init__(**given)
        PartialState._shared_state["distributed_type"] = self.state.distributed_type = DistributedType.DEEPSPEED
        plugin = DeepSpeedPlugin(zero_stage=2)
        plugin.set_mixed_precision(self.state._mixed_precision)
        plugin.select(_from_accelerator_state=True)
        self.state.deepspeed_plugins, self.state._mixed_precision = {"default": plugin}, "no"
        self.native_amp, self.deepspeed_engine_wrapped = False, None


def pretrain(folder: Path, name: str, kind: str | None, config: Path, *arguments: str, **given: Any) -> Run:
    """One plain process without a `kind`, two processes with one."""
    command = ("pretrain.train", config, f"run_dir={folder / name}", *arguments)
    if kind is None:
        return start(folder, *command, **given)
    return start(folder, "tests.training.test_sharding", kind, *command, processes=2, **given)


KINDS = [
    "fsdp",
    pytest.param("deepspeed", marks=pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")),
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_spread_run_equals_one_process_and_goes_on_when_killed(toy_folder, tmp_path, kind):
    """With adapters, layers computed again, convolutions in another layout, a queue with an encoder of its own."""
    values = pretrain_values(toy_folder, **MIXED)
    values["fit"] |= {"epochs": 2, "optimizer": {"lr": 1e-3}, "max_grad_norm": 0.5}
    config = write_config(tmp_path / "p.yaml", values)
    two = pretrain(tmp_path, "two", kind, config)
    all_ok([pretrain(tmp_path, "one", None, config), two])
    text = two.text
    check_same_run(tmp_path / "one", tmp_path / "two", count=len(losses(tmp_path / "one")))
    if kind == "fsdp":  # a layer each of two towers and of two that follow, and the rest
        assert "0.5 of the weights, in 5 groups" in text, text

    assert pretrain(tmp_path, "killed", kind, config, kill_at_rename=10).wait() != 0
    reached = list((tmp_path / "killed" / "checkpoints").glob("step-*"))
    assert len(reached) == 1 and len(losses(tmp_path / "killed")) < len(losses(tmp_path / "two"))
    pretrain(tmp_path, "killed", kind, config).ok()
    assert losses(tmp_path / "killed") == losses(tmp_path / "two")
    for name in ("model.safetensors", "metrics.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert PretrainTask.load(tmp_path / "two").objectives["siglip"].logit_bias.shape == ()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_tower_and_a_temperature_at_its_bound(toy_folder, tmp_path, kind):
    values = pretrain_values(toy_folder, **FROZEN)
    # the first step goes beyond the bound, the second one comes back from it
    values["fit"]["optimizer"] = {"lr": 1e-3, "groups": {"temperatures": {"lr": 3.0}}}
    config = write_config(tmp_path / "p.yaml", values)
    all_ok([pretrain(tmp_path, name, given, config) for name, given in (("one", None), ("two", kind))])
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert max(one) > 100  # some are large: relative differences
    np.testing.assert_allclose(two, one, rtol=1e-5)


def launched(name: str, mixed_precision: str = "bf16") -> Any:
    """What `accelerate launch` makes of a config, as far as `set_up_sharding` looks at it."""
    parser = launch_command_parser()
    arguments = parser.parse_args(["--config_file", str(CLONE / "configs" / "accelerate" / name), "-m", "x"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    state = SimpleNamespace()
    if arguments.use_fsdp:
        with patch_environment(**prepare_multi_gpu_env(arguments)):
            state.fsdp_plugin = FullyShardedDataParallelPlugin()
        state.fsdp_plugin.set_mixed_precision(mixed_precision)
        distributed_type = DistributedType.FSDP
    else:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        with patch_environment(**prepare_deepspeed_cmd_env(arguments)[1]):
            state.deepspeed_plugin = DeepSpeedPlugin()
        state.deepspeed_plugin.set_mixed_precision(mixed_precision)
        distributed_type = DistributedType.DEEPSPEED
    return SimpleNamespace(
        state=state, distributed_type=distributed_type, mixed_precision=mixed_precision, num_processes=2
    )


def test_the_configs_are_what_accelerate_launch_reads():
    fsdp = launched("fsdp2.yaml")
    set_up_sharding(fsdp)
    plugin = fsdp.state.fsdp_plugin
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert "transformer" in plugin.auto_wrap_policy.__name__
    assert plugin.mixed_precision_policy.param_dtype is None  # autocast's business

    deepspeed = launched("deepspeed.yaml")
    set_up_sharding(deepspeed)
    Sharding(nn.Linear(2, 2), deepspeed, batch_size=20, max_grad_norm=None)
    config = deepspeed.state.deepspeed_plugin.deepspeed_config
    assert config["zero_optimization"]["stage"] == 2 and config["torch_autocast"]["enabled"]
    assert config["train_micro_batch_size_per_gpu"] == 10 and config["gradient_clipping"] == 0


@pytest.mark.parametrize("name", ["fsdp2.yaml", "deepspeed.yaml"])
def test_what_cannot_be_spread_is_refused(name):
    accelerator = launched(name)
    with pytest.raises(ValueError, match=r"are for pretrain.train"):
        Sharding(nn.Sequential(RowTable(3, 2, 0.1)), accelerator, batch_size=2)
    with pytest.raises(ValueError, match=r"fit.chunk_size"):
        Sharding(nn.Linear(2, 2), accelerator, batch_size=2, chunk_size=1)
    compiled = nn.Linear(2, 2)
    compiled.compile()
    with pytest.raises(ValueError, match=r"encoder\.compile"):
        Sharding(compiled, accelerator, batch_size=2)
    accelerator.mixed_precision = "fp16"
    with pytest.raises(ValueError, match="fp16"):
        set_up_sharding(accelerator)
    if name == "fsdp2.yaml":
        accelerator.state.fsdp_plugin.fsdp_version = 1
    else:
        accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"] = 3
    with pytest.raises(ValueError, match=r"the Accelerate config needs (fsdp_version|zero_stage): 2"):
        set_up_sharding(accelerator)


@pytest.mark.slow
def test_ranking_under_fsdp_is_one_line(toy_folder, tmp_path):
    config = write_config(tmp_path / "f.yaml", finetune_values(toy_folder))
    command = ("tests.training.test_sharding", "fsdp", "finetune.train", config, f"run_dir={tmp_path / 'run'}")
    run = start(tmp_path, *command, processes=2)
    assert run.wait() == 1, run.text
    assert len(run.errors) == 2 and all("FSDP and DeepSpeed are for pretrain.train" in line for line in run.errors)


if __name__ == "__main__":
    import accelerate

    os.environ["DS_ACCELERATOR"] = "cpu"
    kind, *sys.argv = sys.argv[1:]
    accelerate.Accelerator = {"fsdp": CpuFsdp, "deepspeed": CpuDeepSpeed}[kind]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
