"""The small remainder of a checkpoint: random number generators, hyper-parameters, buffers, the user's own data."""

from __future__ import annotations

import copy
import io
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gemini.checkpoint.participants import Participants, Stateful, rank_of
from gemini.errors import CheckpointError, CheckpointMismatchError, ConfigError
from gemini.model.extra_states import extra_states, load_extra_states, takers_of_extra_state
from gemini.offload.accelerator import find_accelerator
from gemini.runtime.runtime import Runtime

__all__ = [
    "check_buffers",
    "check_run_state",
    "collect_run_state",
    "decode_run_state",
    "encode_run_state",
    "load_scheduler",
    "restore_rng",
    "restore_run_state",
]

_KEYS = ("buffers", "extra", "modules", "num_skipped_steps", "optimizer", "rng", "scaler", "scheduler", "trace")
_NEW_KEYS = ("modules",)
"""Those that checkpoints of earlier versions lack: they have None."""


def collect_run_state(runtime: Runtime, participants: Participants, extra: Any, *, is_for_all: bool) -> dict[str, Any]:
    """Return what this rank keeps: buffers, modules' extra state, random numbers, and what all ranks have in common.

    Args:
        runtime: the engine's.
        participants: whose state to keep.
        extra: to be kept as well.
        is_for_all: whether other ranks will read it, so that the first rank's will do of what they have in common.

    Returns:
        By purpose, for `encode_run_state`.
    """
    buffers = {name: buffer.detach().cpu() for name, buffer in participants.buffers.items()}
    modules = extra_states(participants.model, remove_duplicate=True)
    own = {"buffers": buffers, "modules": modules, "rng": _rng_state()}
    if is_for_all and rank_of(runtime) != 0:
        return dict.fromkeys(_KEYS) | own
    optimizer, scheduler = participants.optimizer, participants.scheduler
    return {
        **own,
        "extra": extra,
        "num_skipped_steps": runtime.steps.num_skipped_steps,
        "optimizer": None if optimizer is None else optimizer.hyper_state_dict(),
        "scaler": None if runtime.coming.scaler is None else runtime.coming.scaler.state_dict(),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "trace": runtime.lookahead.state_dict(),
    }


def check_run_state(state: dict[str, Any], participants: Participants, *, source: str) -> None:
    """Raise an error unless the first rank's state fits what is to be restored.

    Args:
        state: from `decode_run_state`.
        participants: whose state it will become.
        source: what is being done and with which checkpoint, for messages.

    Raises:
        CheckpointMismatchError: it does not fit.
        ConfigError: there is optimizer state, and no optimizer.
    """
    if state["optimizer"] is not None:
        if participants.optimizer is None:
            raise ConfigError(f"{source} has an optimizer's state: construct HybridAdam(engine.parameters()) first")
        participants.optimizer.check_hyper_state_dict(state["optimizer"])
    elif participants.optimizer is not None:
        raise CheckpointMismatchError(
            f"{source} was saved without an optimizer, whose step counts are missing; load it before HybridAdam is "
            "constructed"
        )
    if participants.scheduler is not None and state["scheduler"] is None:
        raise CheckpointMismatchError(f"scheduler: {source} was saved without one; pass scheduler=None")
    if participants.scheduler is not None:
        saved, own = (_public_names(each) for each in (state["scheduler"], participants.scheduler.state_dict()))
        if saved - own and own - saved:
            raise CheckpointMismatchError(
                f"scheduler: {source} has one with {', '.join(sorted(saved - own))}, a "
                f"{type(participants.scheduler).__name__} has {', '.join(sorted(own - saved))} instead; give the kind "
                "of scheduler that was saved, or pass scheduler=None"
            )
    check_buffers(state, participants, source=source)


def _public_names(state: Mapping[str, Any]) -> set[str]:
    """Return what a scheduler's state consists of, but for what a version of torch may have or not."""
    return {str(name) for name in state if not str(name).startswith("_")}


def check_buffers(state: dict[str, Any], participants: Participants, *, source: str) -> None:
    """Raise CheckpointMismatchError unless a rank's buffers and extra state fit; arguments as `check_run_state`."""
    for name, buffer in participants.buffers.items():
        saved = state["buffers"].get(name)
        if saved is None or saved.shape != buffer.shape:
            found = "none" if saved is None else f"shape {tuple(saved.shape)}"
            raise CheckpointMismatchError(f"buffer {name}: expected shape {tuple(buffer.shape)}, {source} has {found}")
        if not torch.can_cast(saved.dtype, buffer.dtype):
            raise CheckpointMismatchError(
                f"buffer {name}: expected {buffer.dtype}, {source} has {saved.dtype}, so its values would lose digits"
            )
    if state["modules"] is None:  # of an earlier version, which kept none
        return
    for name in takers_of_extra_state(participants.model, remove_duplicate=True):
        if name not in state["modules"]:
            raise CheckpointMismatchError(
                f"{name}: {source} has no extra state, and the module has a set_extra_state: build the model as "
                "it was saved"
            )


def load_scheduler(scheduler: Stateful, state: dict[str, Any], *, source: str) -> None:
    """Restore a scheduler, or leave it as it was.

    Args:
        scheduler: to be restored.
        state: what its kind returned when it was saved.
        source: what it was saved in, for messages.

    Raises:
        CheckpointMismatchError: it cannot be restored from that.
    """
    before = copy.deepcopy(scheduler.state_dict())
    try:
        scheduler.load_state_dict(state)
    except Exception as error:  # of the user's or torch's code, which may raise anything
        scheduler.load_state_dict(before)
        raise CheckpointMismatchError(
            f"scheduler: a {type(scheduler).__name__} cannot load what {source} has "
            f"({_first_line(error)}); give the kind of scheduler that was saved, or pass scheduler=None"
        ) from error


def restore_run_state(
    runtime: Runtime, participants: Participants, state: dict[str, Any], of_rank: dict[str, Any]
) -> None:
    """Restore all but the scheduler and random numbers, after `check_run_state`.

    Args:
        runtime: the engine's.
        participants: whose state it becomes.
        state: the first rank's.
        of_rank: this rank's own, or the first rank's, for buffers and modules' extra state.
    """
    for name, buffer in participants.buffers.items():
        buffer.copy_(of_rank["buffers"][name])
    if participants.optimizer is not None:
        participants.optimizer.load_hyper_state_dict(state["optimizer"])
    if runtime.coming.scaler is not None and state["scaler"] is not None:
        runtime.coming.scaler.load_state_dict(state["scaler"])
    runtime.lookahead.load_state_dict(state["trace"])
    runtime.steps.num_skipped_steps = state["num_skipped_steps"]
    load_extra_states(participants.model, of_rank["modules"] or {})


def encode_run_state(state: dict[str, Any], *, what: str = "save_checkpoint") -> bytes:
    """Encode what `collect_run_state` returned.

    Args:
        state: by purpose.
        what: what is being done, for messages.

    Returns:
        A file's content, for `decode_run_state`.

    Raises:
        ConfigError: something in it is not made of tensors, numbers, strings, None, lists, tuples and dictionaries.
    """
    state = {key: _simplify_all(value, key) for key, value in state.items()}
    for key, value in state.items():
        error = None if _is_plain(value) else _loading_error(value)
        if error is not None:
            place, culprit = _find_culprit(value, key)
            raise ConfigError(
                f"{what}: {place}: expected tensors, numbers, strings, lists, tuples and dictionaries, which "
                f"load without running code; got {type(culprit).__module__}.{type(culprit).__qualname__}"
            ) from error
    return _dump(state)


def _simplify_all(value: Any, key: str) -> Any:
    try:
        return _simplify(value)
    except RecursionError as error:
        raise ConfigError(f"save_checkpoint: {key}: it contains itself, or is nested too deeply to be saved") from error


def _simplify(value: Any) -> Any:
    """Return a value with NumPy's numbers as Python's, and views of larger tensors as separate tensors."""
    if isinstance(value, torch.Tensor):
        is_view = value.layout is torch.strided and value.untyped_storage().nbytes() > value.nbytes
        return value.detach().clone() if is_view else value
    if type(value) is dict:
        return {_simplify(key): _simplify(inner) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_simplify, value))
    is_numpy = type(value).__module__ == "numpy"
    return value.item() if is_numpy and getattr(value, "shape", None) == () else value


def _is_plain(value: Any) -> bool:
    """Return whether a value can be kept, by its type alone: a trial would take milliseconds."""
    if type(value) is dict:
        return all(_is_plain(key) and _is_plain(inner) for key, inner in value.items())
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str, torch.Tensor)


def _loading_error(value: Any) -> Exception | None:
    """Return why a value cannot be kept; None if it can."""
    try:
        _load(_dump(value))
    except Exception as error:  # of many types, depending on what it is
        return error
    return None


def _find_culprit(value: Any, place: str) -> tuple[str, Any]:
    """Return the innermost part of a value that cannot be kept, and where it is."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, inner in items:
        if _loading_error(inner) is not None:
            return _find_culprit(inner, f"{place}[{key!r}]")
    return place, value


def decode_run_state(data: bytes, *, source: Path | str) -> dict[str, Any]:
    """Decode what `encode_run_state` has encoded; runs no code that the data may name.

    Args:
        data: a file's content.
        source: the file, for messages.

    Returns:
        The state, by purpose.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        state = _load(data)
    except Exception as error:  # of many types: the data may be anything
        raise CheckpointError(f"{source} is damaged ({_first_line(error)}); take another checkpoint") from error
    if isinstance(state, dict):
        state = dict.fromkeys(_NEW_KEYS) | state
    if not isinstance(state, dict) or set(state) != set(_KEYS):
        raise CheckpointError(f"{source} is damaged: expected {', '.join(_KEYS)} in it; take another checkpoint")
    return state


def _dump(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _load(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


def _rng_state() -> dict[str, Any]:
    """Return the state of this process's random number generators: Python's, NumPy's, torch's on every device."""
    state: dict[str, Any] = {"python": random.getstate(), "cpu": torch.get_rng_state()}
    device = find_accelerator()
    if device is not None:
        module = torch.get_device_module(device)
        state[device.type] = [module.get_rng_state(index) for index in range(module.device_count())]
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = (str(name), torch.tensor(keys.tolist()), *(_plain(value) for value in rest))
    return state


def _plain(value: Any) -> int | float:
    return float(value) if isinstance(value, float) else int(value)


def restore_rng(state: dict[str, Any]) -> None:
    """Restore random number generators; of devices, as many as there are now.

    Args:
        state: this rank's, from `decode_run_state`.
    """
    rng = state["rng"]
    random.setstate(rng["python"])
    torch.set_rng_state(rng["cpu"])
    device = find_accelerator()
    if device is not None:
        module = torch.get_device_module(device)
        for index, value in zip(range(module.device_count()), rng.get(device.type, ()), strict=False):
            module.set_rng_state(value, index)
    if "numpy" in rng and "numpy" in sys.modules:
        name, keys, *rest = rng["numpy"]
        sys.modules["numpy"].random.set_state((name, keys.numpy().astype("uint32"), *rest))
