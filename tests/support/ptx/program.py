"""Reads PTX: instructions in order, labels, and what a launch must give."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Guard", "Instruction", "Program", "parse"]

_STATEMENT = re.compile(r"(?P<guard>@!?%p\d+\s+)?(?P<opcode>[a-z][\w.]*(?:::\w+)?[\w.]*)\s*(?P<operands>.*)", re.DOTALL)
_LABEL = re.compile(r"\s*(\$\w+):")


@dataclass(frozen=True)
class Guard:
    """The predicate of an instruction, for threads of which it is executed."""

    register: str
    is_negated: bool


@dataclass(frozen=True)
class Instruction:
    """One instruction."""

    opcode: tuple[str, ...]
    """Name and modifiers; the types come last."""
    operands: tuple[str, ...]
    """As written; vectors and addresses with their brackets."""
    guard: Guard | None


@dataclass(frozen=True)
class Program:
    """The entry of a PTX module."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    """Index of the instruction behind each label."""
    params: tuple[str, ...]
    """Names of the parameters, in order."""
    num_threads: int
    """Threads of a block."""


def parse(ptx: str) -> Program:
    """Read the only entry of a PTX module.

    Raises:
        ValueError: a statement cannot be read.
    """
    text = re.sub(r"//[^\n]*", "", ptx)
    head, _, body = text[text.index(".entry") :].partition("{")
    threads = re.search(r"\.reqntid (\d+)", head)
    if threads is None:
        raise ValueError("the entry does not say how many threads a block has")
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in re.sub(r"\s*\.loc\s[^\n]*", "", body[: body.index("\n}")]).split(";"):
        statement = line
        while (label := _LABEL.match(statement)) is not None:
            labels[label[1]] = len(instructions)
            statement = statement[label.end() :]
        statement = statement.strip()
        if statement and not statement.startswith("."):  # .reg, .pragma
            instructions.append(_read(statement))
    return Program(
        instructions=tuple(instructions),
        labels=labels,
        params=tuple(re.findall(r"\.param [^,)]*?(\w+_param_\d+)", head)),
        num_threads=int(threads[1]),
    )


def _read(statement: str) -> Instruction:
    match = _STATEMENT.fullmatch(statement)
    if match is None:
        raise ValueError(f"not an instruction: {statement}")
    guard = None
    if match["guard"]:
        name = match["guard"].strip().lstrip("@")
        guard = Guard(name.lstrip("!"), name.startswith("!"))
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]\s]+", match["operands"])
    return Instruction(tuple(match["opcode"].split(".")), tuple(operands), guard)
