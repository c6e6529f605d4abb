"""Runs of a trainer that can be repeated, with an engine and without, and what they logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from model_zoo import HF_CASES, SEQ, VOCAB

NUM_ROWS = 16
ROWS_A_STEP = 4


class Texts(torch.utils.data.Dataset):
    """Random tokens, the same for the same seed."""

    def __init__(self, seed: int = 0, num_rows: int = NUM_ROWS) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rows = torch.randint(5, VOCAB, (num_rows, SEQ), generator=generator)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def build_model(name: str = "gpt2_dropout") -> Any:
    return HF_CASES[name].model()


def arguments(directory: Path, **fields: Any) -> transformers.TrainingArguments:
    """Return arguments that exercise schedule, weight decay and clipping, and log every step."""
    defaults: dict[str, Any] = {
        "output_dir": str(directory),
        "per_device_train_batch_size": ROWS_A_STEP,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "adam_epsilon": 1e-5,  # see training_harness.EPS
        "warmup_steps": 2,
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return transformers.TrainingArguments(**{**defaults, **fields})


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def is_close(found: list[float], expected: list[float], tolerance: float = 2e-6) -> bool:
    """Return whether numbers agree, relative to each, as far as AdamW's rounding explains."""
    return len(found) == len(expected) > 0 and all(
        abs(a - b) <= tolerance * abs(b) for a, b in zip(found, expected, strict=True)
    )
