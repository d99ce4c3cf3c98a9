"""An op and the normalisation of its rows as one node of the autograd graph.

At the published batch of 64 a node costs as much as the work. Derivatives of the gradients are those of the ops' own
autograd formulas.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gkd_fast.ops.autograd import asked_for
from gkd_fast.ops.unit_rows import row_gradients, unit_rows, unit_rows_and_norms


@dataclass(frozen=True)
class Op:
    """An op of unit rows, by its forward and its backward op.

    Args:
        results: (inputs, settings, keep) → the op's results, the differentiable one first; with ``keep`` also those
            that spare the gradients work.
        gradients: (upstream, inputs, results, settings, needs) → a gradient for each input, None where not needed.
    """

    results: Callable[..., Sequence[Tensor]]
    gradients: Callable[..., list[Tensor | None]]


class Joined(torch.autograd.Function):
    """The first ``count`` tensors are the rows that are normalised."""

    @staticmethod
    def forward(ctx, op: Op, count: int, dtype: torch.dtype, settings: tuple, keep: bool, *tensors: Tensor):
        with torch._C._AutoDispatchBelowAutograd():
            unit, inverse_norms = torch.ops.gkd_fast.unit_rows(tensors[:count], dtype)
            results = op.results([*unit, *tensors[count:]], settings, keep)
        ctx.op, ctx.count, ctx.dtype, ctx.settings = op, count, dtype, settings
        ctx.save_for_backward(*tensors, *unit, *inverse_norms, *results)
        return results[0]

    @staticmethod
    def backward(ctx, upstream):
        needs, count = asked_for(ctx, 5), ctx.count
        saved = ctx.saved_tensors
        tensors, saved = saved[: len(needs)], saved[len(needs) :]
        unit, inverse_norms, results = saved[:count], saved[count : 2 * count], saved[2 * count :]
        rows = tensors[:count]
        if torch.is_grad_enabled():
            unit, inverse_norms = unit_rows_and_norms(rows, ctx.dtype)
        gradients = ctx.op.gradients(upstream.contiguous(), [*unit, *tensors[count:]], results, ctx.settings, needs)
        of_rows = row_gradients(gradients[:count], unit, inverse_norms, [x.dtype for x in rows])
        return *[None] * 5, *of_rows, *gradients[count:]


def on_unit_rows(
    op: Op, rows: Sequence[Tensor], others: Sequence[Tensor], dtype: torch.dtype, settings: tuple, keep: bool
) -> Tensor:
    """The first result of ``op`` on the L2-normalised ``rows``, in ``dtype``, and on ``others``."""
    if torch.compiler.is_compiling():  # which takes the nodes apart itself
        return op.results([*unit_rows(list(rows), dtype), *others], settings, keep)[0]
    return Joined.apply(op, len(rows), dtype, settings, keep, *rows, *others)
