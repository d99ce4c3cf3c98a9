"""Ops and the normalisation of the rows that they share as one node of the autograd graph.

At the published batch of 64 a node costs as much as the work. Derivatives of the gradients are those of the ops' own
autograd formulas.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gkd_fast.ops.autograd import asked_for, transformed
from gkd_fast.ops.backends import implementation, kept_by
from gkd_fast.ops.unit_rows import row_gradients, unit_rows, unit_rows_and_norms


@dataclass(frozen=True, eq=False)
class Op:
    """An op of unit rows, by its forward and its backward op.

    Args:
        results: (ops, inputs, settings, keep) → the op's results, the differentiable one first; with ``keep`` also
            those that spare the gradients work. ``ops``: see ``backends.implementation``.
        gradients: (ops, upstream, inputs, results, settings, needs) → a gradient for each input, None where not needed.
        reads_output: whether the gradients read the first result; else they may be given None for it.
    """

    results: Callable[..., Sequence[Tensor]]
    gradients: Callable[..., list[Tensor | None]]
    reads_output: bool = True

    def output(self, first: Tensor) -> Tensor:
        """The first result as the caller gets it, who may change it in place: never what the gradients read."""
        return first.clone() if self.reads_output else first


@dataclass(eq=False)  # a frozen one takes the host three times as long
class Call:
    """An op with its settings, and whether it keeps what spares its gradients work."""

    op: Op
    settings: tuple
    keep: bool


class Joined(torch.autograd.Function):
    """The first ``count`` tensors are the rows that are normalised. An output of each call."""

    @staticmethod
    def forward(ctx, calls: Sequence[Call], count: int, dtype: torch.dtype, *tensors: Tensor):
        rows, others = tensors[:count], tensors[count:]
        ops = implementation(tensors)
        with torch._C._AutoDispatchBelowAutograd():
            unit, inverse_norms = ops.unit_rows(rows, dtype)
            inputs = [*unit, *others]
            results = [call.op.results(ops, inputs, call.settings, call.keep) for call in calls]
        needs = ctx.needs_input_grad[3:]
        outputs = [of_call[0] for of_call in results]
        if True not in needs:
            return tuple(outputs)
        ctx.calls, ctx.count, ctx.dtype = calls, count, dtype
        ctx.dtypes = [x.dtype for x in rows]
        ctx.result_counts = [len(of_call) for of_call in results]
        # Of frozen rows the unit rows are enough; they can be saved even where the rows come from inference mode.
        raw = [x if needed else None for x, needed in zip(rows, needs)]
        kept = [
            x if k or call.op.reads_output else None
            for call, of_call in zip(calls, results)
            for k, x in enumerate(of_call)
        ]  # fmt: skip
        ctx.prepared, prepared = kept_by(ops)
        ctx.save_for_backward(*raw, *unit, *inverse_norms, *others, *kept, *prepared)
        ctx.set_materialize_grads(False)
        # Of a Function, views may not be changed either.
        return tuple([x.clone() if x._is_view() else call.op.output(x) for call, x in zip(calls, outputs)])

    @staticmethod
    def backward(ctx, *upstream):
        needs, count = asked_for(ctx, 3), ctx.count
        saved = list(ctx.saved_tensors)
        rows, unit, inverse_norms = (saved[k * count : (k + 1) * count] for k in range(3))
        others, rest = saved[3 * count : 2 * count + len(needs)], saved[2 * count + len(needs) :]
        results, prepared = iter(rest), rest[sum(ctx.result_counts) :]
        derived = torch.is_grad_enabled()
        if derived:
            live = [k for k, x in enumerate(rows) if x is not None]
            again = unit_rows_and_norms([rows[k] for k in live], ctx.dtype) if live else ([], [])
            for k, e, inverse in zip(live, *again, strict=True):
                unit[k], inverse_norms[k] = e, inverse
        ops = torch.ops.gkd_fast if derived else implementation(unit, (ctx.prepared, prepared))
        with nullcontext() if derived else torch._C._AutoDispatchBelowAutograd():
            inputs, total = [*unit, *others], None
            for call, g, own in zip(ctx.calls, upstream, ctx.result_counts, strict=True):
                of_call = [next(results) for _ in range(own)]
                if g is not None:
                    found = call.op.gradients(ops, g.contiguous(), inputs, of_call, call.settings, needs)
                    total = found if total is None else _sums(total, found)
            total = total or [None] * len(needs)
            of_rows = row_gradients(total[:count], unit, inverse_norms, ctx.dtypes, ops=ops)
        return None, None, None, *of_rows, *total[count:]


def _sums(some: list[Tensor | None], more: list[Tensor | None]) -> list[Tensor | None]:
    both = [k for k, (x, y) in enumerate(zip(some, more, strict=True)) if x is not None and y is not None]
    found = [y if x is None else x for x, y in zip(some, more, strict=True)]
    if both:
        pair: Any = [some[k] for k in both], [more[k] for k in both]
        of_both = [x + y for x, y in zip(*pair)] if torch.is_grad_enabled() else torch._foreach_add(*pair)
        for k, x in zip(both, of_both, strict=True):
            found[k] = x
    return found


def on_unit_rows(
    calls: Sequence[Call], rows: Sequence[Tensor], others: Sequence[Tensor], dtype: torch.dtype
) -> Sequence[Tensor]:
    """The first result of every op on the L2-normalised ``rows``, in ``dtype``, and on ``others``."""
    if torch.compiler.is_compiling() or transformed():  # which take nodes apart
        inputs, ops = [*unit_rows(list(rows), dtype), *others], torch.ops.gkd_fast
        return [call.op.output(call.op.results(ops, inputs, call.settings, call.keep)[0]) for call in calls]
    return Joined.apply(calls, len(rows), dtype, *rows, *others)
