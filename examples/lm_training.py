"""What the examples share: text every machine has, checkpoints, a display, a summary."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gemini import ConfigError, GeminiDDP, GeminiError, MemoryReport, StopOnSignals
from gemini.observe.run_recorder import RunRecorder
from gemini.tiers import format_nbytes

__all__ = [
    "ResumableSteps",
    "TrainingDisplay",
    "TrainingLog",
    "add_checkpoint_arguments",
    "add_record_argument",
    "check_disk_space",
    "enable_checkpointing",
    "encode",
    "print_memory_table",
    "random_windows",
    "read_stdlib",
    "recorded",
    "resident_nbytes",
    "run_example",
    "write_summary",
]

PLAIN_NBYTES_PER_PARAM = 16
"""What plain PyTorch keeps for float32 AdamW: weight, gradient and two moments of 4 bytes each."""

_SKIPPED_DIRECTORIES = {"test", "tests", "site-packages", "dist-packages", "idlelib", "__pycache__"}


# ---------------------------------------------------------------- text


def read_stdlib(max_nbytes: int) -> list[str]:
    """Return source files of Python's own standard library, always the same ones in the same order.

    Args:
        max_nbytes: the last file is the one that reaches this.
    """
    texts: list[str] = []
    total_nbytes = 0
    for directory, subdirectories, names in os.walk(sysconfig.get_path("stdlib")):
        subdirectories[:] = sorted(set(subdirectories) - _SKIPPED_DIRECTORIES)
        for name in sorted(name for name in names if name.endswith(".py")):
            if total_nbytes >= max_nbytes:
                return texts
            texts.append(Path(directory, name).read_text(encoding="utf-8", errors="replace"))
            total_nbytes += len(texts[-1])
    return texts


def encode(texts: Sequence[str], *, vocab_size: int, cache: Path) -> torch.Tensor:
    """Train a byte-level BPE tokenizer on texts and encode them with it; both are kept for the next run.

    Args:
        texts: what tokenizer and model learn from.
        vocab_size: tokens the tokenizer may have.
        cache: directory for the tokenizer and the encoded text.

    Returns:
        Token ids, int64 [num_tokens].
    """
    digest = hashlib.sha256("".join(texts).encode()).hexdigest()[:16]
    tokenizer_path, ids_path = (cache / f"bpe-{vocab_size}-{digest}{suffix}" for suffix in (".json", ".pt"))
    if not ids_path.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        cache.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(tokenizer_path))
        torch.save(torch.cat([torch.tensor(tokenizer.encode(text).ids) for text in texts]), ids_path)
    ids: torch.Tensor = torch.load(ids_path)
    return ids.long()


def random_windows(ids: torch.Tensor, *, num_rows: int, num_tokens: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield batches of random windows of a text for ever.

    Args:
        ids: the text, int64 [any].
        num_rows: windows in a batch.
        num_tokens: length of a window.
        seed: decides which windows.

    Yields:
        Inputs and labels in one, as transformers takes them: int64 [num_rows, num_tokens].
    """
    if len(ids) <= num_tokens:
        raise ConfigError(f"the text has {len(ids)} tokens, expected more than {num_tokens}")
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(ids) - num_tokens, (num_rows, 1), generator=generator)
        yield ids[starts + torch.arange(num_tokens)]


# ---------------------------------------------------------------- model


def enable_checkpointing(model: Any) -> None:
    """Let a Hugging Face model recompute each block's activations in backward instead of keeping them."""
    # The second name is the one before transformers 5.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


# ---------------------------------------------------------------- checkpoints


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `ResumableSteps` reads to a command line that has --steps."""
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="save here at the end, on SIGTERM and on Ctrl-C")
    parser.add_argument("--save-every", type=int, metavar="N", help="save every N steps, too, while training goes on")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in DIR that was saved last")


class ResumableSteps:
    """The optimizer steps of a run that may be stopped and resumed; saves between them.

    Args:
        engine: loaded, if the run is resumed.
        arguments: `steps`, counted from the run's very beginning, and those of `add_checkpoint_arguments`.
        scheduler: the learning rate's, if there is one.
        console: told when a signal ends the run.

    Attributes:
        first: steps that were taken before.

    Raises:
        ConfigError: a checkpoint is wanted, and no directory is named.
    """

    def __init__(
        self, engine: GeminiDDP, arguments: argparse.Namespace, *, scheduler: Any = None, console: Console
    ) -> None:
        if arguments.checkpoint is None and (arguments.resume or arguments.save_every is not None):
            raise ConfigError("--resume and --save-every: expected --checkpoint DIR with them")
        self._engine, self._arguments, self._scheduler, self._console = engine, arguments, scheduler, console
        self.first = 0
        if arguments.resume:
            found = engine.load_checkpoint(arguments.checkpoint, scheduler=scheduler)
            self.first = found.extra["num_steps"]
            console.print(f"Going on after step {self.first} from {found.path}")

    def __iter__(self) -> Iterator[int]:
        """Yield the number of each step to take, from `first` on."""
        arguments = self._arguments
        steps = range(self.first, arguments.steps)
        if arguments.checkpoint is None:
            yield from steps
            return
        with StopOnSignals(self._engine) as stop:
            for step in steps:
                yield step
                is_stopped = stop.should_stop()
                is_last = is_stopped or step == steps[-1]
                if is_last or (arguments.save_every is not None and (step + 1) % arguments.save_every == 0):
                    self._save(step + 1, wait=is_last)
                if is_stopped:
                    assert stop.received is not None
                    self._console.print(
                        f"{stop.received.name}: saved after step {step + 1}; --resume goes on from here"
                    )
                    return

    def _save(self, num_steps: int, *, wait: bool) -> None:
        self._engine.save_checkpoint(
            self._arguments.checkpoint,
            scheduler=self._scheduler,
            extra={"num_steps": num_steps},
            keep_last=2,
            wait=wait,
        )


# ---------------------------------------------------------------- memory


def resident_nbytes() -> dict[str, int]:
    """Return this process's resident memory: "peak", "now", and "heap" and "shared" parts of "now" where known."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # not Linux; there ru_maxrss is the peak, in bytes on macOS
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {"peak": peak, "now": peak}
    names = {"VmHWM": "peak", "VmRSS": "now", "RssAnon": "heap", "RssShmem": "shared"}
    fields = (line.split(":", 1) for line in lines)
    return {names[key]: int(value.split()[0]) * 1024 for key, value in fields if key in names}


@dataclass
class TrainingLog:
    """What happened, step by step."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    num_tokens: int = 0
    """Tokens of one step."""

    @property
    def tokens_per_s(self) -> float:
        """Rate over all steps but the first, which touches memory for the first time."""
        timed = self.seconds[1:] or self.seconds
        return self.num_tokens * len(timed) / sum(timed) if timed else 0.0


def add_record_argument(parser: argparse.ArgumentParser) -> None:
    """Add what `recorded` is given to a command line."""
    parser.add_argument(
        "--record", type=Path, metavar="DIR", help="keep what `python -m gemini report DIR` shows of the first steps"
    )


@contextmanager
def recorded(engine: GeminiDDP, directory: Path | None, console: Console) -> Iterator[RunRecorder | None]:
    """Record an engine while the context is open, and say how to see it; do nothing without a directory.

    Args:
        engine: to be recorded.
        directory: for the recording.
        console: told where it is.

    Yields:
        The recorder, which is to be told losses and tokens.
    """
    if directory is None:
        yield None
        return
    with engine.record(directory) as recorder:
        yield recorder
    console.print(f"What happened in it: python -m gemini report {directory} (in a terminal: --terminal)")


class TrainingDisplay:
    """A progress bar with loss, speed and traffic; a context manager.

    Args:
        engine: asked for its report after each step.
        num_steps: steps to come.
        num_tokens: tokens of one step.
        console: where to draw.
        recorder: is told what the bar is told; None: nobody is.
    """

    def __init__(
        self,
        engine: GeminiDDP,
        *,
        num_steps: int,
        num_tokens: int,
        console: Console,
        recorder: RunRecorder | None = None,
    ) -> None:
        self._recorder = recorder
        self.log = TrainingLog(num_tokens=num_tokens)
        self.console = console
        self._engine = engine
        columns = (BarColumn(12), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console)
        self._task = self._progress.add_task("first step", total=num_steps)
        self._last = engine.memory_report()
        self._last_time = time.perf_counter()

    def __enter__(self) -> TrainingDisplay:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin_at(self, step: int) -> None:
        """Show steps that were taken before, by a run that is resumed."""
        self._progress.update(self._task, completed=step)

    def step_done(self, loss: float) -> None:
        """Show a finished step."""
        if self._recorder is not None:
            self._recorder.log(loss=loss, tokens=self.log.num_tokens)
        now, report = time.perf_counter(), self._engine.memory_report()
        self.log.losses.append(loss)
        self.log.seconds.append(now - self._last_time)
        disk_nbytes = _disk_nbytes(report) - _disk_nbytes(self._last)
        stall_s = _stall_s(report) - _stall_s(self._last)
        self._progress.update(
            self._task,
            advance=1,
            description=f"loss {loss:.2f}, {self.log.num_tokens / self.log.seconds[-1]:.0f} tokens/s, "
            f"disk {format_nbytes(disk_nbytes)}, waited {stall_s:.1f} s",
        )
        self._last, self._last_time = report, now


def _disk_nbytes(report: MemoryReport) -> int:
    return report.nvme_read_nbytes + report.nvme_written_nbytes


def _stall_s(report: MemoryReport) -> float:
    return report.fetch_stall_s + report.update_stall_s


# ---------------------------------------------------------------- running and reporting


def run_example(run: Callable[[Console], None]) -> int:
    """Run an example's main function; say in a line what stopped it, and return the exit status.

    The engine is a context manager, so that by the time an error or Ctrl-C arrives here the swap file is gone.

    Args:
        run: prints to the console it is given.
    """
    console = Console(highlight=False)
    try:
        run(console)
    except GeminiError as error:
        console.print(f"{type(error).__name__}: {error}", markup=False, style="red")
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted; memory and swap file have been given back.")
        return 130
    return 0


def check_disk_space(directory: Path, nbytes: int) -> None:
    """Make a directory for the swap file and see whether its disk has room.

    Raises:
        ConfigError: it has not.
    """
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    if free < nbytes:
        raise ConfigError(
            f"the swap file needs up to {format_nbytes(nbytes)} and the disk of {directory} has {format_nbytes(free)} "
            "free: make room, or name a directory on another disk with --nvme"
        )


def print_memory_table(report: MemoryReport, *, import_nbytes: int, console: Console) -> None:
    """Print bytes per tier, planned beside measured, and the process beside plain PyTorch."""
    table = Table(title="Memory", title_justify="left")
    for heading in ("tier", "holds", "planned", "peak", "budget"):
        table.add_column(heading, justify="left" if heading in ("tier", "holds") else "right")
    engine_nbytes = 0
    for tier in report.tiers:
        if not tier.planned_nbytes:
            continue
        engine_nbytes += tier.peak_nbytes if tier.tier == "host" else 0
        for purpose, nbytes in tier.planned_nbytes.items():
            table.add_row("", purpose, format_nbytes(nbytes), "", "")
        budget = "-" if tier.budget_nbytes is None else format_nbytes(tier.budget_nbytes)
        planned = format_nbytes(sum(tier.planned_nbytes.values()))
        table.add_row(
            tier.tier, "total", planned, format_nbytes(tier.peak_nbytes), budget, style="bold", end_section=True
        )
    peak = resident_nbytes()["peak"]
    for name, nbytes in (
        ("imports", import_nbytes),
        ("engine (host)", engine_nbytes),
        ("activations, heap", peak - import_nbytes - engine_nbytes),
    ):
        table.add_row("", name, "", format_nbytes(nbytes), "")
    table.add_row("process", "resident", "", format_nbytes(peak), "", style="bold", end_section=True)
    plain = PLAIN_NBYTES_PER_PARAM * report.num_params
    table.add_row("plain torch", "state alone, float32", "", format_nbytes(plain), "")
    console.print(table)
    console.print(
        f"{report.num_fetches} fetches of weights, {report.num_misses} of them late; waited "
        f"{report.fetch_stall_s:.1f} s for weights, {report.update_stall_s:.1f} s in updates; "
        f"Adam: {report.instruction_set}; disk: {report.io_engine}"
    )


def write_summary(
    path: Path,
    *,
    log: TrainingLog,
    report: MemoryReport,
    settings: dict[str, Any],
    import_nbytes: int,
    phase_s: dict[str, float],
) -> None:
    """Write what a run did as JSON, through a temporary file.

    Args:
        path: the file.
        log: losses and times.
        report: the engine's.
        settings: what was asked for: budgets, dtype, seed and so on.
        import_nbytes: resident memory before the model.
        phase_s: seconds of each phase of the run.
    """
    resident = resident_nbytes()
    summary = {
        "loss_first": log.losses[0] if log.losses else None,
        "loss_last": log.losses[-1] if log.losses else None,
        "steps": len(log.losses),
        "tokens_per_s": log.tokens_per_s,
        "peak_rss_bytes": resident["peak"],
        "import_rss_bytes": import_nbytes,
        "plain_state_bytes": PLAIN_NBYTES_PER_PARAM * report.num_params,
        "num_params": report.num_params,
        "nvme_bytes_read": report.nvme_read_nbytes,
        "nvme_bytes_written": report.nvme_written_nbytes,
        "stall_s": _stall_s(report),
        "fetch_stall_s": report.fetch_stall_s,
        "update_stall_s": report.update_stall_s,
        "settings": {key: value if isinstance(value, (int, float)) else str(value) for key, value in settings.items()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "num_threads": torch.get_num_threads(),
        "phase_s": phase_s,
        "losses": log.losses,
        "step_s": log.seconds,
        "memory_report": json.loads(report.to_json()),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(summary, indent=2) + "\n")
    draft.replace(path)
