"""Random calls of the public functions: ``python -m tests.fuzz --seconds 300 --seed 0``.

The fused backend that computes on this CPU (C++, or with TRITON_INTERPRET=1 the interpreted Triton kernels) against the
reference in float64, output and first and second derivatives; and calls with one wrong argument, whose error must name
it. A failure prints its case, which ``--case`` runs again. Case k of a seed is always the same.
"""

import time
from collections import Counter
from contextlib import contextmanager

from .cases import draw
from .judge import judge
from .wrong_arguments import try_wrong_argument

__all__ = ["draw", "fuzz", "run"]


def run(seed: int, number: int, backend: str) -> str:
    """Runs a case; returns what it was."""
    case = draw(seed, number, backend)
    try:
        with _tiles(case, backend):
            if case["order"] == "bad argument":
                return f"bad argument, {try_wrong_argument(case, backend)}"
            judge(case, backend)
        return f"{case['function']}, {case['order']} order"
    except Exception as error:
        raise RuntimeError(f"case {number} of seed {seed} on {backend}: {case}") from error


@contextmanager
def _tiles(case: dict, backend: str):
    """Small tiles, so that small batches have several; of the Triton kernels those of small batches or the others."""
    if backend == "triton":
        from gkd_fast.kernels.common import plan, small, table

        most, least = small.SMALL_BATCH, 0 if case["tile_rows"] else small.SMALL_BATCH
        try:
            small.SMALL_BATCH = least
            plan.forget()
            with table.forced(16, 16):
                yield
        finally:
            small.SMALL_BATCH = most
        return
    from gkd_fast import _C

    _C._set_block(case["tile_rows"])
    try:
        yield
    finally:
        _C._set_block(0)


def fuzz(seconds: float, seed: int, backend: str, first: int = 0) -> tuple[Counter, list[Exception]]:
    """Cases from ``first`` on for so many seconds: how many of what kind, and the failures."""
    done: Counter = Counter()
    failures: list[Exception] = []
    end = time.monotonic() + seconds
    number = first
    while time.monotonic() < end:
        try:
            done[run(seed, number, backend)] += 1
        except RuntimeError as error:
            failures.append(error)
        number += 1
    return done, failures
