"""Models that other libraries manage: refused with what to do, never taken for models without values."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import accelerate.hooks
import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import zero
from gemini import GeminiConfig, GeminiDDP, ModelError

CONFIG = GeminiConfig(device="cpu", dtype=torch.float32, host_budget="64MiB", num_threads=1)
LLAMA = transformers.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
)
IDS = torch.arange(16).view(2, 8)


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


# ---------------------------------------------------------------------- accelerate and diffusers


def cpu_offloaded(model: nn.Module, directory: Path) -> None:
    accelerate.cpu_offload(model, execution_device="cpu")


def disk_offloaded(model: nn.Module, directory: Path) -> None:
    accelerate.disk_offload(model, str(directory), execution_device="cpu")


def moved_whole(model: nn.Module, directory: Path) -> None:
    accelerate.cpu_offload_with_hook(model, execution_device="cpu")


def only_moving_inputs(model: nn.Module, directory: Path) -> None:
    accelerate.hooks.attach_execution_device_hook(model, "cpu")


def cast_by_layers(model: nn.Module, directory: Path) -> None:
    accelerate.big_modeling.attach_layerwise_casting_hooks(model, torch.float8_e4m3fn, torch.float32)


def with_a_second_hook(model: nn.Module, directory: Path) -> None:
    accelerate.hooks.add_hook_to_module(model.lm_head, accelerate.hooks.ModelHook())  # type: ignore[arg-type]
    hook = accelerate.hooks.AlignDevicesHook(execution_device="cpu")
    accelerate.hooks.add_hook_to_module(model.lm_head, hook, append=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "offload",
    [cpu_offloaded, disk_offloaded, moved_whole, only_moving_inputs, cast_by_layers, with_a_second_hook],
)
def test_a_model_with_moving_hooks_of_accelerate_is_refused_by_module(
    offload: Callable[[nn.Module, Path], None], tmp_path: Path
) -> None:
    model = transformers.LlamaForCausalLM(LLAMA)
    offload(model, tmp_path)
    with pytest.raises(ModelError, match=r"(the model|module [\w.]+) has a hook of accelerate .*device_map"):
        GeminiDDP(model, CONFIG)


def test_a_model_whose_hooks_were_removed_keeps_its_values(tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM(LLAMA)
    right = {name: value.clone() for name, value in model.state_dict().items()}
    disk_offloaded(model, tmp_path)
    accelerate.hooks.remove_hook_from_submodules(model)
    with GeminiDDP(model, CONFIG) as engine:
        found = engine.state_dict()
    assert found.keys() == right.keys()
    assert all(torch.equal(found[name], right[name]) for name in right)


def test_hooks_that_move_nothing_stay() -> None:
    class Counting(accelerate.hooks.ModelHook):
        num_calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.num_calls += 1
            return args, kwargs

    model, hook = two_layers(), Counting()
    accelerate.hooks.add_hook_to_module(model[0], hook)
    with GeminiDDP(model, CONFIG) as engine:
        engine(torch.ones(2, 8))
    assert hook.num_calls == 1


@pytest.fixture
def on_disk(tmp_path: Path) -> tuple[nn.Module, Path, dict[str, torch.Tensor]]:
    """Return a model that transformers has left on disk in part, its checkpoint, and its values."""
    plain = transformers.LlamaForCausalLM(LLAMA)
    plain.save_pretrained(tmp_path / "model")
    devices = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    devices["model.rotary_emb"] = "cpu"
    model = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "model", device_map=devices, offload_folder=tmp_path / "offload"
    )
    return model, tmp_path / "model", plain.state_dict()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_values_left_on_disk_are_never_initialised_at_random(
    on_disk: tuple[nn.Module, Path, dict[str, torch.Tensor]],
) -> None:
    model, directory, right = on_disk
    with pytest.raises(ModelError, match=r"module model.layers.0.self_attn.q_proj has a hook of accelerate"):
        GeminiDDP(model, CONFIG)
    accelerate.hooks.remove_hook_from_submodules(model)
    with pytest.raises(ModelError, match=r"parameter model.layers.0.[\w.]+ is on the meta device .*hf_device_map"):
        GeminiDDP(model, CONFIG)
    with GeminiDDP(model, CONFIG, weights=directory) as engine:
        found = engine.state_dict()
    assert all(torch.equal(found[name], right[name]) for name in right)


@pytest.mark.parametrize("hook", ["group_offloading", "layerwise_casting"])
def test_a_model_with_moving_hooks_of_diffusers_is_refused(hook: str) -> None:
    model = two_layers()
    model[1]._diffusers_hook = types.SimpleNamespace(hooks={hook: object()})  # type: ignore[assignment]
    with pytest.raises(ModelError, match=rf"module 1 has a hook of diffusers \({hook}\)"):
        GeminiDDP(model, CONFIG)


# ---------------------------------------------------------------------- other owners


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def in_ddp(mesh: DeviceMesh) -> nn.Module:
    return nn.parallel.DistributedDataParallel(two_layers())


def around_ddp(mesh: DeviceMesh) -> nn.Module:
    return nn.Sequential(nn.parallel.DistributedDataParallel(two_layers()), nn.Linear(8, 8))


def fully_sharded(mesh: DeviceMesh) -> nn.Module:
    model = two_layers()
    fully_shard(model[1], mesh=mesh)
    return model


def replicated(mesh: DeviceMesh) -> nn.Module:
    model = two_layers()
    replicate(model[1])
    return model


def in_fsdp(mesh: DeviceMesh) -> nn.Module:
    return FullyShardedDataParallel(two_layers(), device_id=torch.device("cpu"))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (in_ddp, "the model is a DistributedDataParallel of torch.* pass its .module"),
        (around_ddp, "module 0 is a DistributedDataParallel"),
        (fully_sharded, "module 1 is a FSDPModule of torch.* without fully_shard"),
        (replicated, "module 1 .*replicate"),
        (in_fsdp, "the model is a FullyShardedDataParallel of torch"),
        (lambda mesh: nn.DataParallel(two_layers()), "the model is a DataParallel"),
    ],
)
@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_model_that_torch_shares_among_ranks_is_refused(
    wrap: Callable[[DeviceMesh], nn.Module], message: str, is_sharded: bool, mesh: DeviceMesh
) -> None:
    model = wrap(mesh)
    build = partial(zero.shard, mesh=mesh) if is_sharded else GeminiDDP
    with pytest.raises(ModelError, match=message):
        build(model, CONFIG)


@pytest.mark.parametrize(("package", "name"), [("deepspeed", "DeepSpeedEngine"), ("fairscale", "ShardedDataParallel")])
def test_wrappers_of_libraries_that_are_not_there_are_known_by_name(package: str, name: str) -> None:
    kind = type(name, (nn.Module,), {"__module__": f"{package}.runtime.engine"})
    assert package not in sys.modules
    model = kind()
    model.module = two_layers()
    with pytest.raises(ModelError, match=f"the model is a {name} of {package}"):
        GeminiDDP(model, CONFIG)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize("is_inside", [False, True])
@pytest.mark.parametrize("compile_it", [torch.jit.script, partial(torch.jit.trace, example_inputs=torch.ones(1, 8))])
def test_a_torchscript_module_is_refused(compile_it: Callable[[nn.Module], nn.Module], is_inside: bool) -> None:
    model = compile_it(two_layers())
    with pytest.raises(ModelError, match="(the model|module 0) is a TorchScript module"):
        GeminiDDP(nn.Sequential(model, nn.Linear(8, 8)) if is_inside else model, CONFIG)


def test_a_parameter_of_deepspeeds_is_refused_by_name() -> None:
    model = two_layers()
    model[1].bias.ds_id = 3
    with pytest.raises(ModelError, match=r"parameter 1.bias is managed by DeepSpeed .*ds_id"):
        GeminiDDP(model, CONFIG)
