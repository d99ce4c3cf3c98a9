"""Reads a compiled kernel: its instructions, a step of its innermost loop with products, and what it takes to hold it.

NVIDIA's binaries are read with the ``nvdisasm`` and ``cuobjdump`` of Triton's wheel, AMD's from the assembly that
Triton keeps.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import networkx

from bench.gpu import banks
from bench.gpu.devices import LIMITS

MATRIX = re.compile(r"(HMMA|HGMMA|DMMA|UTC\w*MMA|v_mfma_)")
MULTIPLY_ADD = re.compile(r"(FFMA|DFMA|v_fmac?_|v_pk_fma)")
SPILLS = re.compile(r"(STL|LDL)\b|scratch_(load|store)")
TOOL_FOLDER = Path("backends/nvidia/bin")


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: str = ""
    guard: str = ""

    def parts(self) -> list[str]:
        return self.opcode.split(".")


@dataclass(frozen=True)
class Binary:
    """One compiled kernel.

    ``step`` holds the indices of the instructions that an ordinary step of the loop passes, ``rare`` those of the
    loop's other paths (tiles on the diagonal or at an edge, waits that fail). Both are empty where no loop multiplies.
    ``conflicts`` and ``fetched`` are those of :mod:`bench.gpu.banks`, ``pipeline_stages`` those of the loop's loads.
    """

    arch: str
    instructions: tuple[Instruction, ...]
    step: frozenset[int]
    rare: frozenset[int]
    registers: int
    stack_bytes: int
    shared_bytes: int
    warps: int
    tensor_columns: int = 0
    pipeline_stages: int = 1
    conflicts: dict[tuple[str, int], float] = field(default_factory=dict)
    fetched: dict[tuple[str, int], float] = field(default_factory=dict)

    def spills(self) -> int:
        """Instructions that move registers to or from a thread's own memory."""
        return sum(bool(SPILLS.match(x.opcode)) for x in self.instructions)

    def resident_programs(self) -> int:
        limits = LIMITS[self.arch]
        return limits.resident_programs(self.registers, self.shared_bytes, self.warps, self.tensor_columns)

    def occupancy(self) -> float:
        """Resident warps over the most that the architecture holds."""
        return self.resident_programs() * self.warps / LIMITS[self.arch].max_warps

    def mix(self) -> Counter[str]:
        """Instructions of a step by opcode, without what follows the operation's name and first modifier."""
        return Counter(".".join(self.instructions[k].parts()[:2]) for k in self.step)

    def has(self, pattern: str) -> bool:
        return any(re.match(pattern, x.opcode) for x in self.instructions)


def read(compiled) -> Binary:
    """The binary of what ``triton.compile`` returned."""
    metadata = compiled.metadata
    shared = {"shared_bytes": metadata.shared, "warps": metadata.num_warps}
    if "amdgcn" in compiled.asm:
        return _read_amd(compiled.asm["amdgcn"], metadata.target.arch, shared)
    usage = _tool("cuobjdump", "-res-usage", compiled.asm["cubin"])
    listing = _tool("nvdisasm", "-c", compiled.asm["cubin"])
    instructions, targets = parse_nvidia(listing)
    return Binary(
        f"sm_{metadata.target.arch}", tuple(instructions), *inner_loop(instructions, targets, _nvidia_flow),
        registers=_number(r"REG:(\d+)", usage), stack_bytes=_number(r"STACK:(\d+)", usage),
        tensor_columns=getattr(metadata, "tmem_size", 0) or 0, pipeline_stages=metadata.num_stages,
        conflicts=banks.conflicts(compiled.asm["ptx"]),
        fetched=banks.fetched(compiled.asm["ptx"], metadata.num_warps), **shared,
    )  # fmt: skip


def parse_nvidia(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions in order, and the index that each label stands before."""
    instructions, labels = [], {}
    for line in listing.splitlines():
        if match := re.match(r"(\.L\w+):", line):
            labels[match[1]] = len(instructions)
        elif match := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:\{\s*)?(@!?U?P\w+ +)?([A-Z][\w.]*)\s*(.*?)\s*;", line):
            instructions.append(Instruction(match[2], match[3], (match[1] or "").strip()))
    return instructions, labels


def parse_amd(assembly: str) -> tuple[list[Instruction], dict[str, int]]:
    instructions, labels = [], {}
    for line in assembly.splitlines():
        if match := re.match(r"(\.L\w+):", line):
            labels[match[1]] = len(instructions)
        elif match := re.match(r"\t([a-z]\w+)\s*([^;]*)", line):
            instructions.append(Instruction(match[1], match[2].strip()))
        elif line.startswith("\t.section") and instructions:
            break
    return instructions, labels


def inner_loop(instructions: list[Instruction], labels: dict[str, int], flow) -> tuple[frozenset[int], frozenset[int]]:
    """Indices of (an ordinary step, the other paths) of the innermost natural loop with the most matrix instructions.

    Where no loop has one, multiply-adds decide. ``flow(instruction)`` gives (label it may jump to or None, whether the
    next instruction may follow).
    """
    graph = networkx.DiGraph()
    graph.add_node(0)
    for k, instruction in enumerate(instructions):
        label, falls_through = flow(instruction)
        if label in labels and labels[label] < len(instructions):
            graph.add_edge(k, labels[label])
        if falls_through and k + 1 < len(instructions):
            graph.add_edge(k, k + 1)
    loops = _natural_loops(graph)
    for kind in (MATRIX, MULTIPLY_ADD):
        work = {k for k, instruction in enumerate(instructions) if kind.match(instruction.opcode)}
        working = {header: body for header, body in loops.items() if body & work}
        innermost = [h for h, body in working.items() if not any(other < body for other in working.values())]
        if innermost:
            header = max(innermost, key=lambda h: len(working[h] & work))
            step = _ordinary_path(graph.subgraph(working[header]), header, work)
            return step, working[header] - step
    return frozenset(), frozenset()


def _ordinary_path(loop: networkx.DiGraph, header: int, work: set[int]) -> frozenset[int]:
    """The path from the header back to it that does most of the work, and of those the one with fewest instructions."""
    once = networkx.DiGraph(loop)
    latches = list(loop.predecessors(header))
    once.remove_edges_from([(latch, header) for latch in latches])
    parts = networkx.condensation(once)
    best: dict[int, tuple[tuple[int, int], int | None]] = {}
    start = parts.graph["mapping"][header]
    for part in networkx.topological_sort(parts):
        members = parts.nodes[part]["members"]
        own = len(members & work), -len(members)
        before = [(best[k][0], k) for k in parts.predecessors(part) if k in best]
        if part == start:
            best[part] = own, None
        elif before:
            value, previous = max(before)
            best[part] = (value[0] + own[0], value[1] + own[1]), previous
    part = max((parts.graph["mapping"][latch] for latch in latches), key=lambda k: best[k][0])
    path: set[int] = set()
    while part is not None:
        path |= parts.nodes[part]["members"]
        part = best[part][1]
    return frozenset(path)


def _natural_loops(graph: networkx.DiGraph) -> dict[int, frozenset[int]]:
    """By header: all that reaches an edge back to the header without passing it."""
    reachable = graph.subgraph({0} | networkx.descendants(graph, 0))
    dominator = networkx.immediate_dominators(reachable, 0)
    bodies: dict[int, set[int]] = {}
    for tail, header in reachable.edges:
        if tail < header or not _dominates(dominator, header, tail):
            continue
        body, pending = bodies.setdefault(header, {header}), [tail]
        while pending:
            node = pending.pop()
            if node not in body:
                body.add(node)
                pending += reachable.predecessors(node)
    return {header: frozenset(body) for header, body in bodies.items()}


def _dominates(dominator: dict, header: int, node: int) -> bool:
    while node != header:
        above = dominator.get(node, node)
        if above is None or above == node:
            return False
        node = above
    return True


def _nvidia_flow(instruction: Instruction) -> tuple[str | None, bool]:
    name = instruction.parts()[0]
    if name not in ("BRA", "BRX", "JMP", "EXIT", "RET"):
        return None, True
    label = re.search(r"`\((\.L\w+)\)", instruction.operands)
    conditional = bool(instruction.guard) or instruction.operands.lstrip().startswith(("U", "P", "!"))
    return (label[1] if label else None), conditional


def _amd_flow(instruction: Instruction) -> tuple[str | None, bool]:
    name = instruction.opcode
    if name == "s_endpgm":
        return None, False
    if not name.startswith(("s_branch", "s_cbranch")):
        return None, True
    return instruction.operands.split()[-1], name != "s_branch"


def _read_amd(assembly: str, arch: str, shared: dict) -> Binary:
    instructions, labels = parse_amd(assembly)
    return Binary(
        arch, tuple(instructions), *inner_loop(instructions, labels, _amd_flow),
        registers=_number(r"\.vgpr_count:\s+(\d+)", assembly),
        stack_bytes=_number(r"\.private_segment_fixed_size:\s+(\d+)", assembly), **shared,
    )  # fmt: skip


def _tool(name: str, option: str, binary: bytes) -> str:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(Path(triton.__file__).parent / TOOL_FOLDER / name), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    return int(re.search(pattern, text)[1])
