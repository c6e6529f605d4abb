"""The visible progress of a run: a line in the terminal, and rows of log.csv."""

from __future__ import annotations

import csv
import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import rich.progress
import torch
import transformers
from rich.console import Console
from rich.table import Column

from gemini.ddp import GeminiDDP
from gemini.errors import naming_file
from gemini.observe.report import MemoryReport
from gemini.observe.run_recorder import RunRecorder
from gemini.tiers import format_nbytes

__all__ = ["Pace", "ProgressCallback", "Snapshot", "Utilization", "pace_between"]

COLUMNS = (
    "step",
    "loss",
    "eval_loss",
    "learning_rate",
    "grad_norm",
    "seconds",
    "tokens_per_s",
    "padded_tokens_per_s",
    "mfu",
    "stall_share",
    "fetched_gb_per_s",
    "nvme_read_gb_per_s",
    "nvme_written_gb_per_s",
    "device_nbytes",
    "host_nbytes",
    "nvme_nbytes",
)
"""Columns of log.csv."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Counters of a run at one moment; all except `tiers` only grow."""

    seconds: float
    steps: int
    tokens: int
    """Number of real tokens."""
    padded_tokens: int
    """Number of tokens including padding."""
    stall_s: float
    """Seconds that compute has waited for weights and updates."""
    fetched_nbytes: int
    nvme_read_nbytes: int
    nvme_written_nbytes: int
    tiers: dict[str, int]
    """Bytes held now, by tier."""

    def after_pause(self, begin: Snapshot, end: Snapshot) -> Snapshot:
        """Return this snapshot without what happened between two later ones."""
        grown = {name: getattr(end, name) - getattr(begin, name) for name in _COUNTERS}
        return dataclasses.replace(self, **{name: getattr(self, name) + grown[name] for name in _COUNTERS})


_COUNTERS = tuple(field.name for field in dataclasses.fields(Snapshot) if field.name != "tiers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Utilization:
    """The inputs of model FLOPs utilization (MFU)."""

    flops_per_token: float
    """Operations per token that the model needs, forward and backward, without recomputation."""
    peak_flops_per_s: float
    """Operations per second of large matrix products in the working dtype, as measured on this machine."""

    def share(self, tokens_per_s: float) -> float:
        """Return a rate's share of the peak; more than 1 if the peak was measured too low.

        Source: Chowdhery et al. 2022 (PaLM), appendix B: tokens per second divided by those at the peak; operations of
        rematerialization do not count. There the peak is the data sheet's.

        Args:
            tokens_per_s: tokens per second of forward and backward, including padding, which is also computed.

        Returns:
            The share.
        """
        return tokens_per_s * self.flops_per_token / self.peak_flops_per_s


@dataclass(frozen=True, slots=True)
class Pace:
    """The pace of a run between two moments."""

    seconds: float
    """Seconds per step."""
    tokens_per_s: float
    padded_tokens_per_s: float
    mfu: float | None
    """Model FLOPs utilization; None if its inputs are not known."""
    stall_share: float
    fetched_gb_per_s: float
    nvme_read_gb_per_s: float
    nvme_written_gb_per_s: float


def pace_between(before: Snapshot, after: Snapshot, utilization: Utilization | None = None) -> Pace:
    """Return the pace between two snapshots, between which at least one step lies."""
    seconds = max(after.seconds - before.seconds, 1e-9)
    padded_tokens_per_s = (after.padded_tokens - before.padded_tokens) / seconds
    return Pace(
        seconds=seconds / (after.steps - before.steps),
        tokens_per_s=(after.tokens - before.tokens) / seconds,
        padded_tokens_per_s=padded_tokens_per_s,
        mfu=None if utilization is None else utilization.share(padded_tokens_per_s),
        stall_share=min((after.stall_s - before.stall_s) / seconds, 1.0),
        fetched_gb_per_s=(after.fetched_nbytes - before.fetched_nbytes) / seconds / 1e9,
        nvme_read_gb_per_s=(after.nvme_read_nbytes - before.nvme_read_nbytes) / seconds / 1e9,
        nvme_written_gb_per_s=(after.nvme_written_nbytes - before.nvme_written_nbytes) / seconds / 1e9,
    )


class ProgressCallback(transformers.TrainerCallback):
    """Shows and stores what a GeminiTrainer logs, and adds the pace; a context manager.

    The pace is that of training, without evaluation and saving.

    Args:
        path: path of log.csv. A new run replaces it; a resumed run continues after its step's row.
        console: console for the progress line.
        utilization: the inputs of MFU; None: MFU is left out.
    """

    def __init__(self, path: Path, console: Console, utilization: Utilization | None = None) -> None:
        # - What was asked
        self._path = path
        self._utilization = utilization
        # - The engine that is followed
        self._engine: GeminiDDP | None = None
        self._record: Callable[[], RunRecorder] | None = None
        self._recorder: RunRecorder | None = None
        # - What the pace is computed from
        self._num_tokens = self._num_padded_tokens = 0
        self._before: Snapshot | None = None
        self._pause: Snapshot | None = None  # start of a pause in training, if there is one
        # - What is shown
        columns = (
            rich.progress.BarColumn(12),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.description}", table_column=Column(no_wrap=False)),
            rich.progress.TimeRemainingColumn(),
        )
        self._bar = rich.progress.Progress(*columns, console=console)
        self._task: rich.progress.TaskID | None = None

    def __enter__(self) -> ProgressCallback:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    @property
    def has_recorded(self) -> bool:
        """Whether a recording was started."""
        return self._recorder is not None

    def follow(self, engine: GeminiDDP, record: Callable[[], RunRecorder] | None) -> None:
        """Use an engine's counters when training begins; `record` begins a recording, which then gets the losses."""
        self._engine, self._record = engine, record

    def count(self, batch: Mapping[str, torch.Tensor]) -> None:
        """Count the tokens of a training batch: `input_ids`, and `attention_mask` if it is padded."""
        numel = batch["input_ids"].numel()
        self._num_padded_tokens += numel
        self._num_tokens += int(batch["attention_mask"].sum()) if "attention_mask" in batch else numel

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the display, the recording and the clock."""
        _begin_log(self._path, step=state.global_step)
        if self._record is not None and state.global_step < state.max_steps:
            self._recorder = self._record()
        self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step)
        self._bar.start()
        self._before = self._snapshot(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance the bar."""
        assert self._task is not None
        self._bar.update(self._task, completed=state.global_step)
        self._note_pause(state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that training pauses for evaluation or saving, if it does."""
        self._note_pause(state, control)

    def _note_pause(self, state: Any, control: Any) -> None:
        if control.should_evaluate or control.should_save:
            self._pause = self._snapshot(state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Exclude evaluation from the pace."""
        self._end_pause(state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Exclude saving from the pace."""
        self._end_pause(state)

    def _end_pause(self, state: Any) -> None:
        if self._before is None or self._pause is None:
            return
        now = self._snapshot(state.global_step)
        self._before = self._before.after_pause(self._pause, now)
        self._pause = now

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the pace to the logged values; show and store them."""
        if not logs or self._before is None or "train_runtime" in logs:
            return
        values: dict[str, Any] = {"step": state.global_step, **logs}
        now = self._snapshot(state.global_step)
        if now.steps > self._before.steps and "loss" in logs:
            pace = pace_between(self._before, now, self._utilization)
            values |= {name: getattr(pace, name) for name in Pace.__slots__}
            self._before = now
            self._pause = None if self._pause is None else now
            self._show(logs, pace, now)
            if self._recorder is not None:
                self._recorder.log(loss=float(logs["loss"]), tokens=pace.tokens_per_s * pace.seconds)
        values |= {f"{tier}_nbytes": nbytes for tier, nbytes in now.tiers.items()}
        self._keep(values)

    def _show(self, logs: Mapping[str, Any], pace: Pace, now: Snapshot) -> None:
        assert self._task is not None
        tokens = f"{_rate(pace.tokens_per_s)} tokens/s"
        if pace.padded_tokens_per_s > pace.tokens_per_s:
            tokens += f" ({_rate(pace.padded_tokens_per_s)} padded)"
        rates = {
            "fetched": pace.fetched_gb_per_s,
            "read": pace.nvme_read_gb_per_s,
            "written": pace.nvme_written_gb_per_s,
        }
        parts = [
            f"loss {float(logs['loss']):.4f}",
            tokens,
            *([] if pace.mfu is None else [f"MFU {pace.mfu:.1%}"]),
            f"waiting {pace.stall_share:.0%}",
            *(f"{name} {rate:.2g} GB/s" for name, rate in rates.items() if rate),
            *(f"{tier} {format_nbytes(nbytes)}" for tier, nbytes in now.tiers.items() if nbytes),
        ]
        self._bar.update(self._task, description=", ".join(parts))

    def _keep(self, values: Mapping[str, Any]) -> None:
        with naming_file("write", self._path), open(self._path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS, extrasaction="ignore").writerow(values)

    def _snapshot(self, steps: int) -> Snapshot:
        assert self._engine is not None
        report: MemoryReport = self._engine.memory_report()
        return Snapshot(
            seconds=time.perf_counter(),
            steps=steps,
            tokens=self._num_tokens,
            padded_tokens=self._num_padded_tokens,
            stall_s=report.fetch_stall_s + report.update_stall_s,
            fetched_nbytes=report.fetched_nbytes,
            nvme_read_nbytes=report.nvme_read_nbytes,
            nvme_written_nbytes=report.nvme_written_nbytes,
            tiers={tier.tier: sum(tier.held_nbytes.values()) for tier in report.tiers},
        )


def _rate(per_s: float) -> str:
    return f"{per_s:,.0f}" if per_s >= 100 else f"{per_s:.3g}"


def _begin_log(path: Path, *, step: int) -> None:
    """Write the log's header, and keep an existing log's rows up to a step, because later steps are done again."""
    rows: list[dict[str, Any]] = []
    with naming_file("write", path):
        if step and path.exists():
            with open(path, newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if (row.get("step") or "").isdecimal()]
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(row for row in rows if int(row["step"]) <= step)
