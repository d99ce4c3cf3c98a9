"""Reads a disassembled Hopper kernel: its instructions, the registers that each reads and writes, and its flow."""

import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import triton

TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"

_LINE = re.compile(r"\s*/\*([0-9a-f]+)\*/\s+(?:\{\s*)?(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"(\.L\w+):")
_BETWEEN_OPERANDS = re.compile(r",\s*(?![^\[(]*[\])])")
_REGISTER = re.compile(r"(?<![\w.])(U?R)(\d+)(\.64)?")
_PREDICATE = re.compile(r"!?(U?P\d)")
# Operations without a result in a register.
_NO_RESULT = (
    "BAR", "BRA", "BREAK", "BSSY", "BSYNC", "CCTL", "DEPBAR", "ERRBAR", "EXIT", "FENCE", "LDGDEPBAR", "LDGSTS",
    "MEMBAR", "NANOSLEEP", "NOP", "RED", "ST", "WARPGROUP", "WARPSYNC", "YIELD",
)  # fmt: skip
# Registers of a matrix instruction's result and of its three operands.
_MATRIX = {
    "HMMA.16816.F32": (4, 4, 2, 4), "HMMA.1688.F32": (4, 2, 1, 4), "HMMA.1688.F32.TF32": (4, 4, 2, 4),
    "HMMA.1684.F32.TF32": (4, 2, 1, 4), "DMMA.8x8x4": (4, 2, 2, 4), "DMMA.16x8x4": (8, 4, 2, 8),
    "DMMA.16x8x8": (8, 8, 4, 8), "DMMA.16x8x16": (8, 16, 8, 8),
}  # fmt: skip

State = TypeVar("State")


@dataclass(frozen=True)
class Instruction:
    """``guard`` is the predicate ("P0", "!UP2") under which it acts, or nothing."""

    address: int
    guard: str
    opcode: str
    operands: tuple[str, ...]

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{self.address:#x} {guard}{self.opcode} {', '.join(self.operands)}"

    def is_a(self, *names: str) -> bool:
        return self.opcode.split(".")[0] in names

    @cached_property
    def results(self) -> int:
        """How many of the operands, the first ones, are results."""
        if self.opcode.startswith(_NO_RESULT) or not self.operands:
            return 0
        if self.opcode.startswith(("HGMMA", "R2P")):
            return 1
        if re.match(r"[A-Z]*SETP|U?PLOP3", self.opcode):
            return 2
        first = next((k for k, x in enumerate(self.operands) if re.match(r"U?RZ|U?R\d", x)), 0)
        count = first + 1
        while self.is_a("IADD3", "UIADD3", "LEA", "ULEA", "IMAD", "UIMAD") and _is_predicate(self.operands[count]):
            count += 1
        return count

    @cached_property
    def writes(self) -> tuple[str, ...]:
        """Registers and predicates."""
        if self.opcode.startswith("R2P"):
            return tuple(f"P{k}" for k in range(7))
        return tuple(name for x in self.operands[: self.results] for name in self._registers(x, self._result_width()))

    @cached_property
    def reads(self) -> frozenset[str]:
        found = set(self._registers(self.guard, 1))
        for place, operand in enumerate(self.operands[self.results :]):
            if operand.startswith("gdesc"):
                found |= {name for pair in self.descriptors for name in pair}
            elif operand in self.writes and self._keeps_the_rest():
                continue
            elif "[" in operand:
                # Addresses, and the descriptor of a memory: a pair of uniform registers.
                for kind, number, long in _REGISTER.findall(operand):
                    pair = long or operand.startswith(f"desc[{kind}{number}]")
                    found |= set(_sequence(kind, number, 2 if pair else 1))
            else:
                found |= set(self._registers(operand, self._operand_width(place)))
        return frozenset(found)

    @cached_property
    def descriptors(self) -> tuple[tuple[str, str], ...]:
        """The lower and upper registers of the descriptors that an HGMMA takes its operands in shared memory by.

        It names four registers; where the first operand lies in registers the last two alone are used.
        """
        quad = re.search(r"gdesc\[UR(\d+)\]", ",".join(self.operands))
        if not self.is_a("HGMMA") or quad is None:
            return ()
        a, b, c, d = _sequence("UR", quad[1], 4)
        return ((c, d),) if self.operands[1].startswith("R") else ((a, b), (c, d))

    @cached_property
    def accumulators(self) -> tuple[str, ...]:
        return self.writes if self.is_a("HGMMA") else ()

    @cached_property
    def factors(self) -> tuple[str, ...]:
        """The registers of an HGMMA's first operand."""
        in_registers = self.is_a("HGMMA") and self.operands[1].startswith("R")
        return self._registers(self.operands[1], 4) if in_registers else ()

    def _registers(self, operand: str, width: int) -> tuple[str, ...]:
        if match := _PREDICATE.fullmatch(operand):
            return (match[1],)
        match = _REGISTER.search(operand)
        return tuple(_sequence(match[1], match[2], width)) if match else ()

    def _result_width(self) -> int:
        if self.is_a("HGMMA"):
            columns = int(re.search(r"x(\d+)x", self.opcode)[1])
            return columns // 2 if ".F32" in self.opcode else columns // 4
        if shape := self._matrix_shape():
            return shape[0]
        if matrices := re.search(r"\.M\w*88\.(\d)$", self.opcode):
            return int(matrices[1])
        if ".128" in self.opcode:
            return 4
        is_double = self.opcode.startswith(("DADD", "DFMA", "DMUL", "CS2R", "F2F.F64", "I2F.F64"))
        is_pair = (".64" in self.opcode and ".CS2R.32" not in self.opcode) or ".WIDE" in self.opcode
        return 2 if is_double or is_pair else 1

    def _operand_width(self, place: int) -> int:
        if self.is_a("HGMMA"):
            in_registers = self.operands[1].startswith("R")
            return 4 if place == 0 and in_registers else self._result_width()
        if shape := self._matrix_shape():
            return shape[1 + place] if place < 3 else 1
        if self.opcode.startswith(("ST", "RED")):
            return self._result_width() if place else 1
        is_double = self.opcode.startswith(("DADD", "DFMA", "DMUL", "DSETP")) or self.opcode.endswith(".F64")
        is_long_sum = self.opcode == "UIADD3.64" or (".WIDE" in self.opcode and place == 2)
        return 2 if is_double or is_long_sum else 1

    def _keeps_the_rest(self) -> bool:
        """Whether it changes a part of a register: a bit (predicates are packed so) or the lower half."""
        if self.is_a("PRMT"):
            return self.operands[2] in ("0x7632", "0x7610")
        if not self.opcode.startswith("LOP3.LUT") or self.operands[-2] != "0xc0":
            return False
        bits = [~int(x, 16) & 0xFFFFFFFF for x in self.operands[1:-2] if x.startswith("0x")]
        return any(x.bit_count() == 1 for x in bits)

    def _matrix_shape(self) -> tuple[int, ...] | None:
        if not self.is_a("HMMA", "DMMA"):
            return None
        name = self.opcode.removesuffix(".BF16")
        if name not in _MATRIX:
            raise ValueError(f"matrix instruction {self.opcode} is not known")
        return _MATRIX[name]


def _is_predicate(operand: str) -> bool:
    return re.fullmatch(r"U?P(\d|T)", operand) is not None


def _sequence(kind: str, first: str, count: int) -> list[str]:
    return [f"{kind}{int(first) + k}" for k in range(count)]


class Code:
    """Instructions in order, with where each may go on."""

    def __init__(self, listing: str):
        self.instructions: list[Instruction] = []
        labels = {}
        for line in listing.splitlines():
            if match := _LABEL.match(line):
                labels[match[1]] = len(self.instructions)
            elif match := _LINE.match(line):
                operands = _BETWEEN_OPERANDS.split(match[4]) if match[4] else []
                operands = tuple(x.strip().removesuffix(".reuse") for x in operands)
                guard = "" if match[2] in (None, "PT", "UPT") else match[2]
                self.instructions.append(Instruction(int(match[1], 16), guard, match[3], operands))
        self._targets = {
            k: labels[label[0]]
            for k, x in enumerate(self.instructions)
            if x.is_a("BRA") and (label := re.search(r"\.L\w+", x.operands[-1]))
        }

    def next(self, index: int) -> Iterator[tuple[int, str]]:
        """(instruction, the condition under which it follows: a predicate or nothing)."""
        x = self.instructions[index]
        # A condition beside the guard: BRA UP0, `(.L_x_1).
        condition = x.guard or (x.operands[0] if x.is_a("BRA") and len(x.operands) > 1 else "")
        if index in self._targets:
            yield self._targets[index], condition
        ends = x.is_a("BRA", "EXIT", "RET") and not condition
        if not ends and index + 1 < len(self.instructions):
            yield index + 1, opposite(condition) if x.is_a("BRA", "EXIT") else ""

    def solve(
        self, entry: State, step: Callable[[State, Instruction], State], join: Callable[[State, State], State],
        under: Callable[[State, str], State] = lambda state, condition: state,
    ) -> dict[int, State]:  # fmt: skip
        """The state before every instruction that may be reached: the least fixed point of a forward analysis."""
        before, pending = {0: entry}, [0]
        while pending:
            index = pending.pop()
            after = step(before[index], self.instructions[index])
            for to, condition in self.next(index):
                state = under(after, condition) if condition else after
                known = before.get(to)
                merged = state if known is None else join(known, state)
                if known is None or merged != known:
                    before[to] = merged
                    pending.append(to)
        return before


def opposite(condition: str) -> str:
    return condition.removeprefix("!") if condition.startswith("!") else f"!{condition}" * bool(condition)


def disassemble(cubin: Path) -> str:
    return subprocess.run([TOOL, "-c", cubin], capture_output=True, text=True, check=True).stdout
