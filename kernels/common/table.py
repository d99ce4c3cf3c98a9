"""Launch configurations: tile sizes by architecture, product type, width and kernel. The batch size is no key.

One line per architecture, type and width: the tiles of every kernel of ``KERNELS`` in order, as rows × columns, warps
and stages of the loads' pipeline. ``make test-kernels`` compiles them all and fails where one spills a register.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

Key = tuple[str, str, str, int]  # kernel, architecture, product type, width

MULTIPROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_90": 132, "sm_100": 148, "gfx942": 304}

# Of every two neighbouring entries, how many of relation_kl's bounded exponentials go to the float units.
POLYNOMIALS = {"sm_80": 0, "sm_86": 1, "sm_90": 0, "sm_100": 0, "gfx942": 0}

KERNELS = (
    "relation_sums", "relation_gradients", "contrast_sums", "contrast_gradients", "graph_degree_sums", "graph_sums",
    "graph_gradients", "neighbor_gradients",
)  # fmt: skip
TYPES = {
    "bfloat16": "short", "float16": "short", "float16x3": "split", "tf32": "tf32", "tf32x3": "tf32x3",
    "float32": "ieee", "float64": "float64",
}  # fmt: skip

_LINES = """
sm_80  short    64  64x64w8s2  64x64w4s2  64x64w4s2  64x64w4s2  64x64w4s2  64x64w4s2  128x64w8s2  64x32w8s1
sm_80  short   128  64x64w4s2  64x64w4s2  64x64w4s2  64x64w4s2  64x64w4s2  64x64w4s2  64x64w8s2  64x64w8s2
sm_80  short   256  64x32w8s2  64x64w8s2  64x64w8s2  64x64w8s2  64x64w4s2  64x64w8s2  64x32w8s1  64x32w8s1
sm_80  split    64  64x64w8s1  64x32w8s1  64x64w8s1  64x32w8s1  64x64w8s1  64x64w8s1  32x32w4s1  32x32w4s1
sm_80  split   128  64x32w8s1  64x32w8s1  64x32w8s1  64x32w8s1  64x32w8s1  64x32w8s1  32x32w8s1  32x32w8s1
sm_80  float64  64  16x16w4s1  16x16w4s1  16x16w4s1  16x16w4s1  16x16w4s1  16x16w4s1  16x16w4s1  16x16w4s1
sm_86  short    64  64x64w4s2  64x64w4s2  64x64w4s2  64x64w4s2  64x64w4s2  64x64w4s2  128x64w8s2  64x32w8s1
sm_86  short   128  64x64w8s2  64x64w4s2  64x64w4s2  64x64w4s2  64x64w4s2  64x64w4s2  64x64w4s1  64x64w8s1
sm_86  short   256  64x32w8s2  64x32w8s1  64x64w8s1  64x64w8s1  64x64w4s2  64x64w8s1  32x32w8s1  32x32w8s1
sm_86  split    64  64x64w8s1  64x32w8s1  64x64w8s1  64x32w8s1  64x64w8s1  64x64w8s1  32x32w4s1  32x32w4s1
sm_86  split   128  64x32w8s1  64x32w8s1  64x32w8s1  64x32w8s1  64x32w8s1  64x32w8s1  32x32w8s1  32x32w8s1
sm_86  float64  64  16x16w8s1  16x16w8s1  16x16w8s1  16x16w4s1  16x16w4s1  16x16w4s1  16x16w8s1  16x16w8s1
sm_90  short    64  64x128w4s3  64x64w4s2  64x128w4s3  64x64w4s2  64x64w4s2  64x128w4s3  64x64w4s2  64x64w4s2
sm_90  short   128  64x64w4s2  64x64w4s2  64x64w4s3  64x64w4s2  64x128w4s3  64x64w4s3  128x64w8s2  64x64w8s2
sm_90  short   256  64x64w4s1  32x64w4s2  64x64w8s2  64x64w8s2  128x64w8s2  64x64w8s2  64x32w8s2  32x32w4s2
sm_90  split    64  64x64w4s2  64x64w4s2  64x64w4s2  64x64w4s2  64x64w4s2  64x64w4s2  128x64w8s2  64x64w4s2
sm_90  split   128  64x64w4s1  128x64w8s1  64x32w4s2  64x32w4s2  128x64w8s1  64x32w4s2  64x32w4s2  64x32w4s2
sm_90  float64  64  16x16w4s1  16x16w4s1  16x16w4s1  16x16w4s1  16x16w4s1  16x16w4s1  16x16w4s1  16x16w4s1
sm_100 short    64  64x64w4s2  128x64w8s2  64x64w4s2  64x64w4s2  64x64w4s2  64x64w4s2  64x64w4s2  64x64w8s2
sm_100 short   128  64x64w4s2  64x64w4s2  64x64w4s2  64x64w4s2  64x64w4s2  64x64w4s2  64x64w4s2  64x64w4s1
sm_100 short   256  64x64w8s2  64x64w8s2  64x64w8s2  64x64w8s2  64x64w8s2  64x64w8s2  64x32w8s1  64x32w8s1
sm_100 split    64  64x64w4s2  64x64w4s1  64x64w4s2  64x64w4s2  64x64w4s2  64x64w4s2  64x64w4s2  64x64w8s1
sm_100 split   128  64x64w4s1  64x64w8s1  64x64w4s1  64x64w8s1  64x64w4s1  64x64w8s1  64x64w8s1  64x64w8s1
sm_100 float64  64  16x16w4s2  16x16w4s1  16x16w4s1  16x16w4s1  16x16w4s1  16x16w4s1  16x16w4s1  16x16w4s1
gfx942 short    64  128x64w8s1  64x64w4s1  128x64w8s1  64x64w4s1  128x64w8s1  64x64w4s1  64x64w4s1  64x64w4s1
gfx942 short   128  128x64w8s1  64x64w4s1  64x64w4s1  64x64w4s1  128x64w8s1  64x64w4s1  64x64w4s1  64x32w4s1
gfx942 short   256  64x64w4s1  32x32w4s1  64x32w4s1  64x32w4s1  64x64w4s1  64x32w4s1  32x32w4s1  16x32w4s1
gfx942 split    64  64x64w4s1  64x64w4s1  64x64w4s1  64x64w4s1  64x64w4s1  64x64w4s1  64x64w4s1  64x32w4s1
gfx942 split   128  64x32w4s1  64x32w4s1  64x32w4s1  64x32w4s1  64x32w4s1  64x32w4s1  32x32w4s1  32x32w4s1
gfx942 float64  64  16x16w4s1  16x16w4s1  16x16w4s1  16x16w4s1  16x16w4s1  16x16w4s1  16x16w4s1  16x16w4s1
"""

# The second order's kernels make one tile of any width, for which 0 stands.
SECOND_ORDER_KERNELS = (
    "contrast_tangent_sums", "contrast_double_gradients", "relation_tangent_sums", "relation_double_gradients",
    "graph_degree_tangents", "graph_tangent_weights", "graph_double_gradients",
)  # fmt: skip
_SECOND_ORDER_LINES = """
sm_80  short   0  64x64w8s2  64x64w8s2  64x64w8s2  64x64w8s2  64x64w8s2  64x64w8s2  64x64w8s2
sm_80  tf32    0  64x64w8s2  64x64w8s2  64x64w8s2  64x64w8s2  64x64w8s2  64x64w8s2  64x64w8s2
sm_80  tf32x3  0  32x32w4s1  32x32w4s1  32x32w4s1  32x32w4s1  32x32w4s1  32x32w4s1  32x32w4s1
sm_80  float64 0  16x16w4s1  16x16w4s1  16x16w4s1  16x16w4s1  16x16w4s1  16x16w4s1  16x16w4s1
sm_86  short   0  64x64w8s2  64x64w8s2  64x64w8s2  64x64w8s2  64x64w8s2  64x64w8s2  64x64w8s2
sm_86  tf32    0  64x64w8s2  64x64w8s2  64x64w8s2  64x64w8s2  64x64w8s2  64x64w8s2  64x64w8s2
sm_86  tf32x3  0  32x32w4s1  32x32w4s1  16x32w4s1  32x32w4s1  32x32w4s1  32x32w4s1  32x32w4s1
sm_86  float64 0  16x16w4s1  16x16w4s1  16x16w4s1  16x16w4s1  16x16w4s1  16x16w4s1  16x16w4s1
sm_90  short   0  64x64w8s2  64x64w8s2  64x64w8s2  64x64w8s2  64x64w8s2  64x64w8s2  64x64w8s2
sm_90  tf32    0  64x64w8s2  64x64w8s2  64x64w8s2  64x64w8s2  64x64w8s2  64x64w8s2  64x64w8s2
sm_90  tf32x3  0  16x32w4s1  16x32w4s1  16x32w4s1  16x32w4s1  16x32w4s1  16x32w4s1  16x32w4s1
sm_90  float64 0  16x16w4s1  16x16w4s1  16x16w4s1  16x16w4s1  16x16w4s1  16x16w4s1  16x16w4s1
sm_100 short   0  64x64w8s2  64x64w8s2  64x64w8s2  64x64w8s2  64x64w8s2  64x64w8s2  64x64w8s2
sm_100 tf32    0  64x64w8s2  64x64w8s2  64x64w8s2  64x64w8s2  64x64w8s2  64x64w8s2  64x64w8s2
sm_100 tf32x3  0  64x64w8s1  64x64w8s1  64x64w8s1  64x64w8s1  64x64w8s1  64x64w8s1  64x64w8s1
sm_100 float64 0  16x16w4s1  16x16w4s1  16x16w4s1  16x16w4s1  16x16w4s1  16x16w4s1  16x16w4s1
gfx942 short   0  64x64w8s1  64x64w8s1  64x64w8s1  64x64w8s1  64x64w8s1  64x64w8s1  64x64w8s1
gfx942 tf32    0  64x64w8s1  64x64w8s1  64x64w8s1  64x64w8s1  64x64w8s1  64x64w8s1  64x64w8s1
gfx942 ieee    0  32x32w2s1  32x32w2s1  32x32w2s1  32x32w2s1  32x32w2s1  32x32w2s1  32x32w2s1
gfx942 float64 0  16x16w2s1  16x16w2s1  16x16w2s1  16x16w2s1  16x16w2s1  16x16w2s1  16x16w2s1
"""
# pair_sums' kernels make products of any width too; tangents are those of float32 and float64 alone.
PAIR_KERNELS = ("pair_row_sums", "pair_weights", "pair_sum_tangents", "pair_weight_tangents")
_PAIR_LINES = """
sm_80  short   0  64x64w8s1  64x64w8s2  64x64w8s2  64x64w8s2
sm_80  tf32    0  64x64w8s1  64x64w8s2  64x64w8s2  64x64w8s2
sm_80  tf32x3  0  32x32w4s1  32x32w4s1  16x64w4s1  32x32w4s1
sm_80  float64 0  16x16w4s1  16x16w4s1  32x16w8s1  16x16w4s1
sm_86  short   0  64x64w8s1  64x64w8s2  64x64w8s2  64x64w8s2
sm_86  tf32    0  64x64w8s1  64x64w8s2  64x64w8s2  64x64w8s2
sm_86  tf32x3  0  32x32w4s1  32x32w4s1  16x64w4s1  16x64w4s1
sm_86  float64 0  32x16w8s1  16x16w4s1  32x16w8s1  16x32w8s1
sm_90  short   0  64x64w8s2  64x64w8s2  64x64w8s2  64x64w8s2
sm_90  tf32    0  64x64w8s2  64x64w8s2  64x64w8s2  64x64w8s2
sm_90  tf32x3  0  16x32w2s1  16x32w4s1  16x32w4s1  16x32w4s1
sm_90  float64 0  16x16w4s1  16x16w4s1  32x16w8s1  16x16w4s1
sm_100 short   0  64x64w4s1  64x64w8s2  64x64w8s2  64x64w8s2
sm_100 tf32    0  128x64w8s1  64x64w8s2  64x64w8s2  64x64w8s2
sm_100 tf32x3  0  64x64w8s1  64x32w8s1  32x64w8s1  32x64w8s1
sm_100 float64 0  16x32w8s1  16x16w4s1  16x16w4s1  16x16w4s1
gfx942 short   0  64x64w8s1  64x64w8s1  64x64w8s1  64x64w8s1
gfx942 tf32    0  64x64w8s1  64x64w8s1  64x64w8s1  64x64w8s1
gfx942 ieee    0  32x32w2s1  32x32w2s1  32x32w2s1  32x32w2s1
gfx942 float64 0  16x16w2s1  16x16w2s1  16x16w2s1  16x16w2s1
"""
# rkd_angle multiplies in the rows' own type.
ANGLE_KERNELS = ("angle_products", "angle_sums", "angle_weights")
_ANGLE_LINES = """
sm_80  tf32x3  0  32x32w4s1  32x32w4s1  16x32w4s1
sm_80  float64 0  16x16w4s1  16x16w4s1  16x16w4s1
sm_86  tf32x3  0  32x32w4s1  32x32w4s1  16x32w4s1
sm_86  float64 0  16x16w4s1  16x16w4s1  16x16w4s1
sm_90  tf32x3  0  32x32w4s1  32x32w4s1  16x32w4s1
sm_90  float64 0  16x16w4s1  16x16w4s1  16x16w4s1
sm_100 tf32x3  0  64x64w8s1  32x32w4s1  16x32w4s1
sm_100 float64 0  16x16w4s1  16x16w4s1  16x16w4s1
gfx942 ieee    0  32x32w2s1  32x32w2s1  32x32w2s1
gfx942 float64 0  16x16w2s1  16x16w2s1  16x16w2s1
"""
# Where several products in a loop are laid out by whole rows, which doubles a tile's registers.
PRODUCTS_APART = ("sm_80", "sm_86")
# Small batches' programs own so many rows; tiles of weights, which every warp holds whole, have so many columns, and
# operands are loaded in pieces of so many columns.
SMALL_ROWS = 16
SMALL_COLUMNS = {"short": 128, "tf32": 128, "tf32x3": 128, "ieee": 64, "float64": 64}
SMALL_WIDTHS = {"short": 32, "tf32": 16, "tf32x3": 16, "ieee": 16, "float64": 16}
SMALL_THREADS = 256
BLOCK_WIDTHS = {"short": 64, "tf32": 32, "tf32x3": 16, "ieee": 16, "float64": 16}


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


def _parse(lines: str, kernels: tuple[str, ...]) -> dict[tuple[str, str, int], dict[str, Tiles]]:
    entries = {}
    for line in lines.strip().splitlines():
        arch, kind, width, *texts = line.split()
        entries[arch, kind, int(width)] = dict(zip(kernels, map(Tiles.parse, texts), strict=True))
    return entries


_ENTRIES = _parse(_LINES, KERNELS)
_SECOND_ORDER = _parse(_SECOND_ORDER_LINES, SECOND_ORDER_KERNELS)
_PAIRS = _parse(_PAIR_LINES, PAIR_KERNELS)
_ANGLES = _parse(_ANGLE_LINES, ANGLE_KERNELS)

# Strips hold similarities, not rows: their tiles only pass through registers.
STRIP = Tiles(32, 64, 8, 1)

# Found by ``autotune`` in this process.
overrides: dict[Key, Tiles] = {}
_forced: tuple[Tiles, int] | None = None
_recorded: set[Key] | None = None


def tiles(kernel: str, arch: str, product: str, width: int) -> Tiles:
    """The configuration of a kernel whose entry is the narrowest that holds ``width``, or of kernel "strip"."""
    if _forced is not None:
        return _forced[0]
    if kernel == "strip":
        return STRIP
    key, found = _entry(kernel, arch, product, width)
    if _recorded is not None:
        _recorded.add(key)
    return overrides.get(key) or found


@cache
def _entry(kernel: str, arch: str, product: str, width: int) -> tuple[Key, Tiles]:
    kind, entries = TYPES[product], _ENTRIES
    if kernel in SECOND_ORDER_KERNELS:
        entries = _SECOND_ORDER
    elif kernel in PAIR_KERNELS:
        entries = _PAIRS
    elif kernel in ANGLE_KERNELS:
        entries = _ANGLES
    entry = min(w for entry_arch, entry_kind, w in entries if (entry_arch, entry_kind) == (arch, kind) and w >= width)
    return (kernel, arch, product, entry), entries[arch, kind, entry][kernel]


def largest_width(arch: str, product: str) -> int:
    """The widest rows whose block and gradient fit a program; wider ones are multiplied in strips."""
    if _forced is not None:
        return _forced[1]
    return _largest_width(arch, product)


@cache
def _largest_width(arch: str, product: str) -> int:
    return max(width for entry_arch, kind, width in _ENTRIES if (entry_arch, kind) == (arch, TYPES[product]))


def polynomials(arch: str, product: str) -> int:
    """``POLYNOMIALS``; none for the products of float32 grade, which take longer and whose results show its error."""
    return POLYNOMIALS[arch] if TYPES[product] == "short" else 0


def block_width(product: str) -> int:
    """Columns of the operands that a step of a second-order kernel's products takes."""
    return 16 if _forced is not None else BLOCK_WIDTHS[TYPES[product]]


def small_columns(product: str) -> int:
    """``SMALL_COLUMNS`` of a product type."""
    return 16 if _forced is not None else SMALL_COLUMNS[TYPES[product]]


def small_block_width(product: str) -> int:
    """``SMALL_WIDTHS`` of a product type."""
    return 16 if _forced is not None else SMALL_WIDTHS[TYPES[product]]


def teachers_at_once(arch: str, product: str, width: int, teachers: int) -> int:
    """The teachers that share a program of relation_sums with a student: as many as do not spill, evenly divided."""
    most = 1
    if arch == "sm_90" and TYPES[product] == "short" and width <= 128:
        most = 2 if width <= 64 else 3
    return -(-teachers // -(-teachers // most))


def sharing(config: Tiles, teachers: int) -> Tiles:
    """The tiles of a program with several teachers, whose logits more warps hold."""
    return config if teachers == 1 else replace(config, warps=2 * config.warps)


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
