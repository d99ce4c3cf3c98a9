"""Launch configurations: tile sizes by architecture, product type, width and kernel. The batch size is no key.

One line per architecture, type and width: the tiles of every kernel of ``KERNELS`` in order, as rows × columns, warps
and stages of the loads' pipeline. None of them spills a register (tests/kernels/test_compile.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

Key = tuple[str, str, str, int]  # kernel, architecture, product type, width

MULTIPROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_90": 132, "sm_100": 148, "gfx942": 304}

# Of every two neighbouring entries, how many bounded exponentials go to the float units.
POLYNOMIALS = {"sm_80": 1, "sm_86": 2, "sm_90": 2, "sm_100": 2, "gfx942": 0}

KERNELS = (
    "relation_sums", "relation_gradients", "contrast_sums", "contrast_gradients", "graph_degree_sums", "graph_sums",
    "graph_gradients",
)  # fmt: skip
TYPES = {
    "bfloat16": "short", "float16": "short", "tf32": "tf32", "tf32x3": "tf32x3", "float32": "ieee", "float64": "float64",
}  # fmt: skip

_LINES = """
"""


@dataclass(frozen=True)
class Tiles:
    """Rows that a program owns, columns per step of its walk, warps, and stages of the loads' pipeline."""

    rows: int
    columns: int
    warps: int
    stages: int

    @staticmethod
    def parse(text: str) -> "Tiles":
        """From "128x64w8s2"."""
        return Tiles(*(int(x) for x in text.replace("w", "x").replace("s", "x").split("x")))

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}w{self.warps}s{self.stages}"


def _parse(lines: str) -> dict[tuple[str, str, int], dict[str, Tiles]]:
    entries = {}
    for line in lines.strip().splitlines():
        arch, kind, width, *texts = line.split()
        entries[arch, kind, int(width)] = dict(zip(KERNELS, map(Tiles.parse, texts), strict=True))
    return entries


_ENTRIES = _parse(_LINES)

# Strips hold similarities, not rows: their tiles only pass through registers.
STRIP = Tiles(32, 64, 4, 1)

# Found by ``autotune`` in this process.
overrides: dict[Key, Tiles] = {}
_forced: tuple[Tiles, int] | None = None
_recorded: set[Key] | None = None


def tiles(kernel: str, arch: str, product: str, width: int) -> Tiles:
    """The configuration of a kernel for rows of up to ``width`` (16, 32, 64, 128, 256), or of kernel "strip"."""
    if _forced is not None:
        return _forced[0]
    if kernel == "strip":
        return STRIP
    key = (kernel, arch, product, max(64, width))
    if _recorded is not None:
        _recorded.add(key)
    return overrides.get(key) or _ENTRIES[arch, TYPES[product], key[-1]][kernel]


def largest_width(arch: str, product: str) -> int:
    """The widest rows whose block and gradient fit a program; wider ones are multiplied in strips."""
    if _forced is not None:
        return _forced[1]
    return max(width for entry_arch, kind, width in _ENTRIES if (entry_arch, kind) == (arch, TYPES[product]))


def relation_group(kernel: str, arch: str, product: str, width: int) -> tuple[int, int]:
    """The most students and teachers that share one launch of relation_kl."""
    return 1, 1


def line(key: Key, chosen: Tiles) -> str:
    """An entry in words, for people to put into the table."""
    kernel, arch, product, width = key
    return f"{arch} {TYPES[product]} {width}: {kernel} {chosen}"


@contextmanager
def forced(rows: int, columns: int, warps: int = 4, stages: int = 1, width: int = 256) -> Iterator[None]:
    """Within this context every kernel uses these tile sizes, and rows wider than ``width`` go in strips."""
    global _forced
    before, _forced = _forced, (Tiles(rows, columns, warps, stages), width)
    try:
        yield
    finally:
        _forced = before


@contextmanager
def recorded() -> Iterator[set[Key]]:
    """Within this context the keys that are asked for are collected."""
    global _recorded
    before, _recorded = _recorded, set()
    try:
        yield _recorded
    finally:
        _recorded = before
