"""`python -m gemini plan MODEL`: what training needs on this or another machine, without allocating the model."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from gemini.assembly.blueprint import draw_layout
from gemini.cli.models import causal_lm_loss, describe_model_names, load_model, naming_model, slice_loss
from gemini.cli.profiles import cached_profile
from gemini.config import GeminiConfig, NVMeConfig
from gemini.errors import ConfigError, MissingRateError, ModelError, OutOfTierMemoryError
from gemini.planning.hardware import HardwareProfile, load_profile
from gemini.planning.machine import MachineDescription, describe_machine, load_machine
from gemini.planning.rehearsal import Rehearsal, rehearse
from gemini.planning.training_plan import PROCESS_NBYTES, MachineMemory, TrainingPlan, plan_training, remedies
from gemini.tiers import MemoryTier, format_nbytes, parse_nbytes

__all__ = ["add_arguments", "run"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EXIT_FITS, EXIT_DOES_NOT_FIT = 0, 1
VARIABLES = ("model", "device-memory", "host-memory", "disk")
"""Quantities that --what-if may vary."""
SAVINGS = {
    "checkpoint_activations": "recompute activations in backward (--checkpoint-activations)",
    "sliced_loss": "compute the loss in slices (--sliced-loss)",
}
"""Settings that reduce compute memory, by option."""
FILE_WIDTH = 160
"""Width in columns of tables that are not printed to a terminal."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One model on one machine."""

    model: str
    memory: MachineMemory


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A plan, or the reason why there is none."""

    case: Case
    plan: TrainingPlan | None
    why_no_time: str | None = None
    """Reason why the plan has no prediction; None if it has one, or if there is no plan."""
    shortage: str | None = None
    remedies: tuple[str, ...] = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("model", help=describe_model_names())
    step = parser.add_argument_group("a step")
    step.add_argument("--tokens", type=int, default=2048, help="number of tokens in a batch (%(default)s)")
    step.add_argument("--seq", type=int, default=512, help="number of tokens in a sequence (%(default)s)")
    step.add_argument("--dtype", choices=DTYPES, default="bf16", help="dtype of the working weights (%(default)s)")
    step.add_argument("--checkpoint-activations", action="store_true", help="recompute activations in backward")
    step.add_argument(
        "--slices", type=int, default=1, help="number of slices of a batch, GeminiConfig.num_batch_slices (%(default)s)"
    )
    step.add_argument(
        "--sliced-loss", action="store_true", help="compute the loss in slices, as gemini.nn.use_sliced_loss does"
    )
    step.add_argument(
        "--no-accumulation", action="store_true", help="plan for GeminiConfig(gradient_accumulation=False)"
    )
    machine = parser.add_argument_group(
        "the machine", "The default is the machine of the profile, or else this machine, without a disk."
    )
    machine.add_argument("--device-memory", help='memory of the device, such as "24GiB" or "none"')
    machine.add_argument("--host-memory", help="main memory that training may use")
    machine.add_argument("--disk", help="disk space that training may use (none)")
    machine.add_argument("--endurance", help='rated endurance of the drive, such as "600TBW"')
    machine.add_argument(
        "--profile", type=Path, metavar="FILE", help="profile that `bench --json` wrote on the machine to plan for"
    )
    parser.add_argument(
        "--what-if",
        action="append",
        default=[],
        metavar="NAME=A,B,...",
        help=f"vary {', '.join(VARIABLES)}; repeat the option to plan all combinations",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Plan one case or a table of cases; the exit code says whether all fit."""
    if arguments.endurance is not None and not _names_disk(arguments):
        raise ConfigError("--endurance: expected --disk too: a drive wears only if it is used")
    if arguments.tokens < 1 or arguments.seq < 1 or arguments.tokens % arguments.seq:
        raise ConfigError(f"--tokens: expected a multiple of --seq ({arguments.seq}), got {arguments.tokens}")
    if arguments.profile is None:
        machine, profile = describe_machine(), cached_profile()
    else:
        machine, profile = load_machine(arguments.profile) or describe_machine(), load_profile(arguments.profile)
    cases = make_cases(arguments, machine)
    outcomes = plan_cases(cases, arguments, profile)
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    if arguments.json:
        documents = [to_document(outcome) for outcome in outcomes]
        sys.stdout.write(json.dumps(documents if arguments.what_if else documents[0], indent=2) + "\n")
    elif arguments.what_if:
        console.print(outcomes_table(outcomes))
    else:
        show_outcome(outcomes[0], console)
    for outcome in outcomes:
        if outcome.shortage is not None and not arguments.what_if:
            sys.stderr.write(f"gemini: does not fit: {outcome.shortage.partition('; raise ')[0]}\n")
    return EXIT_FITS if all(outcome.plan is not None for outcome in outcomes) else EXIT_DOES_NOT_FIT


def _names_disk(arguments: argparse.Namespace) -> bool:
    return arguments.disk is not None or any(variation.startswith("disk=") for variation in arguments.what_if)


def make_cases(arguments: argparse.Namespace, machine: MachineDescription) -> list[Case]:
    """Return every requested combination, in the order of the options.

    Args:
        arguments: the command line's arguments.
        machine: the machine whose memory is the default.

    Returns:
        At least one case.

    Raises:
        ConfigError: an amount is malformed, or a quantity cannot be varied.
    """
    names: dict[str, list[str | None]] = {
        "model": [arguments.model],
        "device-memory": [arguments.device_memory],
        "host-memory": [arguments.host_memory],
        "disk": [arguments.disk],
    }
    varied: set[str] = set()
    for variation in arguments.what_if:
        name, _, values = variation.partition("=")
        if name not in VARIABLES or not values:
            raise ConfigError(f"--what-if: expected one of {', '.join(VARIABLES)}, = and values, got {variation!r}")
        if name in varied:
            raise ConfigError(f"--what-if: {name} is given twice: put all its values in one option")
        varied.add(name)
        names[name] = list(values.split(","))
    return [
        Case(model=str(model), memory=_memory_of(device, host, disk, machine))
        for model, device, host, disk in itertools.product(*names.values())
    ]


def _memory_of(device: str | None, host: str | None, disk: str | None, machine: MachineDescription) -> MachineMemory:
    return MachineMemory(
        device=machine.device_memory_nbytes if device is None else _amount(device, "--device-memory"),
        host=machine.memory_nbytes if host is None else parse_nbytes(host, name="--host-memory"),
        nvme=None if disk is None else _amount(disk, "--disk"),
    )


def _amount(text: str, name: str) -> int | None:
    return None if text == "none" else parse_nbytes(text, name=name)


def plan_cases(cases: list[Case], arguments: argparse.Namespace, profile: HardwareProfile | None) -> list[Outcome]:
    """Plan cases; each model is rehearsed once for machines with a device and once for those without.

    Args:
        cases: models and machines.
        arguments: the arguments that all cases share.
        profile: rates; None: times are not predicted.

    Returns:
        One outcome per case.
    """
    rehearsed: dict[tuple[str, bool], tuple[torch.nn.Module, Rehearsal]] = {}
    outcomes = []
    for case in cases:
        has_device = case.memory.device is not None
        config = _config_of(case, arguments)
        key = (case.model, has_device)
        if key not in rehearsed:
            rehearsed[key] = _rehearse(case, config, arguments)
        model, rehearsal = rehearsed[key]
        plan = partial(plan_training, model, config, rehearsal, num_tokens=arguments.tokens, memory=case.memory)
        try:
            outcomes.append(_plan_case(case, plan, profile))
        except OutOfTierMemoryError as error:
            found = []
            if not arguments.what_if:
                found = find_savings(case, config, arguments) + remedies(model, config, rehearsal, memory=case.memory)
            outcomes.append(Outcome(case=case, plan=None, shortage=str(error), remedies=tuple(found)))
    return outcomes


def find_savings(case: Case, config: GeminiConfig, arguments: argparse.Namespace) -> list[str]:
    """Find ways to reduce compute memory so that a case that does not fit would fit; each way has been rehearsed.

    Args:
        case: a model and a machine.
        config: the configuration that was planned.
        arguments: the command line's arguments.

    Returns:
        A text: each way that is enough alone; if none is, both together if they are enough.
    """
    unused = [name for name in SAVINGS if not getattr(arguments, name)]

    def fits(names: Sequence[str]) -> bool:
        changed = argparse.Namespace(**vars(arguments) | dict.fromkeys(names, True))
        try:
            model, rehearsal = _rehearse(case, config, changed)
            plan_training(model, config, rehearsal, num_tokens=arguments.tokens, memory=case.memory)
        except (ConfigError, ModelError, OutOfTierMemoryError):
            return False
        return True

    enough = [SAVINGS[name] for name in unused if fits([name])]
    if not enough and len(unused) > 1 and fits(unused):
        enough = [" and ".join(SAVINGS[name] for name in unused)]
    return enough


def _plan_case(case: Case, plan: Callable[..., TrainingPlan], profile: HardwareProfile | None) -> Outcome:
    """Plan a case, without times if its rates are not known, for example those of a device to be rented."""
    if profile is None:
        reason = "no profile of this machine; measure one with python -m gemini bench"
        return Outcome(case=case, plan=plan(), why_no_time=reason)
    try:
        return Outcome(case=case, plan=plan(profile=profile))
    except MissingRateError as error:
        reason = f"{str(error).partition(',')[0]}; give --profile from a machine on which bench has measured it"
        return Outcome(case=case, plan=plan(), why_no_time=reason)


def _config_of(case: Case, arguments: argparse.Namespace) -> GeminiConfig:
    nvme = None
    if case.memory.nvme is not None:
        nvme = NVMeConfig(path=".", budget=case.memory.nvme, endurance=arguments.endurance)
    return GeminiConfig(
        dtype=DTYPES[arguments.dtype],
        gradient_accumulation=not arguments.no_accumulation,
        num_batch_slices=arguments.slices,
        nvme=nvme,
    )


def _rehearse(case: Case, config: GeminiConfig, arguments: argparse.Namespace) -> tuple[torch.nn.Module, Rehearsal]:
    has_device = case.memory.device is not None
    model = load_model(case.model, sequence_length=arguments.seq, has_checkpoints=arguments.checkpoint_activations)
    if arguments.sliced_loss:
        slice_loss(model, arguments.tokens, has_device=has_device)
    loss_fn = causal_lm_loss(arguments.tokens // arguments.seq, arguments.seq)
    with naming_model(case.model):
        return model, rehearse(model, loss_fn, config, draw_layout(model, config), has_device=has_device)


def to_document(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome as JSON data; bytes and seconds, null where a value is not known."""
    plan = outcome.plan
    document: dict[str, Any] = {
        "model": outcome.case.model,
        "memory_nbytes": dataclasses.asdict(outcome.case.memory),
        "fits": plan is not None,
    }
    if plan is None:
        return document | {"shortage": outcome.shortage, "remedies": list(outcome.remedies)}
    prediction = plan.prediction
    return document | {
        "num_params": plan.num_params,
        "num_tokens": plan.num_tokens,
        "config": {name: str(value) for name, value in _changed_fields(plan.config).items()},
        "peak_nbytes": {tier.value: plan.peak_nbytes(tier) for tier in MemoryTier},
        "peak_nbytes_by_purpose": {tier.value: plan.peak_by_purpose(tier) for tier in MemoryTier},
        "flops": plan.work.total.flops,
        "nvme_read_nbytes_per_step": plan.work.total.nvme_read_nbytes,
        "nvme_written_nbytes_per_step": plan.work.total.nvme_written_nbytes,
        "days_of_drive_life": plan.days_of_life,
        "why_no_time": outcome.why_no_time,
        "step_s": None if prediction is None else prediction.step_s,
        "tokens_per_s": plan.tokens_per_s,
        "bottleneck": None if prediction is None else prediction.bottleneck.value,
        "overlap": None if prediction is None else prediction.overlap,
        "seconds": None if prediction is None else {c.value: s for c, s in prediction.seconds.items()},
        "compute_bound_tokens": plan.compute_bound_tokens,
    }


def _changed_fields(config: GeminiConfig) -> dict[str, Any]:
    """Return the fields of a configuration that are not what they are by default."""
    plain = GeminiConfig()
    pairs = ((field.name, getattr(config, field.name)) for field in dataclasses.fields(config))
    return {name: value for name, value in pairs if value != getattr(plain, name)}


def show_outcome(outcome: Outcome, console: Console) -> None:
    """Print one outcome for users.

    Args:
        outcome: the outcome.
        console: the console.
    """
    plan = outcome.plan
    if plan is None:
        hint = " Each of these changes would make it fit:" if outcome.remedies else ""
        console.print(f"{outcome.case.model} does not fit.{hint}")
        for remedy in outcome.remedies:
            console.print(f"  - {remedy}", highlight=False)
        return
    console.print(f"{outcome.case.model} fits: {plan.num_params:,} parameters, {plan.num_tokens:,} tokens per step")
    console.print(memory_table(plan, outcome.case.memory))
    if plan.prediction is None:
        console.print(f"Step time: {outcome.why_no_time}", highlight=False)
    else:
        console.print(time_table(plan))
    written = plan.work.total.nvme_written_nbytes
    if written:
        life = "" if plan.days_of_life is None else f"; its rated life is {plan.days_of_life:,.0f} days of that"
        console.print(f"Drive: {format_nbytes(written)} written per step{life}")
    fields = ", ".join(f"{name}={value!r}" for name, value in _changed_fields(plan.config).items())
    console.print(f"GeminiConfig({fields})", highlight=False, soft_wrap=True)


def memory_table(plan: TrainingPlan, memory: MachineMemory) -> Table:
    """Return the bytes of each tier by purpose, with its peak."""
    table = Table(title="Memory at its peak")
    for column in ("tier", "purpose", "bytes"):
        table.add_column(column, justify="right" if column == "bytes" else "left")
    for tier in MemoryTier:
        purposes = plan.peak_by_purpose(tier)
        if not purposes:
            continue
        total = getattr(memory, tier.value)
        of_total = "" if total is None else f" of {format_nbytes(total)}"
        table.add_row(tier.value, "total", f"{format_nbytes(plan.peak_nbytes(tier))}{of_total}", style="bold")
        for purpose, nbytes in purposes.items():
            table.add_row("", purpose, format_nbytes(nbytes))
        if tier is MemoryTier.HOST:
            table.add_row("", "not included: reserved for the process", format_nbytes(PROCESS_NBYTES))
    return table


def time_table(plan: TrainingPlan) -> Table:
    """Return how a step's time is divided; the plan must have a prediction."""
    prediction = plan.prediction
    assert prediction is not None
    table = Table(title="Predicted step")
    table.add_column("quantity")
    table.add_column("value", justify="right")
    table.add_row("step", f"{prediction.step_s:.3f} s", style="bold")
    table.add_row("tokens per second", f"{plan.tokens_per_s:,.0f}")
    table.add_row("updates", prediction.overlap)
    table.add_row("bottleneck", prediction.bottleneck.value)
    for channel, seconds in prediction.seconds.items():
        if seconds:
            table.add_row(f"  {channel.value} busy", f"{seconds:.3f} s")
    if plan.compute_bound_tokens is not None:
        table.add_row("compute-bound from", f"{plan.compute_bound_tokens:,} tokens per step")
    return table


def outcomes_table(outcomes: list[Outcome]) -> Table:
    """Return a row for each outcome."""
    table = Table(title="What if")
    for column in (
        "model",
        "device / host / disk",
        "fits",
        "peaks",
        "step",
        "tokens/s",
        "bottleneck",
    ):
        table.add_column(column)
    for outcome in outcomes:
        memory, plan = outcome.case.memory, outcome.plan
        cells = [outcome.case.model, _amounts(memory.device, memory.host, memory.nvme)]
        if plan is None:
            cells.append(f"no: {(outcome.shortage or '').partition(' ')[0]} is short")
        else:
            cells += ["yes", _amounts(*(plan.peak_nbytes(tier) for tier in MemoryTier))]
            if plan.prediction is not None:
                cells += [f"{plan.prediction.step_s:.2f} s", f"{plan.tokens_per_s:,.0f}"]
                cells.append(plan.prediction.bottleneck.value)
        table.add_row(*cells)
    return table


def _amounts(*amounts: int | None) -> str:
    return " / ".join("none" if nbytes is None else format_nbytes(nbytes) for nbytes in amounts)
