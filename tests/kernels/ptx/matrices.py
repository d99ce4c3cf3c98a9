"""The matrix instructions: how fragments lie in the lanes of a warp and operands in shared memory, and the products.

A lane is 4·g + t. Of an operand with e elements to a register (two of 16 bits, else one), register r holds of A the
rows g + 8·(r mod 2) and the columns e·t … + 4e·⌊r/2⌋, of B the row g of Bᵀ and the columns e·t … + 4e·r; of the result
the rows g + 8·⌊r/2⌋ and the columns 2t + r mod 2. A warp of a warpgroup has 16 of the 64 rows, and eight columns more
with every four registers.
"""

import re

import numpy as np

from .memory import Shared
from .scalars import as_type

Array = np.ndarray
LANE = np.arange(32)
G, T = LANE // 4, LANE % 4
GROUP = 128


def shape_of(operation: tuple[str, ...]) -> tuple[int, int, int]:
    text = next(x for x in operation if re.fullmatch(r"m\d+n\d+k\d+", x))
    return tuple(int(x) for x in re.findall(r"\d+", text))


def elements(words: Array, kind: str) -> Array:
    """``[..., e]``: the numbers in a register, in float64."""
    if kind in ("f16", "bf16"):
        words = np.stack([words & np.uint64(0xFFFF), (words >> np.uint64(16)) & np.uint64(0xFFFF)], -1)
    else:
        words = words[..., None]
    return as_type(words, kind).astype(np.float64)


def left(registers: list[Array], columns: int, kind: str, rows: int = 16) -> Array:
    """``[warps, rows, columns]`` of A from registers ``[threads]``."""
    per = 2 if kind in ("f16", "bf16") else 1
    found = np.zeros((len(registers[0]) // 32, rows, columns))
    halves = rows // 8
    for r, words in enumerate(registers):
        row, column = G + 8 * (r % halves), per * T + 4 * per * (r // halves)
        numbers = elements(words.reshape(-1, 32), kind)
        for e in range(per):
            found[:, row, column + e] = numbers[..., e]
    return found


def right(registers: list[Array], columns: int, kind: str) -> Array:
    """``[warps, 8, columns]`` of Bᵀ."""
    per = 2 if kind in ("f16", "bf16") else 1
    found = np.zeros((len(registers[0]) // 32, 8, columns))
    for r, words in enumerate(registers):
        numbers = elements(words.reshape(-1, 32), kind)
        for e in range(per):
            found[:, G, per * T + 4 * per * r + e] = numbers[..., e]
    return found


def result_place(r: int) -> tuple[Array, Array]:
    """(rows, columns) of the lanes' register r of a result."""
    return G + 8 * (r // 2 % 2), 2 * T + r % 2 + 8 * (r // 4)


def operand(shared: Shared, descriptor: int, rows: int, columns: int, kind: str, transposed: bool, warps: int, at: str):
    """``[rows, columns]`` of a tile in shared memory, by a descriptor of the matrix unit.

    From the lowest bit: address, leading and stride offsets in units of 16 bytes, 14 of 16 bits each, and above the
    swizzle: chunks of 16 bytes are exchanged by the exclusive or with bits of their row.
    """
    size = 4 if kind == "tf32" else 2
    start, leading, stride = (((descriptor >> k) & 0x3FFF) << 4 for k in (0, 16, 32))
    mode = descriptor >> 62
    line, bits = {0: (16, 0), 1: (128, 3), 2: (64, 2), 3: (32, 1)}[mode]
    i, j = np.arange(rows)[:, None], np.arange(columns)[None, :]
    if transposed:
        place = i * size // line * leading + j // 8 * stride + j % 8 * line + i * size % line
    elif mode:
        place = i // 8 * stride + i % 8 * line + j * size
    else:
        place = i // 8 * stride + j * size // 16 * leading + i % 8 * 16 + j * size % 16
    place = start + place
    place = place ^ ((place >> 7) & ((1 << bits) - 1)) << 4
    raw = shared.load_operand(shared.places(place.reshape(-1).astype(np.uint64), size), warps, at)
    words = np.ascontiguousarray(raw).view(np.uint32 if size == 4 else np.uint16).reshape(rows, columns)
    return as_type(words.astype(np.uint64), kind).astype(np.float64)


def tile_rows(words: list[Array], transposed: bool) -> Array:
    """``ldmatrix``: 8 rows of 8 numbers of 16 bits, ``[warps, 8, 8]``, as every lane's two."""
    tile = words.swapaxes(1, 2) if transposed else words
    pairs = np.ascontiguousarray(tile).astype(np.uint64).reshape(len(tile), 32, 2)
    return (pairs[..., 0] | pairs[..., 1] << np.uint64(16)).reshape(-1)


def lane_rows(words: Array, transposed: bool) -> Array:
    """``stmatrix``, the reverse: ``[warps, 8, 8]`` from every lane's two."""
    halves = np.stack([words & np.uint64(0xFFFF), (words >> np.uint64(16)) & np.uint64(0xFFFF)], -1)
    tile = halves.astype(np.uint16).reshape(-1, 8, 8)
    return np.ascontiguousarray(tile.swapaxes(1, 2) if transposed else tile)
