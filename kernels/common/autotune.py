"""``GKD_FAST_AUTOTUNE=1``: times tile sizes on the device at hand and prints the entries to put into the table."""

import time
from collections.abc import Callable
from functools import wraps

import torch
import triton

from gkd_fast.kernels.common import table
from gkd_fast.kernels.common.table import Tiles

CANDIDATES = [
    Tiles(rows, columns, warps, stages)
    for rows, columns in ((128, 128), (128, 64), (64, 128), (64, 64), (64, 32), (32, 64), (32, 32))
    for warps in (4, 8)
    for stages in (1, 2, 3)
]
REPEATS = 5


def autotuned(launcher: Callable) -> Callable:
    """The launcher, which explores every kernel of a call whose table entry it has not timed yet, one after another."""

    @wraps(launcher)
    def explore_then_run(*args, **kwargs):
        with table.recorded() as keys:
            result = launcher(*args, **kwargs)
        for key in keys - table.overrides.keys():
            table.overrides[key] = _fastest(key, lambda: launcher(*args, **kwargs))
            print(f"gkd_fast.kernels.common.table: {table.line(key, table.overrides[key])}")
        return result

    return explore_then_run


def _fastest(key: table.Key, run: Callable[[], object]) -> Tiles:
    """The candidate under which the call is fastest; those that the device cannot hold are passed over."""
    times = {}
    for candidate in dict.fromkeys([table.tiles(*key), *CANDIDATES]):
        table.overrides[key] = candidate
        try:
            run()
            times[candidate] = min(_seconds(run) for _ in range(REPEATS))
        except triton.runtime.errors.OutOfResources:
            continue
        finally:
            del table.overrides[key]
    return min(times, key=times.get)


def _seconds(run: Callable[[], object]) -> float:
    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    start = now()
    run()
    return now() - start
