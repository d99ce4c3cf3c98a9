"""Where the tests of this folder run, and at which sizes.

On a GPU they judge the Triton kernels at the sizes that are used. Without one the same code judges the C++ kernels, or
under ``TRITON_INTERPRET=1`` the interpreted Triton kernels, at sizes that take seconds: what is tested then is the
tests. What needs a device (streams, CUDA graphs, its memory) is marked ``needs_gpu``.

With ``GKD_FAST_COMPILE_FOR=sm_90`` nothing is judged: what the tests hold against the definition is compiled for that
architecture, into ``TRITON_CACHE_DIR``, so that on a GPU they compile little.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import pytest
import torch


@dataclass(frozen=True)
class Target:
    """``backend`` is judged on ``device``.

    ``rows`` and ``widths`` are those at which every op is judged in every type; ``few_rows`` take the kernels of small
    batches, at ``few_rows_widths`` too; ``unequal`` are pairs of widths of nodes and messages; ``other_rows`` those of
    the remaining tests.
    """

    device: torch.device
    backend: str
    rows: tuple[int, ...]
    widths: tuple[int, ...]
    few_rows: tuple[int, ...]
    few_rows_widths: tuple[int, ...]
    unequal: tuple[tuple[int, int], ...]
    stage_widths: tuple[int, ...]
    other_rows: int
    cosines: tuple[float, ...]

    def tiles(self) -> AbstractContextManager:
        """Interpreted kernels take tiles of 16 × 16, of which these sizes are several."""
        if self is not INTERPRETED:
            return nullcontext()
        from gkd_fast.kernels.common import table

        return table.forced(16, 16)


GPU = Target(
    torch.device("cuda"), "triton", (300, 1024, 4100), (16, 17, 32, 64, 100, 128, 200, 256, 300, 768),
    (1, 2, 97, 127, 129, 150), (1, 17, 64, 128, 129, 257, 512, 1000, 4096),
    ((16, 64), (8, 64), (4, 64), (16, 32), (64, 16), (128, 64), (200, 40), (1, 300)), (8, 40, 200), 700,
    (0.0, 0.9, 0.99, 0.999, 0.9999),
)  # fmt: skip
CPU = Target(
    torch.device("cpu"), "cpp", (40, 97), (17, 64), (1, 23), (3, 40), ((16, 64), (40, 17)), (8, 40), 40, (0.0,),
)  # fmt: skip
INTERPRETED = Target(
    torch.device("cpu"), "triton", (33,), (17,), (1,), (3,), ((5, 17),), (8, 17), 20, (0.0,),
)  # fmt: skip


COMPILED = replace(GPU, device=torch.device("cpu"), rows=GPU.rows[:1], few_rows=GPU.few_rows[-1:])
COMPILE_FOR = os.environ.get("GKD_FAST_COMPILE_FOR")


def chosen() -> Target:
    if COMPILE_FOR:
        return COMPILED
    if torch.cuda.is_available():
        return GPU
    return INTERPRETED if os.environ.get("TRITON_INTERPRET") == "1" else CPU


TARGET = chosen()
needs_gpu = pytest.mark.skipif(TARGET is not GPU, reason="needs a CUDA device: torch.cuda.is_available() is False")
