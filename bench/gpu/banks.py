"""Bank conflicts of a kernel's accesses to shared memory, and what its loads fetch from global memory, counted from
its PTX.

Shared memory has 32 banks of four bytes and serves each once a clock. An access of a warp takes as many passes as the
busiest bank has different words to give. Of what a program's threads load together, each sector of global memory comes
once: threads that ask for the same one, as for the number of a column, find it in the first-level cache. The addresses
are arithmetic on the thread's index, which is carried out here for the threads of the first program, with pointers and
offsets of 0, since within Triton's kernels what is added to all addresses alike does not change who meets whom, and
with widths and counts that part the rows.
"""

import re
from collections import Counter
from collections.abc import Callable

import numpy as np

BANKS = 32
BANK_BYTES = 4
WARP = 32
SECTOR_BYTES = 32
SIZE = 1024  # of every width and count that a kernel is given
MATRIX_ROWS, MATRIX_ROW_BYTES = 8, 16  # of what LDSM and STSM move: an address per row
MACHINE_NAMES = {"ld": "LDS", "st": "STS", "ldmatrix": "LDSM", "stmatrix": "STSM"}
STATEMENT = re.compile(r"(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+(.*?);")
ADDRESS = re.compile(r"\[\s*(%?\w+)\s*(?:\+\s*(-?\d+))?\s*\]")
LOW_HALF = 0xFFFFFFFF

Values = np.ndarray  # int64, one per thread or [1] for all

COMPARISONS = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
               "ge": np.greater_equal}  # fmt: skip
ARITHMETIC: dict[str, Callable[..., Values]] = {
    "mov": lambda a: a,
    "cvt": lambda a: a,
    "cvta": lambda a: a,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "mad": lambda a, b, c: a * b + c,
    "shl": lambda a, b: (a & LOW_HALF) << b,
    "shr": lambda a, b: (a & LOW_HALF) >> b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a,
    "neg": lambda a: -a,
    "div": lambda a, b: a // np.maximum(b, 1),
    "rem": lambda a, b: a % np.maximum(b, 1),
    "bfe": lambda a, start, size: (a & LOW_HALF) >> start & (1 << size) - 1,
    "bfi": lambda a, b, start, size: b & ~((1 << size) - 1 << start) | (a << start) & ((1 << size) - 1 << start),
    "min": np.minimum,
    "max": np.maximum,
    "selp": lambda a, b, p: np.where(p != 0, a, b),
    "shfl": lambda a, *rest: np.repeat(a[::WARP], min(WARP, len(a))),  # Triton spreads the warp's own index so
}


def conflicts(ptx: str) -> dict[tuple[str, int], float]:
    """Passes over the fewest that the bytes need, by machine instruction and bytes per thread (0: a matrix), averaged
    over the accesses of a kind. An access whose addresses do not follow from the thread's index is left out.
    """
    taken: Counter[tuple[str, int]] = Counter()
    least: Counter[tuple[str, int]] = Counter()
    for opcode, addresses in accesses(ptx):
        name, *modifiers = opcode.split(".")
        kind = MACHINE_NAMES[name], 0 if "matrix" in name else access_bytes(modifiers)
        passes, needed = matrix_passes(addresses, modifiers) if "matrix" in name else plain_passes(addresses, kind[1])
        taken[kind] += passes
        least[kind] += needed
    return {kind: taken[kind] / least[kind] for kind in taken}


def fetched(ptx: str, warps: int) -> dict[tuple[str, int], float]:
    """Bytes that a program fetches over those that its threads load from global memory, by machine instruction and
    bytes per thread, averaged over the loads of a kind; at most 1. Asynchronous copies are of distinct bytes.
    """
    came: Counter[tuple[str, int]] = Counter()
    asked: Counter[tuple[str, int]] = Counter()
    for opcode, addresses in accesses(ptx, "global", warps):
        name, *modifiers = opcode.split(".")
        if name == "ld":
            kind = "LDG", access_bytes(modifiers)
            asked[kind] += len(addresses) * kind[1]
            came[kind] += min(len(addresses) * kind[1], len(np.unique(addresses // SECTOR_BYTES)) * SECTOR_BYTES)
    return {kind: came[kind] / asked[kind] for kind in asked}


def accesses(ptx: str, space: str = "shared", warps: int = 1) -> list[tuple[str, Values]]:
    """(opcode, addresses of the first warps' threads) of each access to shared or global memory. A register keeps its
    first value: what a loop adds to an address, it adds for all threads.
    """
    threads = np.arange(warps * WARP)
    known: dict[str, Values | None] = {"%tid.x": threads, "%laneid": threads % WARP}
    found = []
    for line in ptx.splitlines():
        if not (match := STATEMENT.match(line.split("//")[0].strip())):
            continue
        opcode, arguments = match[1], split_arguments(match[2])
        name, *modifiers = opcode.split(".")
        if name in MACHINE_NAMES and any(part.startswith(space) for part in modifiers):
            address = ADDRESS.search(match[2])
            base = value(address[1], known) if address else None
            if base is not None:
                found.append((opcode, np.broadcast_to(base + int(address[2] or 0), threads.shape)))
        elif arguments:
            result = evaluate(name, modifiers, arguments[1:], known)
            for register in re.findall(r"%\w+", arguments[0]):
                known.setdefault(register, result)
    return found


def evaluate(name: str, modifiers: list[str], arguments: list[str], known: dict) -> Values | None:
    """None where an operand is unknown, or the operation is not one that addresses are made by."""
    if name == "ld" and "param" in modifiers:
        return np.full(1, 0 if modifiers[-1].endswith("64") else SIZE)
    if any(re.fullmatch(r"b?f\d+(x2)?", part) for part in modifiers):
        return None
    table = int(arguments.pop(), 0) if name == "lop3" else 0
    operands = [value(argument, known) for argument in arguments]
    if not operands or any(operand is None for operand in operands):
        return None
    if name == "lop3":
        return any_of_three(*operands, table)
    if name == "setp":
        return COMPARISONS[modifiers[0]](*operands[:2]).astype(np.int64) if modifiers[0] in COMPARISONS else None
    operation = ARITHMETIC.get(name)
    return None if operation is None else operation(*operands)


def value(text: str, known: dict) -> Values | None:
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", text):
        return np.full(1, int(text, 0))
    if re.match(r"%n?ctaid", text) or re.fullmatch(r"[a-zA-Z_]\w*", text):  # the program; a buffer's name
        return np.zeros(1, np.int64)
    return known.get(text)


def any_of_three(a: Values, b: Values, c: Values, table: int) -> Values:
    """LOP3: bit k of the table is the result where the three operands' bits spell k."""
    result = np.zeros(1, np.int64)
    for k in range(8):
        if table >> k & 1:
            result = result | (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
    return result & LOW_HALF


def split_arguments(text: str) -> list[str]:
    """At the commas outside braces and brackets."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text)]


def access_bytes(modifiers: list[str]) -> int:
    """Bytes per thread: v4.b32 is 16."""
    count = next((int(part[1:]) for part in modifiers if re.fullmatch(r"v[248]", part)), 1)
    return count * int(re.search(r"\d+$", modifiers[-1])[0]) // 8


def plain_passes(addresses: Values, width: int) -> tuple[int, int]:
    """(passes, fewest): the threads go in groups that ask for 128 bytes together."""
    group = WARP if width <= BANK_BYTES else BANKS * BANK_BYTES // width
    words = (addresses[:, None] + np.arange(0, max(width, BANK_BYTES), BANK_BYTES)) // BANK_BYTES  # [32, words each]
    passes = sum(int(np.bincount(np.unique(words[k : k + group]) % BANKS).max()) for k in range(0, WARP, group))
    return passes, WARP // group


def matrix_passes(addresses: Values, modifiers: list[str]) -> tuple[int, int]:
    """(passes, fewest): thread 8·i + j has the address of row j of matrix i; the eight rows of one go at a time."""
    count = next((int(part[1:]) for part in modifiers if re.fullmatch(r"x[124]", part)), 1)
    rows = addresses[: count * MATRIX_ROWS].reshape(count, MATRIX_ROWS) // MATRIX_ROW_BYTES
    wide_banks = BANKS * BANK_BYTES // MATRIX_ROW_BYTES
    return sum(int(np.bincount(np.unique(of_one) % wide_banks).max()) for of_one in rows), count
