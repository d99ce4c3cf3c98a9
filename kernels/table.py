"""Launch configurations: tile sizes by architecture, product type, width and kernel. The batch size is no key."""

from contextlib import contextmanager
from dataclasses import dataclass

MULTIPROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_90": 132, "sm_100": 148, "gfx942": 304}

# Of every two neighbouring entries, how many bounded exponentials go to the float units: those of the exponential unit
# are 1/8 (data-centre Hopper, Blackwell and Ampere: 16 of 128 or 64 lanes) as many as those of the float units.
POLYNOMIALS = {"sm_80": 1, "sm_86": 2, "sm_90": 2, "sm_100": 2, "gfx942": 0}


@dataclass(frozen=True)
class Tiles:
    """Rows that a program owns, columns per step of its walk, warps, and stages of the loads' pipeline."""

    rows: int
    columns: int
    warps: int
    stages: int


# The widest rows whose block and gradient fit a program; wider ones are multiplied in strips.
LARGEST_WIDTH = 256

_forced: Tiles | None = None


@contextmanager
def forced(rows: int, columns: int, warps: int = 4, stages: int = 1, width: int = LARGEST_WIDTH):
    """Within this context every kernel uses these tile sizes, and rows wider than ``width`` go in strips."""
    global _forced, LARGEST_WIDTH
    before = _forced, LARGEST_WIDTH
    _forced, LARGEST_WIDTH = Tiles(rows, columns, warps, stages), width
    try:
        yield
    finally:
        _forced, LARGEST_WIDTH = before


def largest_width(arch: str, product: str) -> int:
    return LARGEST_WIDTH


def tiles(kernel: str, arch: str, product: str, width: int) -> Tiles:
    """The configuration of a kernel for rows of up to ``width`` (16, 32, … 256)."""
    if _forced is not None:
        return _forced
    return Tiles(64, 64, 4, 2)


def relation_group(kernel: str, arch: str, product: str, width: int) -> tuple[int, int]:
    """The most students and teachers that share one launch of relation_kl."""
    return 2, 2
