"""Where the tests of this folder run, and at which sizes.

On a GPU they judge the Triton kernels at the sizes that are used. Without one the same code judges the C++ kernels, or
under ``TRITON_INTERPRET=1`` the interpreted Triton kernels, at sizes that take seconds: what is tested then is the
tests. What needs a device (streams, CUDA graphs, its memory) is marked ``needs_gpu``.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

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
        if self.backend != "triton" or self.device.type == "cuda":
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


def chosen() -> Target:
    if torch.cuda.is_available():
        return GPU
    return INTERPRETED if os.environ.get("TRITON_INTERPRET") == "1" else CPU


TARGET = chosen()
needs_gpu = pytest.mark.skipif(TARGET is not GPU, reason="needs a CUDA device: torch.cuda.is_available() is False")
