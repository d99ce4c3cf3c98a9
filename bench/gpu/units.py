"""What an instruction costs: the clocks for which one warp's copy of it keeps each unit of a multiprocessor busy.

Units that a program uses in turn (:data:`TURNS`): ``matrix``; ``exponential`` (MUFU and the conversions on its pipe);
``float``; ``integer`` (also comparisons, selections and packing conversions, as on the hardware); ``shared`` (shared
memory, shuffles, tensor memory, global loads to registers); ``other`` (control and uniform instructions, an issue slot
each). Units that work beside it (:data:`BESIDE`): ``copies`` (asynchronous writes to shared memory, and the matrix
unit's reads from it) and ``cache`` (bytes from the second-level cache; a thread's own memory, and what others of the
program load too, stay in the first).
``issue`` counts every instruction.

Not clocks but counts, of a step alone: ``waits`` (:data:`WAITS`), and ``shallow``, 1 where asynchronous loads have only
two stages.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator

from bench.gpu.devices import Device
from bench.gpu.disassembly import Binary, Instruction

TURNS = ("matrix", "exponential", "float", "integer", "shared", "other")
BESIDE = ("copies", "cache")
WAITS = re.compile(
    r"LDL|BAR|WARPGROUP\.DEPBAR"
)  # a warp stands still until memory, the others or the products are there
SHALLOW_STAGES = 2
WARP = 32
OPERAND_BYTES = {"16-bit": 2, "tf32": 4, "float64": 8}
BLACKWELL_DEPTH_BYTES = 32  # of both operands, per UTCHMMA
BLACKWELL_TF32 = 2  # the operand format in the instruction descriptor

FLOAT = {"FADD", "FMUL", "FFMA", "FADD32I", "FMUL32I", "FFMA32I", "HADD2", "HMUL2", "HFMA2", "FSWZADD"}
PACKED_FLOAT = {"FADD2", "FMUL2", "FFMA2"}
DOUBLE = {"DADD", "DMUL", "DFMA", "DSETP", "DMNMX"}
EXPONENTIAL = {"MUFU", "F2F", "F2I", "I2F", "FRND", "POPC", "FLO", "BREV"}
INTEGER = re.compile(
    r"(V?I?MNMX\w*|V?IADD\w*|IMAD|LEA|LOP3|LOP|SHF|SHL|SHR|PRMT|F?SEL|FMNMX3?|FSET|FSETP|FCHK|HSETP2|HMNMX2|ISETP|IABS"
    r"|BMSK|SGXT|MOV|MOV32I|F2FP|I2FP|F2IP|I2I|I2IP|P2R|R2P|PLOP3|IDP)$"
)


def walk(binary: Binary, device: Device) -> Iterator[tuple[bool, Counter[str]]]:
    """(in a step?, clocks by unit for the whole program) of every instruction but the loop's rare paths.

    The shapes of UTCHMMA stand in uniform registers, whose literals are followed along the listing.
    """
    literals: dict[str, int] = {}
    for k, instruction in enumerate(binary.instructions):
        if match := re.match(r"(UR\d+)", instruction.operands):
            literals.pop(match[1], None)
        if instruction.opcode == "UMOV" and (match := re.match(r"(UR\d+), (0x[0-9a-f]+)", instruction.operands)):
            literals[match[1]] = int(match[2], 16)
        if k in binary.rare:
            continue
        if register := re.search(r"idesc\[(UR\d+)\]", instruction.operands):
            yield k in binary.step, blackwell_costs(instruction, literals[register[1]], device)
        else:
            found = costs(instruction, device)
            access = memory_access(instruction)
            found["shared"] *= binary.conflicts.get(access, 1)
            found["cache"] *= binary.fetched.get(access, 1)
            yield k in binary.step, Counter({unit: binary.warps * clocks for unit, clocks in found.items()})


def memory_access(instruction: Instruction) -> tuple[str, int]:
    """The kind of an access to memory, as :mod:`bench.gpu.banks` names it."""
    name, *modifiers = instruction.parts()
    return name, 0 if name in ("LDSM", "STSM") else _width(modifiers)


def waiting(binary: Binary) -> Counter[str]:
    """The counts of a step: how often a program waits in it, and whether its loads are only a tile ahead."""
    step = [binary.instructions[k] for k in binary.step]
    loads_ahead = any(instruction.parts()[0] == "LDGSTS" for instruction in step)
    return Counter(
        waits=sum(bool(WAITS.match(instruction.opcode)) for instruction in step),
        shallow=int(loads_ahead and binary.pipeline_stages == SHALLOW_STAGES),
    )


def blackwell_costs(instruction: Instruction, descriptor: int, device: Device) -> Counter[str]:
    """A UTCHMMA, issued once by the whole program. The descriptor holds N/8 in bits 17-22 and M/16 in bits 24-28."""
    rows, columns = (descriptor >> 24 & 0x1F) * 16, (descriptor >> 17 & 0x3F) * 8
    kind = "tf32" if descriptor >> 7 & 7 == BLACKWELL_TF32 else "16-bit"
    multiply_adds = rows * columns * BLACKWELL_DEPTH_BYTES // OPERAND_BYTES[kind]
    from_shared = columns + (0 if instruction.operands.startswith("tmem") else rows)
    return _matrix_costs(multiply_adds / device.products[kind], from_shared * BLACKWELL_DEPTH_BYTES, device)


def costs(instruction: Instruction, device: Device) -> Counter[str]:
    name, *modifiers = instruction.parts()
    slot = 1 / device.issue_slots
    found = Counter(issue=slot)
    if name == "HGMMA":  # issued by the four warps of a group together
        rows, columns, depth = (int(size) for size in modifiers[0].split("x"))
        kind = "tf32" if "TF32" in modifiers else "16-bit"
        from_shared = columns + rows * instruction.operands.split(",")[1].strip().startswith("gdesc")
        clocks = rows * columns * depth / device.products[kind] / 4
        found += _matrix_costs(clocks, from_shared * depth * OPERAND_BYTES[kind] / 4, device)
    elif name in ("HMMA", "DMMA"):
        kind = "float64" if name == "DMMA" else "tf32" if "TF32" in modifiers else "16-bit"
        share = device.warp_matrix_share if name == "HMMA" else 1
        found["matrix"] = _warp_multiply_adds(modifiers[0]) / device.products[kind] / share
    elif name in FLOAT or name in PACKED_FLOAT:
        found["float"] = WARP * (2 if name in PACKED_FLOAT else 1) / device.float_lanes
    elif name in DOUBLE:
        found["float"] = WARP / device.double_lanes
    elif name in EXPONENTIAL:
        found["exponential"] = WARP / device.exponential_lanes
    elif INTEGER.match(name):
        found["integer"] = WARP / device.integer_lanes
    elif name in ("LDTM", "STTM"):
        found["shared"] = WARP * 4 * _registers(instruction) / device.tensor_memory_bytes
    elif name == "LDGSTS":
        found["other"] = slot
        found["copies"] = WARP * _width(modifiers) / device.shared_bytes
    elif name in ("LDS", "STS", "ATOMS", "LDSM", "STSM", "SHFL", "LDG", "STG", "LD", "ST", "ATOMG", "LDL", "STL"):
        found["shared"] = WARP * _width(modifiers) / device.shared_bytes
    else:
        found["other"] = slot
    if name in ("LDGSTS", "LDG", "STG", "LD", "ST", "ATOMG"):
        found["cache"] = WARP * _width(modifiers) / device.cache_bytes()
    return found


def _matrix_costs(clocks: float, shared_bytes: float, device: Device) -> Counter[str]:
    """The matrix unit is busy for as long as its operands come, if that is longer."""
    reading = shared_bytes / device.shared_bytes
    return Counter(matrix=max(clocks, reading), copies=reading)


def _warp_multiply_adds(shape: str) -> int:
    """16816 is 16 × 8 × 16; 884 and 8x8x4 are 8 × 8 × 4."""
    if "x" in shape:
        return math.prod(int(size) for size in shape.split("x"))
    if shape == "884":
        return 8 * 8 * 4
    return 16 * 8 * int(shape.removeprefix("168"))


def _width(modifiers: list[str]) -> int:
    """Bytes per thread; a matrix of LDSM and STSM is four."""
    if any(part.startswith("M88") or part.startswith("MT88") for part in modifiers):
        return 4 * int(modifiers[-1]) if modifiers[-1] in ("2", "4") else 4
    widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
    return next((widths[part] for part in modifiers if part in widths), 4)


def _registers(instruction: Instruction) -> int:
    match = re.search(r"\.x(\d+)", instruction.opcode)
    return int(match[1]) if match else 1
