"""A DeepSpeed configuration becomes ours, or an error that names the key."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from gemini import ConfigError, GeminiConfig, GeminiDDP, HybridAdam, NVMeConfig


def infinity(nvme: Path) -> dict[str, Any]:
    """Return a configuration with everything on disk, as tutorials write it."""
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False, "loss_scale": 0, "initial_scale_power": 12},
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.8, 0.99], "eps": 1e-6}},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "stage3_prefetch_bucket_size": "auto",
            "offload_optimizer": {"device": "nvme", "nvme_path": str(nvme), "pin_memory": True, "buffer_count": 4},
            "offload_param": {"device": "nvme", "nvme_path": str(nvme), "buffer_size": 1e8},
        },
        "aio": {"block_size": 1048576, "queue_depth": 8, "single_submit": False},
    }


def test_zero_infinity_becomes_budgets_and_a_disk(tmp_path: Path) -> None:
    found = GeminiConfig.from_deepspeed(
        infinity(tmp_path), device_budget="6GiB", host_budget="16GiB", nvme_budget="100GiB"
    )
    assert found == GeminiConfig(
        dtype=torch.bfloat16,
        device_budget="6GiB",
        host_budget="16GiB",
        nvme=NVMeConfig(path=str(tmp_path), budget="100GiB", queue_depth=8),
        gradient_accumulation=True,
        initial_loss_scale=4096.0,
    )


def test_the_disk_budget_is_nine_tenths_of_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    deepspeed = infinity(tmp_path)
    del deepspeed["aio"]
    assert GeminiConfig.from_deepspeed(deepspeed).nvme == NVMeConfig(path=str(tmp_path), budget=900)


@pytest.mark.parametrize(
    ("deepspeed", "fields"),
    [
        ({}, {"dtype": torch.float32}),
        ({"fp16": {"enabled": True, "initial_scale_power": 10}}, {"dtype": torch.float16, "initial_loss_scale": 1024}),
        (
            {"fp16": {"enabled": True, "auto_cast": False}},
            {"dtype": torch.float16, "cast_forward_inputs": False},
        ),
        ({"fp16": {"enabled": True, "auto_cast": True}}, {"dtype": torch.float16, "cast_forward_inputs": True}),
        ({"gradient_accumulation_steps": 1}, {"dtype": torch.float32, "gradient_accumulation": False}),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, {"dtype": torch.float32}),
        ({"amp": {"enabled": False}, "data_types": {"grad_accum_dtype": "fp32"}}, {"dtype": torch.float32}),
    ],
)
def test_keys_become_fields(deepspeed: dict[str, Any], fields: dict[str, Any]) -> None:
    assert GeminiConfig.from_deepspeed(deepspeed) == GeminiConfig(**fields)


def test_what_the_engine_decides_is_named_in_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        GeminiConfig.from_deepspeed(infinity(tmp_path), nvme_budget="1GiB")
    (record,) = caplog.records
    assert set(record.getMessage().split(": ")[2].split(", ")) == {
        "zero_optimization.overlap_comm",
        "zero_optimization.stage3_prefetch_bucket_size",
        "zero_optimization.offload_optimizer.pin_memory",
        "zero_optimization.offload_optimizer.buffer_count",
        "zero_optimization.offload_param.buffer_size",
        "aio.block_size",
        "aio.single_submit",
    }


@pytest.mark.parametrize(
    ("deepspeed", "message"),
    [
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler: no counterpart here: use torch.optim.lr_scheduler"),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "zero_optimization.zenflow: no counterpart here"),
        ({"fp16": {"enabled": True, "loss_scale": 128}}, "fp16.loss_scale: no counterpart here"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16.enabled: expected false"),
        ({"bf16": {"enabled": "auto"}}, 'bf16.enabled: expected a value, got "auto"'),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: expected 0, 1, 2 or 3, got 4"),
        (
            {"zero_optimization": {"offload_param": {"device": "nvme"}}},
            "offload_param.nvme_path: expected one directory",
        ),
        ({"zero_optimization": {"offload_param": {"device": "ssd"}}}, 'device: expected "none", "cpu" or "nvme"'),
        ({"zero_optimization": {"stage3_speed": 11}}, "zero_optimization.stage3_speed: unknown key"),
        ({"zero_optimisation": {"stage": 3}}, "zero_optimisation: unknown key"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(deepspeed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        GeminiConfig.from_deepspeed(deepspeed)


def test_a_directory_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a directory that exists"):
        GeminiConfig.from_deepspeed(infinity(tmp_path / "none"))


def hybrid_adam(deepspeed: dict[str, Any]) -> HybridAdam:
    with GeminiDDP(torch.nn.Linear(2, 2), GeminiConfig(device="cpu", host_budget="64MiB")) as engine:
        return HybridAdam.from_deepspeed(engine.parameters(), deepspeed)


def test_the_optimizer_is_read_with_the_clipping(tmp_path: Path) -> None:
    optimizer = hybrid_adam(infinity(tmp_path))
    expected = {"lr": 3e-4, "betas": [0.8, 0.99], "eps": 1e-6, "weight_decay": 0.0, "adamw_mode": True}
    assert optimizer.defaults == expected
    assert optimizer.max_grad_norm == 1.0


def test_adam_without_decoupled_decay_stays_so() -> None:
    optimizer = hybrid_adam({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False, "weight_decay": 0.1}}})
    assert optimizer.defaults["adamw_mode"] is False
    assert optimizer.max_grad_norm is None


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"type": "Lamb"}, 'optimizer.type: expected "Adam" or "AdamW"'),
        ({"type": "AdamW", "params": {"lr": "auto"}}, 'lr: expected a value, got "auto"'),
        ({"type": "AdamW", "params": {"amsgrad": True}}, "got {'amsgrad'}"),
        ({"type": "AdamW", "params": {"bias_correction": False}}, "always corrects"),
    ],
)
def test_other_optimizers_are_refused(optimizer: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        hybrid_adam({"optimizer": optimizer})
