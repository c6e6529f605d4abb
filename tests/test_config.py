"""Configuration: each bad value is refused at once, by name, with what was found and what is expected."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gemini import ChunkManager, ConfigError, GeminiConfig, GeminiDDP, MemoryTier, NVMeConfig, StaticPlacement
from gemini.offload.resources import budgets_of, device_of

BAD_BYTES = ["6 XiB", "-1GiB", 0, 1.5, True, ""]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dtype", "float32", "expected one of torch.bfloat16, torch.float16, torch.float32, got 'float32'"),
        ("dtype", torch.float64, "expected one of .* got torch.float64"),
        ("dtype", None, "expected one of .* got None"),
        ("nvme", "/tmp", "expected an NVMeConfig or None, got '/tmp'"),
        ("placement", "gpu", "expected \"auto\", a StaticPlacement or a PlacementPlan, got 'gpu'"),
        ("placement", None, "expected .* got None"),
        ("gradient_accumulation", 4, "expected True or False, got 4"),
        ("prefetch_depth", -1, "expected an int from 0 to 64, got -1"),
        ("prefetch_depth", 65, "expected an int from 0 to 64, got 65"),
        ("prefetch_depth", True, "expected an int from 0 to 64, got True"),
        ("ring_depth", 1, "expected an int from 2 to 64, got 1"),
        ("ring_depth", 2.0, "expected an int from 2 to 64, got 2.0"),
        ("tile_numel", 4095, "expected an int from 4096 to 268435456, got 4095"),
        ("tile_numel", 4097, "expected a multiple of 4096, got 4097"),
        ("tile_numel", 2**29, "expected an int from 4096 to 268435456, got 536870912"),
        ("num_threads", 0, "expected an int from 1 to 1024, got 0"),
        ("num_threads", "2", "expected an int from 1 to 1024, got '2'"),
        ("isa", "sse", 'expected "auto", "scalar", "avx2", "avx512" or "neon", got \'sse\''),
        ("initial_loss_scale", 3.0, "expected a power of two, got 3.0"),
        ("initial_loss_scale", 0.0, "expected a power of two, got 0.0"),
        ("initial_loss_scale", -2.0, "expected a power of two, got -2.0"),
        ("initial_loss_scale", float("inf"), "expected a power of two, got inf"),
        ("initial_loss_scale", float("nan"), "expected a power of two, got nan"),
        ("initial_loss_scale", "65536", "expected a power of two, got '65536'"),
        ("seed", "0", "expected an int from 0 to 4294967295, got '0'"),
        ("seed", -1, "expected an int from 0 to 4294967295, got -1"),
    ],
)
def test_a_bad_value_is_refused_by_name(field: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^GeminiConfig\.{field}: {message}"):
        GeminiConfig(**{field: value})


@pytest.mark.parametrize("field", ["device_budget", "host_budget", "activation_reserve"])
@pytest.mark.parametrize("value", BAD_BYTES)
def test_bad_bytes_are_refused_by_the_name_of_their_field(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^GeminiConfig\.{field}: "):
        GeminiConfig(**{field: value})


@pytest.mark.parametrize("scale", [1, 1.0, 2.0**16, 2.0**-4, 65536])
def test_every_power_of_two_is_a_loss_scale(scale: float) -> None:
    assert GeminiConfig(initial_loss_scale=scale).initial_loss_scale == scale


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("path", None, "expected a directory as a str or Path, got None"),
        ("path", 3, "expected a directory as a str or Path, got 3"),
        ("path", "", "expected a directory as a str or Path, got ''"),
        ("engine", "spdk", 'expected "auto", "io_uring", "aio" or "threads", got \'spdk\''),
        ("queue_depth", 0, "expected an int from 1 to 4096, got 0"),
        ("queue_depth", 4097, "expected an int from 1 to 4096, got 4097"),
        ("direct", "yes", "expected True or False, got 'yes'"),
        *(("budget", value, "") for value in BAD_BYTES),
        *(("endurance", value, "") for value in BAD_BYTES),
    ],
)
def test_a_bad_disk_value_is_refused_by_name(field: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^NVMeConfig\.{field}: {message}"):
        NVMeConfig(**{"path": "/tmp", "budget": "1GiB", field: value})


@pytest.mark.parametrize(
    ("endurance", "nbytes"),
    [
        ("600TBW", 600 * 10**12),
        ("1.2 pbw ", 1200 * 10**12),
        ("600TB", 600 * 10**12),
        (10**12, 10**12),
        (None, None),
    ],
)
def test_endurance_is_read_as_data_sheets_write_it(endurance: str | int | None, nbytes: int | None) -> None:
    assert NVMeConfig(path="/tmp", budget="1GiB", endurance=endurance).endurance_nbytes == nbytes


@pytest.mark.parametrize(("field", "value"), [("endurance", "600GBW"), ("endurance", "TBW"), ("budget", "600TBW")])
def test_bytes_written_are_endurance_alone_and_in_tera_and_petabytes(field: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"^NVMeConfig\.{field}: cannot read "):
        NVMeConfig(**{"path": "/tmp", "budget": "1GiB", field: value})


@pytest.mark.parametrize("field", ["param_device", "param_nvme", "state_device", "state_nvme", "grad_nvme"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), "1", None, True])
def test_a_bad_fraction_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^StaticPlacement\.{field}: expected a fraction from 0 to 1, got "):
        StaticPlacement(**{field: value})


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ({"param_device": 0.6, "param_nvme": 0.5}, r"param_device \+ param_nvme must not exceed 1, got 0.6 \+ 0.5"),
        (
            {"param_device": 1, "state_device": 0.6, "state_nvme": 0.5},
            r"state_device \+ state_nvme must not exceed 1, got 0.6 \+ 0.5",
        ),
        (
            {"param_device": 1, "state_device": 0.5, "grad_nvme": 0.6},
            r"state_device \+ grad_nvme must not exceed 1, got 0.5 \+ 0.6: gradients live where the state does",
        ),
        (
            {"param_device": 0.1, "state_device": 0.2},
            "state_device must not exceed param_device, got 0.2 and 0.1: the device updates in place",
        ),
    ],
)
def test_fractions_that_contradict_each_other_are_refused(fractions: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^StaticPlacement: {message}"):
        StaticPlacement(**fractions)


@pytest.mark.parametrize("kind", [GeminiConfig, NVMeConfig, StaticPlacement])
def test_an_unknown_keyword_is_a_type_error(kind: type) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'gpu_budget'"):
        kind(gpu_budget="1GiB")


@pytest.mark.parametrize("kind", [GeminiConfig, NVMeConfig])
def test_positional_arguments_are_a_type_error(kind: type) -> None:
    with pytest.raises(TypeError, match="positional argument"):
        kind("cpu")


def test_a_configuration_cannot_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GeminiConfig().ring_depth = 8  # type: ignore[misc]


# ---------------------------------------------------------------------- the machine


@pytest.mark.parametrize("device", ["gpu", "tpu:0", "", 1.5, "cuda:x"])
def test_an_unknown_device_is_refused(device: Any) -> None:
    with pytest.raises(ConfigError, match=r'^GeminiConfig\.device: expected "cuda", "cpu", "simulated" or None, got '):
        ChunkManager(GeminiConfig(device=device))


def test_a_device_torch_knows_and_we_do_not_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^GeminiConfig\.device: 'meta' devices are not supported; use cuda or cpu"):
        GeminiDDP(nn.Linear(2, 2), GeminiConfig(device="meta"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda", 1)])
def test_cuda_that_is_not_there_is_refused(device: str | torch.device) -> None:
    with pytest.raises(ConfigError, match=r"^GeminiConfig\.device: .*cuda.* was requested, but torch finds no CUDA"):
        GeminiDDP(nn.Linear(2, 2), GeminiConfig(device=device))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_no_device_given_and_none_there_is_the_cpu() -> None:
    assert device_of(GeminiConfig()) is None
    assert device_of(GeminiConfig(device="simulated")) is not None


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_a_device_budget_has_no_meaning_on_the_cpu(device: str | torch.device) -> None:
    message = r'^GeminiConfig: device_budget has no meaning with device="cpu", where host_budget is .* leave one'
    with pytest.raises(ConfigError, match=message):
        GeminiDDP(nn.Linear(2, 2), GeminiConfig(device=device, device_budget="1GiB"))


def test_budgets_are_the_bytes_asked_for(tmp_path: Path) -> None:
    config = GeminiConfig(
        device="simulated", device_budget="1MiB", host_budget=4096, nvme=NVMeConfig(path=tmp_path, budget="1GB")
    )
    assert budgets_of(config) == {
        MemoryTier.DEVICE: 1048576,
        MemoryTier.HOST: 4096,
        MemoryTier.NVME: 1000000000,
    }


def test_a_tier_that_is_not_there_has_no_budget() -> None:
    budgets = budgets_of(GeminiConfig(device="cpu"))
    assert budgets[MemoryTier.DEVICE] is None
    assert budgets[MemoryTier.NVME] is None
    assert budgets[MemoryTier.HOST] > 0  # type: ignore[operator]
