"""An op and the normalisation of its rows as one node of the autograd graph.

At the published batch of 64 a node costs as much as the work. Derivatives of the gradients are those of the ops' own
autograd formulas.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from gkd_fast.ops.autograd import asked_for, transformed
from gkd_fast.ops.unit_rows import row_gradients, unit_rows, unit_rows_and_norms


@dataclass(frozen=True)
class Op:
    """An op of unit rows, by its forward and its backward op.

    Args:
        results: (inputs, settings, keep) → the op's results, the differentiable one first; with ``keep`` also those
            that spare the gradients work.
        gradients: (upstream, inputs, results, settings, needs) → a gradient for each input, None where not needed.
        reads_output: whether the gradients read the first result; else they may be given None for it.
    """

    results: Callable[..., Sequence[Tensor]]
    gradients: Callable[..., list[Tensor | None]]
    reads_output: bool = True

    def output(self, first: Tensor) -> Tensor:
        """The first result as the caller gets it, who may change it in place: never what the gradients read."""
        return first.clone() if self.reads_output else first


class Joined(torch.autograd.Function):
    """The first ``count`` tensors are the rows that are normalised."""

    @staticmethod
    def forward(ctx, op: Op, count: int, dtype: torch.dtype, settings: tuple, keep: bool, *tensors: Tensor):
        with torch._C._AutoDispatchBelowAutograd():
            unit, inverse_norms = torch.ops.gkd_fast.unit_rows(tensors[:count], dtype)
            results = op.results([*unit, *tensors[count:]], settings, keep)
        needs = ctx.needs_input_grad[5:]
        output, *statistics = results
        if True not in needs:
            return output
        ctx.op, ctx.count, ctx.dtype, ctx.settings = op, count, dtype, settings
        ctx.dtypes = [x.dtype for x in tensors[:count]]
        # Of frozen rows the unit rows are enough; they can be saved even where the rows come from inference mode.
        raw = [x if needed else None for x, needed in zip(tensors[:count], needs)]
        kept = output if op.reads_output else None
        ctx.save_for_backward(*raw, *unit, *inverse_norms, *tensors[count:], kept, *statistics)
        # Of a Function, views may not be changed either.
        return output.clone() if output._is_view() else op.output(output)

    @staticmethod
    def backward(ctx, upstream):
        needs, count = asked_for(ctx, 5), ctx.count
        saved = list(ctx.saved_tensors)
        rows, unit, inverse_norms = (saved[k * count : (k + 1) * count] for k in range(3))
        rest = saved[3 * count :]
        others, results = rest[: len(needs) - count], rest[len(needs) - count :]
        derived = torch.is_grad_enabled()
        if derived:
            live = [k for k, x in enumerate(rows) if x is not None]
            again = unit_rows_and_norms([rows[k] for k in live], ctx.dtype) if live else ([], [])
            for k, e, inverse in zip(live, *again, strict=True):
                unit[k], inverse_norms[k] = e, inverse
        with nullcontext() if derived else torch._C._AutoDispatchBelowAutograd():
            gradients = ctx.op.gradients(upstream.contiguous(), [*unit, *others], results, ctx.settings, needs)
            of_rows = row_gradients(gradients[:count], unit, inverse_norms, ctx.dtypes)
        return *[None] * 5, *of_rows, *gradients[count:]


def on_unit_rows(
    op: Op, rows: Sequence[Tensor], others: Sequence[Tensor], dtype: torch.dtype, settings: tuple, keep: bool
) -> Tensor:
    """The first result of ``op`` on the L2-normalised ``rows``, in ``dtype``, and on ``others``."""
    if torch.compiler.is_compiling() or transformed():  # which take nodes apart
        return op.output(op.results([*unit_rows(list(rows), dtype), *others], settings, keep)[0])
    return Joined.apply(op, len(rows), dtype, settings, keep, *rows, *others)
