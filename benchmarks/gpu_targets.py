"""The targets of a GPU, and what rows say of them. Pure: rows in, a table out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from results_file import markdown_table

__all__ = ["TARGETS", "Finding", "Target", "judge", "target_table"]

Row = dict[str, Any]
ON_HOST = "gemini, state on the host"
LEAST_OF_TORCH = 0.97
LEAST_OF_DEEPSPEED = 2.0
LEAST_OF_COPY = 0.9
LONGEST_SETUP_S = 60.0
PEERS = ("torch", "deepspeed")


@dataclass(frozen=True, slots=True)
class Finding:
    """What rows say of a target."""

    is_met: bool | None
    """Whether it is met; None: nothing was measured."""
    found: str = ""
    why: str = ""
    """Why nothing was measured, or what is to be known besides."""

    @property
    def verdict(self) -> str:
        """The word for it."""
        return {True: "met", False: "missed", None: "not run"}[self.is_met]


@dataclass(frozen=True, slots=True)
class Target:
    """Something that is to be reached."""

    what: str
    goal: str
    judge: Callable[[Sequence[Row]], Finding]


def judge(rows: Sequence[Row]) -> list[tuple[Target, Finding]]:
    """Return each target with what the rows say of it."""
    return [(target, target.judge(rows)) for target in TARGETS]


def target_table(rows: Sequence[Row]) -> str:
    """Return the targets and what the rows say of them, as a Markdown table."""
    return markdown_table(
        [
            {"target": target.what, "goal": target.goal, "found": each.found, "": each.verdict, "note": each.why}
            for target, each in judge(rows)
        ]
    )


def _trained(rows: Iterable[Row], system: str, task: str | None = None) -> list[Row]:
    """Return the rows of a system's training runs at the largest cap among them."""
    found = [row for row in rows if row["system"].startswith(system) and row.get("task") in ("fits", "exceeds")]
    largest = max((row["cap_gb"] for row in found), default=None)
    return [row for row in found if row["cap_gb"] == largest and task in (None, row["task"])]


def _reasons(rows: Iterable[Row]) -> str:
    """Return why rows have no figures."""
    reasons = dict.fromkeys(row["missing"] for row in rows if "missing" in row)
    slow = dict.fromkeys(f"{row['system']}: {describe_slow(row)}" for row in rows if "slower_than_s" in row)
    return "; ".join([*reasons, *slow]) or "no such run"


def describe_slow(row: Row) -> str:
    """Return what a run that was ended while it trained says of its speed."""
    return f"slower than {row['slower_than_s']:.3g} s a step"


def _at_least(ratios: dict[str, float], goal: float, unit: str = "") -> Finding:
    lowest = min(ratios, key=lambda name: ratios[name])
    others = ", ".join(f"{name} {ratio:.3g}" for name, ratio in ratios.items() if name != lowest)
    return Finding(ratios[lowest] >= goal, f"{ratios[lowest]:.3g}{unit} ({lowest})", others)


def _judge_ratio(rows: Sequence[Row], peer: str, goal: float, tasks: Sequence[str]) -> Finding:
    """Judge tokens/s over a peer's; the task whose ratio is lowest decides."""
    ours = [row for task in tasks for row in _trained(rows, ON_HOST, task)]
    ratios = {f"{row['task']}, {row['cap_gb']:g} GB": row[f"of_{peer}"] for row in ours if f"of_{peer}" in row}
    slow = [row for row in ours if "slower_than_s" in row]
    for row in slow:
        theirs = [each for each in _trained(rows, peer, row["task"]) if "step_s" in each]
        bound = max((each["step_s"] / row["slower_than_s"] for each in theirs), default=None)
        if bound is not None and bound < goal:
            return Finding(False, f"below {bound:.3g} ({row['task']})", describe_slow(row))
    if ratios:
        return _at_least(ratios, goal)
    theirs = [row for task in tasks for row in _trained(rows, peer, task)]
    return Finding(None, why=_reasons([*ours, *theirs]))


def _judge_torch(rows: Sequence[Row]) -> Finding:
    return _judge_ratio(rows, "torch", LEAST_OF_TORCH, ("fits",))


def _judge_deepspeed(rows: Sequence[Row]) -> Finding:
    return _judge_ratio(rows, "deepspeed", LEAST_OF_DEEPSPEED, ("fits", "exceeds"))


def _judge_adam(rows: Sequence[Row]) -> Finding:
    ours = [row for row in rows if row["system"] == "gemini triton" and str(row.get("task")).startswith("adam")]
    ratios = {row["task"]: row["of_ceiling"] for row in ours if "of_ceiling" in row}
    if ratios:
        return _at_least(ratios, LEAST_OF_COPY)
    return Finding(None, why=_reasons(row for row in rows if row.get("task") == "bandwidth"))


def _judge_cap(rows: Sequence[Row]) -> Finding:
    trained = [row for row in rows if "device_budget_bytes" in row and row["peak_device_bytes"]]
    if not trained:
        return Finding(None, why=_reasons(_trained(rows, "gemini")))
    above = {
        f"{row['task']}, {row['cap_gb']:g} GB, {row['system']}": row["peak_device_bytes"] - row["device_budget_bytes"]
        for row in trained
    }
    worst = max(above, key=lambda name: above[name])
    sign = "above" if above[worst] > 0 else "below"
    return Finding(above[worst] <= 0, f"{abs(above[worst])} bytes {sign} ({worst})", f"{len(trained)} runs")


def _judge_bits(rows: Sequence[Row]) -> Finding:
    trained = [row for row in rows if row.get("task") == "placement"]
    compared = [row for row in trained if "same_bits" in row]
    differing = [row["system"] for row in compared if not row["same_bits"]]
    failed = [f"{row['system']}: {row['missing']}" for row in trained if "missing" in row]
    if len(compared) < 2:
        return Finding(None, why="; ".join(failed) or "no such run")
    found = f"{len(compared) - len(differing)} of {len(trained)} placements"
    return Finding(not differing and not failed, found, "; ".join([*differing, *failed]))


def _judge_setup(rows: Sequence[Row]) -> Finding:
    ours = [row for row in rows if row["system"] == ON_HOST and row.get("task") == "exceeds"]
    seconds = [row["setup_s"] for row in ours if "setup_s" in row]
    if not seconds:
        return Finding(None, why=_reasons(ours))
    return Finding(max(seconds) <= LONGEST_SETUP_S, f"{max(seconds):.1f} s", f"{ours[0]['model']}")


TARGETS = (
    Target("tokens/s of all-in-GPU, state on the host", f"at least {LEAST_OF_TORCH}", _judge_torch),
    Target("tokens/s of DeepSpeed ZeRO-Offload, clipping on", f"at least {LEAST_OF_DEEPSPEED}", _judge_deepspeed),
    Target("the GPU's Adam, of a device copy's bandwidth", f"at least {LEAST_OF_COPY}", _judge_adam),
    Target("device memory within the budget", "0 bytes above", _judge_cap),
    Target("every placement gives the same bits", "all", _judge_bits),
    Target("set-up of the model that does not fit", f"at most {LONGEST_SETUP_S:.0f} s", _judge_setup),
)
"""What is to be reached on a GPU whose memory is capped to that of a smaller card."""
