"""What the examples share: text every machine has, a loss that never holds all logits, a display, a summary."""

from __future__ import annotations

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
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gemini import ConfigError, GeminiDDP, GeminiError, MemoryReport
from gemini.tiers import format_nbytes

__all__ = [
    "CausalLMLoss",
    "TrainingDisplay",
    "TrainingLog",
    "check_disk_space",
    "choose_dtype",
    "enable_checkpointing",
    "encode",
    "print_memory_table",
    "random_windows",
    "read_stdlib",
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


def random_windows(
    ids: torch.Tensor, *, num_rows: int, num_tokens: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches of random windows of a text for ever.

    Args:
        ids: the text, int64 [any].
        num_rows: windows in a batch.
        num_tokens: length of a window.
        seed: decides which windows.

    Yields:
        Inputs and targets, int64 [num_rows, num_tokens]; a target is the token after the input.
    """
    if len(ids) <= num_tokens + 1:
        raise ConfigError(f"the text has {len(ids)} tokens, expected more than {num_tokens + 1}")
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(ids) - num_tokens - 1, (num_rows, 1), generator=generator)
        windows = ids[starts + torch.arange(num_tokens + 1)]
        yield windows[:, :-1], windows[:, 1:]


# ---------------------------------------------------------------- model


class CausalLMLoss(torch.nn.Module):
    """A Hugging Face causal language model that returns its loss and never holds all logits at once.

    Logits of a large vocabulary are the largest activation of a small model. Here a few rows at a time get theirs, in
    forward and again in backward (checkpointing), so that one slice is alive at any moment.

    Args:
        model: the language model, on any device, "meta" included.
        rows_per_slice: positions whose logits exist at once.
    """

    def __init__(self, model: Any, *, rows_per_slice: int = 128) -> None:
        super().__init__()
        self.model = model
        self.rows_per_slice = rows_per_slice

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean cross entropy, float32 [], of token ids [rows, tokens] and the ids after them."""
        hidden = self.model.base_model(input_ids=inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        slices = zip(hidden.split(self.rows_per_slice), targets.flatten().split(self.rows_per_slice), strict=True)
        total = torch.stack([checkpoint(self._slice_loss, *part, use_reentrant=False) for part in slices]).sum()
        return total / targets.numel()

    def _slice_loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self.model.get_output_embeddings()(hidden)
        return F.cross_entropy(logits.float(), targets, reduction="sum")


def enable_checkpointing(model: Any) -> None:
    """Let a Hugging Face model recompute each block's activations in backward instead of keeping them."""
    # The second name is the one before transformers 5.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def choose_dtype(name: str) -> tuple[torch.dtype, str]:
    """Return the working dtype and a sentence saying why.

    Processors without bfloat16 instructions emulate them, up to a hundred times slower than float32, and others run
    them several times faster: "auto" measures a small matrix product in both, in well under a second.

    Args:
        name: "bf16", "fp32" or "auto"; the last is about the CPU.
    """
    named = {"bf16": torch.bfloat16, "fp32": torch.float32}
    if name in named:
        return named[name], f"{name}, as asked for"
    rates = {key: _matmul_gflops(dtype) for key, dtype in named.items()}
    fastest = max(rates, key=lambda key: rates[key])
    measured = ", ".join(f"{key} {rate:.3g}" for key, rate in rates.items())
    return named[fastest], f"{fastest}: the faster of {measured} GFLOP/s here"


def _matmul_gflops(dtype: torch.dtype) -> float:
    left, right = torch.ones(128, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    seconds = []
    for _ in range(4):  # the first one warms up
        start = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - start)
    return 2 * 128 * 512 * 512 / min(seconds) / 1e9


# ---------------------------------------------------------------- measurement


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


class TrainingDisplay:
    """A progress bar with loss, speed and traffic; a context manager.

    Args:
        engine: asked for its report after each step.
        num_steps: steps to come.
        num_tokens: tokens of one step.
        console: where to draw.
    """

    def __init__(self, engine: GeminiDDP, *, num_steps: int, num_tokens: int, console: Console) -> None:
        self.log = TrainingLog(num_tokens=num_tokens)
        self._engine = engine
        columns = (TextColumn("training"), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.description}"))
        self._progress = Progress(*columns, TimeElapsedColumn(), console=console)
        self._task = self._progress.add_task("the first step touches all memory", total=num_steps)
        self._last = engine.memory_report()
        self._last_time = time.perf_counter()

    def __enter__(self) -> TrainingDisplay:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def step_done(self, loss: float) -> None:
        """Show a finished step."""
        now, report = time.perf_counter(), self._engine.memory_report()
        self.log.losses.append(loss)
        self.log.seconds.append(now - self._last_time)
        read = report.nvme_read_nbytes - self._last.nvme_read_nbytes
        written = report.nvme_written_nbytes - self._last.nvme_written_nbytes
        self._progress.update(
            self._task,
            advance=1,
            description=(
                f"loss {loss:.3f} | {self.log.num_tokens / self.log.seconds[-1]:.0f} tokens/s | disk: "
                f"{format_nbytes(read)} read, {format_nbytes(written)} written, "
                f"{_stall_s(report) - _stall_s(self._last):.2f} s waited"
            ),
        )
        self._last, self._last_time = report, now


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
        table.add_row(tier.tier, "total", planned, format_nbytes(tier.peak_nbytes), budget, style="bold", end_section=True)
    peak = resident_nbytes()["peak"]
    for name, nbytes in (
        ("imports (Python, torch, transformers)", import_nbytes),
        ("engine, within the host budget", engine_nbytes),
        ("activations, gradients on their way, heap", peak - import_nbytes - engine_nbytes),
    ):
        table.add_row("", name, "", format_nbytes(nbytes), "")
    table.add_row("process", "resident in all", "", format_nbytes(peak), "", style="bold", end_section=True)
    plain = PLAIN_NBYTES_PER_PARAM * report.num_params
    table.add_row("plain PyTorch", "weights, gradients, AdamW moments alone", "", format_nbytes(plain), "")
    console.print(table)
    console.print(
        f"{report.num_fetches} fetches of weights, {report.num_misses} of them late; waited {report.fetch_stall_s:.1f} s "
        f"for weights and {report.update_stall_s:.1f} s in updates; disk driven by {report.io_engine}"
        f"{'' if report.is_direct_io else ', through the page cache'}, Adam by {report.instruction_set}"
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
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
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
