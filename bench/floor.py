"""The product floor: ``torch.mm`` doing only the matrix products that an op cannot do without.

Two kinds of product, each 2·B²·D operations: *similarity*, [B, D]·[D, B], and *gather*, [B, B]·[B, D].
A symmetric similarity needs its upper tiles only and counts half.
"""

from dataclasses import dataclass

import torch

from bench.cases import OPS, Case
from bench.timing import Clock, Contender

STRIP_ROWS = 1024
WHOLE_BYTES = 2**31  # no whole B×B operand above this size


@dataclass(frozen=True)
class Products:
    similarity: float
    gather: float

    def units(self) -> float:
        return self.similarity + self.gather

    def __add__(self, other: "Products") -> "Products":
        return Products(self.similarity + other.similarity, self.gather + other.gather)


def has_floor(case: Case) -> bool:
    return case.op in OPS and case.order == 1


def products(case: Case) -> tuple[Products, Products]:
    """(forward, backward) of the tile algorithm, gradients to students / nodes and messages."""
    stages = case.stages
    if case.op == "relation_kl":  # S + T shared similarities, made again in backward; one gather per student
        return Products(stages, 0), Products(stages, stages)
    if case.op == "node_contrast":  # the student's gradient is gathered in the forward pass
        return Products(stages**2, stages**2), Products(0, 0)
    if case.normalization == "row":  # forward: K, K·H; backward: K, Kᵀ·G, G·Hᵀ, M·E; log-sums first over the others
        return Products(0.5 if case.self_weight is None else 1, 1), Products(1.5, 2)
    # symmetric; forward: degrees, K, K·H'; backward: K, K·G', then K, G'·H'ᵀ, M·E
    return Products(1, 1), Products(2, 2)


def contenders(case: Case) -> dict[str, Contender]:
    """One product of each kind, whole and in strips of rows: the faster of the two is the floor."""
    dtype = getattr(torch, case.dtype)
    rows = torch.randn(case.batch, case.dim, device=case.device).to(dtype)
    height = min(STRIP_ROWS, case.batch)
    found = _products_in_strips(rows, height, "strips")
    if height < case.batch and case.batch**2 * rows.element_size() <= WHOLE_BYTES:
        found |= _products_in_strips(rows, case.batch, "whole")
    return found


def _products_in_strips(rows: torch.Tensor, height: int, label: str) -> dict[str, Contender]:
    starts = range(0, len(rows), height)
    strip = torch.randn(height, len(rows), device=rows.device).to(rows.dtype)
    gathered = torch.empty_like(rows)

    def similarity(clock: Clock) -> list:
        marks = [clock.mark()]
        for start in starts:
            part = rows[start : start + height]
            torch.mm(part, rows.T, out=strip[: len(part)])
        return [*marks, clock.mark()]

    def gather(clock: Clock) -> list:
        marks = [clock.mark()]
        for start in starts:
            part = gathered[start : start + height]
            torch.mm(strip[: len(part)], rows, out=part)
        return [*marks, clock.mark()]

    return {f"floor similarity {label}": similarity, f"floor gather {label}": gather}


def floor_seconds(case: Case, least: dict[str, float]) -> tuple[float, float]:
    """(forward, forward + backward) from the least time of each contender."""
    similarity, gather = (
        min(seconds for name, seconds in least.items() if name.startswith(f"floor {kind}"))
        for kind in ("similarity", "gather")
    )
    forward, backward = products(case)
    total = forward + backward
    return tuple(p.similarity * similarity + p.gather * gather for p in (forward, total))
