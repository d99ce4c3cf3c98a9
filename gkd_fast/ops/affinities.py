"""Affinities, of neighbor_conv the cosines, that a forward pass keeps for its later passes and the backward pass, which
then need not multiply the rows again.

The C++ kernels keep them while they take at most five times the memory of the rows or 16 MiB, and never more than
128 MiB (csrc/cpu/host.cpp): there reading them takes less time than the products that they spare. Beyond it every pass
computes them anew, tile by tile. The Triton kernels always do.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from gkd_fast.kernels import REGISTERED
from gkd_fast.ops.autograd import transformed
from gkd_fast.ops.backends import CPP_MISSING


def keeps(inputs: Iterable[Tensor]) -> bool:
    """Whether a backward pass can follow and find kept affinities; ``torch.compile`` and ``torch.func`` keep none."""
    if CPP_MISSING is not None or "cpu" in REGISTERED:
        return False
    if torch.compiler.is_compiling() or transformed() or not torch.is_grad_enabled():
        return False
    return any(x.requires_grad and x.is_cpu for x in inputs)


def like(rows: list[Tensor]) -> Tensor:
    """The affinities that the ops keep of the graphs of these unit rows: for their fakes."""
    from gkd_fast import _C

    x, width = rows[0], sum(int(x.shape[1]) for x in rows)
    return x.new_empty(_C._kept_elements(int(x.shape[0]), len(rows), width, x.dtype == torch.float64))
