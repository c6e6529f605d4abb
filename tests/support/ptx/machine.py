"""Executes PTX, block by block: a register is an array with an element for each thread, so all threads step together.

Branches must go the same way in all threads, as those of the kernels here do. Floating-point operations are those of
numpy, which are IEEE's with rounding to the nearest; any other rounding, or flushing of subnormals, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ptx.program import Guard, Instruction, Program

__all__ = ["Memory", "UnknownInstructionError", "launch"]

Array = npt.NDArray[Any]

TYPES: dict[str, Any] = {
    "pred": np.bool_,
    "b8": np.uint8,
    **{
        f"{kind}{bits}": getattr(np, f"{name}{bits}")
        for kind, name in (("b", "uint"), ("u", "uint"), ("s", "int"))
        for bits in (16, 32, 64)
    },
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
}
REGISTERS: dict[str, Any] = {"p": np.bool_, "rs": np.uint16, "r": np.uint32, "rd": np.uint64}
"""How the bits of each class of registers are kept."""
WARP = 32
SHARED_NBYTES = 1 << 16

FLOATING: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "sqrt": np.sqrt,
}
INTEGER: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "shl": np.left_shift,
    "shr": np.right_shift,
}
COMPARISONS: dict[str, Callable[..., Array]] = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "neu": np.not_equal,  # true of NaN, as numpy's is
}


class UnknownInstructionError(NotImplementedError):
    """An instruction that this machine does not execute."""


class Memory:
    """An address space with gaps between its buffers, which are numpy's and are written in place."""

    GAP = 1 << 16

    def __init__(self) -> None:
        self._buffers: list[tuple[int, Array]] = []
        self._end = self.GAP

    def add(self, values: Array) -> int:
        """Give a contiguous array an address, a multiple of the gap, and return it."""
        buffer = values.reshape(-1).view(np.uint8)
        address, self._end = self._end, self._end + (buffer.size // self.GAP + 2) * self.GAP
        self._buffers.append((address, buffer))
        return address

    def load(self, addresses: Array, nbytes: int) -> Array:
        """Return uint8 [threads, nbytes]."""
        buffer, offsets = self._find(addresses, nbytes)
        return buffer[offsets[:, None] + np.arange(nbytes)]

    def store(self, addresses: Array, values: Array) -> None:
        """Write uint8 [threads, nbytes]; of threads that write to one address, the last counts."""
        buffer, offsets = self._find(addresses, values.shape[1])
        buffer[offsets[:, None] + np.arange(values.shape[1])] = values

    def _find(self, addresses: Array, nbytes: int) -> tuple[Array, Array]:
        first, last = int(addresses.min()), int(addresses.max()) + nbytes
        for begin, buffer in self._buffers:
            if begin <= first and last <= begin + buffer.size:
                if np.any(addresses % nbytes):
                    raise IndexError(f"an address is no multiple of {nbytes}")
                return buffer, (addresses - np.uint64(begin)).astype(np.int64)
        raise IndexError(f"no buffer has the addresses from {first:#x} to {last:#x}")


class _Shared(Memory):
    """The shared memory of a block, from address 0."""

    def __init__(self) -> None:
        super().__init__()
        self._end = 0
        self.add(np.zeros(SHARED_NBYTES, np.uint8))


class _Block:
    def __init__(self, program: Program, memory: Memory, arguments: Sequence[int], number: int) -> None:
        self._program = program
        self._memory = {"global": memory, "shared": _Shared()}
        self._arguments = dict(zip(program.params, arguments, strict=False))
        self._num_threads = program.num_threads
        self._registers: dict[str, Array] = {
            "%tid.x": np.arange(self._num_threads, dtype=np.uint32),
            "%ctaid.x": np.full(self._num_threads, number, np.uint32),
            "global_smem": np.zeros(self._num_threads, np.uint64),
        }

    def run(self) -> None:
        """Execute instructions until one returns."""
        position = 0
        while True:
            instruction = self._program.instructions[position]
            position += 1
            threads = self._threads_of(instruction.guard)
            name = instruction.opcode[0]
            if name == "ret" and threads.all():
                return
            if name == "bra":
                if threads.any() and not threads.all():
                    raise UnknownInstructionError("a branch that threads take differently")
                if threads.all():
                    position = self._program.labels[instruction.operands[0]]
                continue
            handler = getattr(self, f"_{name}", None)
            try:
                if handler is not None:
                    handler(instruction, threads)
                else:
                    self._compute(instruction, threads)
            except KeyError as error:
                raise UnknownInstructionError(f"{'.'.join(instruction.opcode)}: {error}") from error

    # ---------------------------------------------------------------- operands

    def _threads_of(self, guard: Guard | None) -> Array:
        if guard is None:
            return np.ones(self._num_threads, np.bool_)
        return self._registers[guard.register] ^ guard.is_negated

    def _value(self, operand: str, kind: str) -> Array:
        """Return an operand's bits as values of a type."""
        dtype = TYPES[kind]
        if operand in self._registers:
            bits = self._registers[operand]
            if bits.dtype.itemsize != np.dtype(dtype).itemsize:  # a wider register: its low bits; an address: more
                bits = bits.astype(np.dtype(f"u{np.dtype(dtype).itemsize}"))
            return bits.view(dtype)
        if operand.startswith(("0f", "0d")):
            unsigned = np.uint32 if operand.startswith("0f") else np.uint64
            return np.full(self._num_threads, int(operand[2:], 16), unsigned).view(dtype)
        unsigned = np.dtype(f"u{np.dtype(dtype).itemsize}")
        number = int(operand.rstrip("U"), 0) % (1 << 8 * unsigned.itemsize)
        return np.full(self._num_threads, number, unsigned).view(dtype)

    def _set(self, register: str, values: Array, threads: Array) -> None:
        """Write values, of any type as wide as the register, for some threads."""
        match = re.fullmatch(r"%([a-z]+)\d+", register)
        if match is None:
            raise UnknownInstructionError(f"not a register: {register}")
        dtype = REGISTERS[match[1]]
        bits = np.ascontiguousarray(values).view(dtype)
        before = self._registers.get(register, np.zeros(self._num_threads, dtype))
        self._registers[register] = np.where(threads, bits, before)

    def _set_wider(self, register: str, values: Array, threads: Array) -> None:
        """Write values as `_set`; integers are extended to the register's width, by their sign if they have one."""
        dtype = np.dtype(REGISTERS[register.strip("%0123456789")])
        if values.dtype.itemsize < dtype.itemsize:
            values = values.astype(dtype)
        self._set(register, values, threads)

    def _address(self, operand: str) -> Array:
        base, _, offset = operand.strip("[] ").partition("+")
        return self._value(base.strip(), "u64") + np.uint64(int(offset or 0))

    # ---------------------------------------------------------------- memory

    def _ld(self, instruction: Instruction, threads: Array) -> None:
        _, space, *_, kind = instruction.opcode
        targets = _names(instruction.operands[0])
        if space == "param":
            number = self._arguments[instruction.operands[1].strip("[] ")]
            unsigned = np.dtype(f"u{np.dtype(TYPES[kind]).itemsize}")
            self._set_wider(targets[0], np.full(self._num_threads, number, unsigned).view(TYPES[kind]), threads)
            return
        if not threads.any():
            return
        itemsize = np.dtype(TYPES[kind]).itemsize
        found = np.zeros((self._num_threads, itemsize * len(targets)), np.uint8)
        found[threads] = self._memory[space].load(self._address(instruction.operands[1])[threads], found.shape[1])
        for i, target in enumerate(targets):
            part = np.ascontiguousarray(found[:, i * itemsize : (i + 1) * itemsize])
            self._set_wider(target, part.view(TYPES[kind]).reshape(-1), threads)

    def _st(self, instruction: Instruction, threads: Array) -> None:
        _, space, *_, kind = instruction.opcode
        if not threads.any():
            return
        parts = [self._value(name, kind).reshape(-1, 1).view(np.uint8) for name in _names(instruction.operands[1])]
        addresses = self._address(instruction.operands[0])[threads]
        self._memory[space].store(addresses, np.concatenate(parts, axis=1)[threads])

    def _bar(self, instruction: Instruction, threads: Array) -> None:
        """All threads are at the same instruction anyway."""

    def _shfl(self, instruction: Instruction, threads: Array) -> None:
        _, _, mode, kind = instruction.opcode
        if mode != "bfly":
            raise UnknownInstructionError(f"shfl.{mode}")
        target, source, lanes = instruction.operands[:3]
        thread = np.arange(self._num_threads)
        other = thread // WARP * WARP + (thread % WARP ^ int(lanes))
        self._set(target.partition("|")[0], self._value(source, kind)[other], threads)

    # ---------------------------------------------------------------- bits

    def _mov(self, instruction: Instruction, threads: Array) -> None:
        kind, (target, source) = instruction.opcode[-1], instruction.operands
        if source.startswith("{"):
            half = f"b{int(kind[1:]) // 2}"
            parts = [self._value(name, half).reshape(-1, 1) for name in _names(source)]
            self._set(target, np.concatenate(parts, axis=1).view(TYPES[kind]).reshape(-1), threads)
        elif target.startswith("{"):
            parts = self._value(source, kind).reshape(-1, 1).view(TYPES[f"b{int(kind[1:]) // 2}"])
            for i, name in enumerate(_names(target)):
                if name != "_":
                    self._set(name, np.ascontiguousarray(parts[:, i]), threads)
        else:
            self._set(target, self._value(source, kind), threads)

    def _prmt(self, instruction: Instruction, threads: Array) -> None:
        target, first, second, selector = instruction.operands
        words = [self._value(name, "b32").reshape(-1, 1).view(np.uint8) for name in (first, second)]
        choice = [int(selector.rstrip("U"), 0) >> 4 * i & 7 for i in range(4)]
        chosen = np.ascontiguousarray(np.concatenate(words, axis=1)[:, choice])
        self._set(target, chosen.view(np.uint32).reshape(-1), threads)

    def _bfe(self, instruction: Instruction, threads: Array) -> None:
        kind, (target, source, position, length) = instruction.opcode[-1], instruction.operands
        width = 8 * np.dtype(TYPES[kind]).itemsize
        values = self._value(source, kind)
        up = values << np.array(width - int(position) - int(length), values.dtype)
        self._set(target, up >> np.array(width - int(length), values.dtype), threads)

    def _selp(self, instruction: Instruction, threads: Array) -> None:
        kind, (target, first, second, condition) = instruction.opcode[-1], instruction.operands
        chosen = np.where(self._value(condition, "pred"), self._value(first, kind), self._value(second, kind))
        self._set(target, chosen, threads)

    def _setp(self, instruction: Instruction, threads: Array) -> None:
        _, comparison, *modifiers, kind = instruction.opcode
        if modifiers:
            raise UnknownInstructionError(".".join(instruction.opcode))
        target, first, second = instruction.operands
        self._set(target, COMPARISONS[comparison](self._value(first, kind), self._value(second, kind)), threads)

    # ---------------------------------------------------------------- numbers

    def _cvt(self, instruction: Instruction, threads: Array) -> None:
        *modifiers, target_kind, source_kind = instruction.opcode[1:]
        target, *sources = instruction.operands
        if target_kind == "f16x2":
            low, high = (self._value(name, source_kind).astype(np.float16) for name in reversed(sources))
            self._set(target, np.stack([low, high], axis=1).reshape(-1).view(np.uint32), threads)
            return
        if modifiers not in ([], ["rn"]):
            raise UnknownInstructionError(".".join(instruction.opcode))
        values = self._value(sources[0], source_kind).astype(TYPES[target_kind])
        self._set_wider(target, values, threads)

    def _mul(self, instruction: Instruction, threads: Array) -> None:
        if instruction.opcode[1] not in ("lo", "wide"):
            self._compute(instruction, threads)
            return
        self._set(instruction.operands[0], self._product(instruction), threads)

    def _mad(self, instruction: Instruction, threads: Array) -> None:
        product = self._product(instruction)
        addend = self._value(instruction.operands[3], f"u{8 * product.dtype.itemsize}")
        self._set(instruction.operands[0], product.view(addend.dtype) + addend, threads)

    def _product(self, instruction: Instruction) -> Array:
        _, part, kind = instruction.opcode
        first, second = (self._value(name, kind) for name in instruction.operands[1:3])
        if part == "wide":
            wide = TYPES[f"{kind[0]}{2 * int(kind[1:])}"]
            first, second = first.astype(wide), second.astype(wide)
        return first * second

    def _neg(self, instruction: Instruction, threads: Array) -> None:
        self._set(instruction.operands[0], -self._value(instruction.operands[1], instruction.opcode[-1]), threads)

    def _not(self, instruction: Instruction, threads: Array) -> None:
        self._set(instruction.operands[0], ~self._value(instruction.operands[1], instruction.opcode[-1]), threads)

    def _compute(self, instruction: Instruction, threads: Array) -> None:
        name, *modifiers, kind = instruction.opcode
        target, *sources = instruction.operands
        if kind in ("f32", "f64", "f32x2"):
            if modifiers != ["rn"]:
                raise UnknownInstructionError(f"{'.'.join(instruction.opcode)}: expected .rn and no other rounding")
            values = [self._value(name, "b64" if kind == "f32x2" else kind) for name in sources]
            if kind == "f32x2":
                values = [np.ascontiguousarray(each).view(np.float32) for each in values]
            self._set(target, FLOATING[name](*values), threads)
            return
        if modifiers:
            raise UnknownInstructionError(".".join(instruction.opcode))
        first = self._value(sources[0], kind)
        second = self._value(sources[1], "u32" if name in ("shl", "shr") else kind)
        if name == "div":
            self._set(target, _divide_to_zero(first, second), threads)
            return
        self._set(target, INTEGER[name](first, second.astype(first.dtype)), threads)


def launch(program: Program, num_blocks: int, memory: Memory, arguments: Sequence[int]) -> None:
    """Execute a grid, block after block.

    Args:
        program: the kernel.
        num_blocks: of the grid.
        memory: what its pointers point into.
        arguments: bits of the parameters, in order; those that the compiler adds for itself may be left out.

    Raises:
        UnknownInstructionError: an instruction is not known, or rounds otherwise than to the nearest.
        IndexError: an access is beyond a buffer, or not aligned.
    """
    with np.errstate(all="ignore"):
        for number in range(num_blocks):
            _Block(program, memory, arguments, number).run()


def _divide_to_zero(first: Array, second: Array) -> Array:
    """Divide integers, rounding to zero as PTX does; numpy rounds down."""
    quotient = np.floor_divide(first, second)
    is_too_low = (quotient < 0) & (quotient * second != first)
    return (quotient + is_too_low).astype(first.dtype)


def _names(operand: str) -> list[str]:
    return [name.strip() for name in operand.strip("{} ").split(",")]
