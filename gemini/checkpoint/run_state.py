"""The small rest of a checkpoint: random number generators, hyper-parameters, whatever the user wants kept."""

from __future__ import annotations

import io
import pickle
import random
import sys
from pathlib import Path
from typing import Any

import torch

from gemini.errors import CheckpointError, ConfigError

__all__ = ["decode_run_state", "encode_run_state", "rng_state", "set_rng_state"]


def encode_run_state(state: dict[str, Any]) -> bytes:
    """Encode what is small.

    Args:
        state: by purpose.

    Returns:
        A file's content, for `decode_run_state`.

    Raises:
        ConfigError: something in it is not made of tensors, numbers, strings, None, lists, tuples and dictionaries.
    """
    for key, value in state.items():
        buffer = io.BytesIO()
        try:
            torch.save(value, buffer)
            _load(buffer.getvalue())
        except (pickle.PickleError, TypeError, AttributeError, RuntimeError) as error:
            raise ConfigError(
                f"save_checkpoint: {key}: expected tensors, numbers, strings, lists, tuples and dictionaries, which "
                f"load without running code; {_first_line(error)}"
            ) from None
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def decode_run_state(data: bytes, *, source: Path) -> dict[str, Any]:
    """Decode what `encode_run_state` has encoded; runs no code that the data may name.

    Args:
        data: a file's content.
        source: the file.

    Returns:
        The state, by purpose.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        state = _load(data)
    except (pickle.PickleError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{source} is damaged ({_first_line(error)}); take another checkpoint") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{source} is damaged: expected a dictionary in it; take another checkpoint")
    return state


def _load(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


def rng_state() -> dict[str, Any]:
    """Return the state of this process's random number generators: Python's, NumPy's, torch's on every device."""
    state: dict[str, Any] = {"python": random.getstate(), "cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = (str(name), torch.tensor(keys.tolist()), *(_plain(value) for value in rest))
    return state


def _plain(value: Any) -> int | float:
    return float(value) if isinstance(value, float) else int(value)


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` returned; of devices, as many as there are now."""
    random.setstate(state["python"])
    torch.set_rng_state(state["cpu"])
    for index, value in enumerate(state.get("cuda", ())):
        if torch.cuda.is_available() and index < torch.cuda.device_count():
            torch.cuda.set_rng_state(value, index)
    if "numpy" in state and "numpy" in sys.modules:
        name, keys, *rest = state["numpy"]
        sys.modules["numpy"].random.set_state((name, keys.numpy().astype("uint32"), *rest))
