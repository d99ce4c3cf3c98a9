"""PTX as text taken apart: a kernel's parameters, threads and instructions."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """``guard`` is the predicate under which a thread takes part, "" for all; ``operation`` the opcode at its dots."""

    guard: str
    operation: tuple[str, ...]
    operands: tuple[str, ...]
    registers: frozenset[str]

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{guard}{'.'.join(self.operation)} {', '.join(self.operands)}"[:160]


@dataclass(frozen=True)
class Program:
    name: str
    parameters: tuple[str, ...]
    threads: int
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


def parse(text: str) -> Program:
    text = re.sub(r"//[^\n]*", "", text[text.index(".entry") :])
    name = re.search(r"\.entry\s+(\w+)\s*\(", text)[1]
    head, body = text.split("{", 1)
    parameters = re.findall(rf"\.param\s+\.[^,)]*?({name}_param_\d+)", head)
    threads = int(re.search(r"\.reqntid\s+(\d+)", head)[1])
    body = re.sub(r"^\s*\.(loc|reg|file|section|pragma)\b[^\n]*", "", body, flags=re.MULTILINE)
    instructions, labels = [], {}
    for statement in re.split(r";|\n(?=\s*\$)|(?<=:)\s*\n", body):
        line = " ".join(statement.split())
        while match := re.match(r"([$\w]+):\s*", line):
            labels[match[1]] = len(instructions)
            line = line[match.end() :]
        # Braces around a few instructions that came as inline assembly.
        line = re.sub(r"^(?:[{}]\s*)+", "", line)
        if line and not line.startswith("."):
            instructions.append(_instruction(line))
    return Program(name, tuple(parameters), threads, tuple(instructions), labels)


def _instruction(line: str) -> Instruction:
    guard = ""
    if match := re.match(r"@(!?%\w+)\s+", line):
        guard, line = match[1], line[match.end() :]
    opcode, _, rest = line.partition(" ")
    operation = tuple(part.split("::")[0] if part.startswith("shared::") else part for part in opcode.split("."))
    operands = re.split(r",\s*(?![^{\[]*[}\]])", rest.strip()) if rest.strip() else []
    return Instruction(
        guard, operation, tuple(x.strip() for x in operands), frozenset(re.findall(r"%\w+", line))
    )  # fmt: skip


def members(operand: str) -> list[str]:
    """The registers of a vector, or the one."""
    return [x.strip() for x in operand.strip("{} ").split(",")]
