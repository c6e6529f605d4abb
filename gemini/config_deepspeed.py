"""DeepSpeed's JSON configuration, read for what has a counterpart here.

Each key is read, or left to the engine, which decides by itself what the key would set (logged), or left to the loop,
or refused with what to do instead; one that is not known here is refused.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from gemini.errors import ConfigError

__all__ = ["adam_arguments", "disk_arguments", "engine_arguments"]

logger = logging.getLogger(__name__)

_READ = {
    "bf16.enabled",
    "fp16.enabled",
    "fp16.auto_cast",
    "fp16.initial_scale_power",
    "gradient_accumulation_steps",
    "zero_optimization.stage",  # checked; it is zero.shard's argument
    "zero_optimization.cpu_offload",
    "zero_optimization.offload_optimizer.device",
    "zero_optimization.offload_optimizer.nvme_path",
    "zero_optimization.offload_param.device",
    "zero_optimization.offload_param.nvme_path",
    "aio.queue_depth",
}

_DECIDED_HERE = {
    "bf16.check_grad_overflow",
    "fp16.loss_scale_window",
    "fp16.hysteresis",
    "fp16.consecutive_hysteresis",
    "fp16.min_loss_scale",
    "aio.block_size",
    "aio.intra_op_parallelism",
    "aio.thread_count",
    "aio.single_submit",
    "aio.overlap_events",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    *(
        f"zero_optimization.{name}"
        for name in (
            "contiguous_gradients",
            "reduce_scatter",
            "reduce_bucket_size",
            "use_multi_rank_bucket_allreduce",
            "allgather_partitions",
            "allgather_bucket_size",
            "overlap_comm",
            "sub_group_size",
            "cpu_offload_use_pin_memory",
            "round_robin_gradients",
            "ignore_unused_parameters",
            "stage3_prefetch_bucket_size",
            "stage3_param_persistence_threshold",
            "stage3_model_persistence_threshold",
            "stage3_max_live_parameters",
            "stage3_max_reuse_distance",
            "stage3_gather_16bit_weights_on_model_save",
            "stage3_gather_fp16_weights_on_model_save",
            "memory_efficient_linear",
            *(
                f"{section}.{name}"
                for section in ("offload_optimizer", "offload_param")
                for name in (
                    "pin_memory",
                    "buffer_count",
                    "buffer_size",
                    "max_in_cpu",
                    "pipeline_read",
                    "pipeline_write",
                    "fast_init",
                    "ratio",
                    "cpuadam_cores_perc",
                )
            ),
        )
    ),
}
"""How bytes travel, which the plan and the budgets decide."""

_LEFT_TO_THE_LOOP = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "steps_per_print",
    "wall_clock_breakdown",
    "dump_state",
    "dataloader_drop_last",
    "gradient_clipping",  # HybridAdam.from_deepspeed reads these two
    "optimizer",
}

_REFUSED = {
    "scheduler": "use torch.optim.lr_scheduler with the HybridAdam",
    "amp": "choose bf16 or fp16: working weights have that dtype, masters are float32",
    "torch_autocast": "choose bf16 or fp16: working weights have that dtype, masters are float32",
    "activation_checkpointing": "call model.gradient_checkpointing_enable() before the model is wrapped",
    "bf16.immediate_grad_update": "gradients are summed in float32",
    "bf16.bf16_master_weights_and_grads": "masters are float32",
    "fp16.fp16_master_weights_and_grads": "masters are float32",
    "fp16.loss_scale": "the loss scale adapts during training; set it to 0",
    "aio.use_gds": "disks are read and written through host memory",
    "data_types.grad_accum_dtype": "gradients are summed in float32",
    "zero_optimization.zenflow": "every update is exact and none is delayed; GeminiConfig(overlap=...) overlaps them",
    "zero_optimization.offload_optimizer.super_offload": "GeminiConfig(overlap=...) overlaps updates, clipped or not",
    "zero_optimization.zero_hpz_partition_size": "give zero.shard a mesh of two dimensions, (replicate, shard)",
    "zero_optimization.zero_quantized_weights": "weights travel as they are",
    "zero_optimization.zero_quantized_gradients": "gradients travel as they are",
    "zero_optimization.zero_quantized_nontrainable_weights": "weights travel as they are",
    "tensor_parallel": "call torch's parallelize_module before zero.shard",
    "sequence_parallel_size": "see docs/parallelism.md",
    "pipeline": "see docs/parallelism.md",
    "compression_training": "compress the model before it is wrapped",
}
"""Keys that would change the training, and what to do instead. They are accepted with the value off, none, 0 or
false."""

_SECTIONS = {"bf16", "fp16", "aio", "data_types", "zero_optimization"} | {
    f"zero_optimization.{name}" for name in ("offload_optimizer", "offload_param")
}

_ADAM_NAMES = {"adam", "adamw"}
_ADAM_DEFAULTS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
"""DeepSpeed's own."""


def engine_arguments(deepspeed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of GeminiConfig that a DeepSpeed configuration sets, but for its disk."""
    values = dict(_flat(deepspeed))
    _check_keys(values)
    for path in _READ & values.keys() - {"gradient_accumulation_steps"}:
        if values[path] == "auto":
            raise ConfigError(f'from_deepspeed: {path}: expected a value, got "auto": replace it by a value')
    stage = values.get("zero_optimization.stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"from_deepspeed: zero_optimization.stage: expected 0, 1, 2 or 3, got {stage!r}")
    return {
        "dtype": _dtype_of(values),
        "gradient_accumulation": values.get("gradient_accumulation_steps") != 1,
        "cast_forward_inputs": bool(values.get("fp16.auto_cast", True)),
        "initial_loss_scale": 2.0 ** values.get("fp16.initial_scale_power", 16),
    }


def disk_arguments(deepspeed: Mapping[str, Any], budget: str | int | None) -> dict[str, Any] | None:
    """Return the arguments of NVMeConfig that a DeepSpeed configuration sets; None if it offloads nothing to a disk."""
    values = dict(_flat(deepspeed))
    paths = {}
    for section in ("offload_optimizer", "offload_param"):
        prefix = f"zero_optimization.{section}"
        device = values.get(f"{prefix}.device") or "none"
        if device not in ("none", "cpu", "nvme"):
            raise ConfigError(f'from_deepspeed: {prefix}.device: expected "none", "cpu" or "nvme", got {device!r}')
        if device == "nvme":
            paths[f"{prefix}.nvme_path"] = values.get(f"{prefix}.nvme_path")
    if not paths:
        return None
    (name, path), *others = paths.items()
    if not path or any(other != path for _, other in others):
        raise ConfigError(f"from_deepspeed: {name}: expected one directory for the swap file, got {paths}")
    if budget is None:
        try:
            budget = shutil.disk_usage(path).free * 9 // 10
        except OSError as error:
            raise ConfigError(f"from_deepspeed: {name}: expected a directory that exists, got {path!r}") from error
    depth = {"queue_depth": values["aio.queue_depth"]} if "aio.queue_depth" in values else {}
    return {"path": path, "budget": budget, **depth}


def adam_arguments(deepspeed: Mapping[str, Any]) -> dict[str, Any]:
    """Return HybridAdam's arguments from the keys `optimizer` and `gradient_clipping`."""
    optimizer = deepspeed.get("optimizer") or {}
    kind = optimizer.get("type", "AdamW")
    if str(kind).lower() not in _ADAM_NAMES:
        raise ConfigError(f'from_deepspeed: optimizer.type: expected "Adam" or "AdamW", got {kind!r}')
    params = dict(optimizer.get("params") or {})
    params.pop("torch_adam", None)  # which implementation
    if not params.pop("bias_correction", True):
        raise ConfigError("from_deepspeed: optimizer.params.bias_correction: HybridAdam always corrects; remove it")
    is_decoupled = params.pop("adam_w_mode", True) or str(kind).lower() == "adamw"
    if unknown := params.keys() - _ADAM_DEFAULTS.keys():
        raise ConfigError(f"from_deepspeed: optimizer.params: expected {', '.join(_ADAM_DEFAULTS)}, got {unknown}")
    clipping = deepspeed.get("gradient_clipping") or None
    arguments = {**_ADAM_DEFAULTS, **params, "adamw_mode": is_decoupled, "max_grad_norm": clipping}
    for name, value in arguments.items():
        if value == "auto":
            raise ConfigError(f'from_deepspeed: {name}: expected a value, got "auto": replace it by a value')
    return arguments


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each key's full path and value; sections that are not known stay whole."""
    for key, value in section.items():
        path = f"{prefix}{key}"
        if path in _SECTIONS and isinstance(value, Mapping):
            yield from _flat(value, f"{path}.")
        else:
            yield path, value


def _check_keys(values: Mapping[str, Any]) -> None:
    left = []
    for path, value in values.items():
        if path in _REFUSED:
            if not _is_off(path, value):
                raise ConfigError(f"from_deepspeed: {path}: no counterpart here: {_REFUSED[path]}; remove the key")
        elif path in _DECIDED_HERE:
            left.append(path)
        elif path not in _READ and path not in _LEFT_TO_THE_LOOP and not (path in _SECTIONS and value is None):
            raise ConfigError(
                f"from_deepspeed: {path}: unknown key; docs/migration.md lists the supported keys. Remove it if "
                "the training does not depend on it"
            )
    if left:
        logger.warning("from_deepspeed: ignored, because Gemini sets these automatically: %s", ", ".join(left))


def _is_off(path: str, value: Any) -> bool:
    if path == "data_types.grad_accum_dtype":
        return value in (None, "fp32")
    return not value or (isinstance(value, Mapping) and not value.get("enabled", True))


def _dtype_of(values: Mapping[str, Any]) -> torch.dtype:
    is_bfloat16, is_float16 = bool(values.get("bf16.enabled")), bool(values.get("fp16.enabled"))
    if is_bfloat16 and is_float16:
        raise ConfigError("from_deepspeed: fp16.enabled: expected false, because bf16.enabled is true")
    return torch.bfloat16 if is_bfloat16 else torch.float16 if is_float16 else torch.float32
