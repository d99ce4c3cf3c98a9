"""unit_rows: L2-normalised rows of all stages in one call, differentiable any number of times.

e = x/‖x‖ and 1/‖x‖ in float32 (float64); a zero row (largest entry below √tiny, as in ``reference.unit_rows``)
gives e = 0, 1/‖x‖ = 0 and so zero gradient.

    unit_rows(rows, dtype) -> (unit rows, inverse norms)
        rows: tensors [B, D_k], any floating type, any strides.  dtype: float32 or float64, the outputs' type.
        unit rows: contiguous [B, D_k].  inverse norms: [B].
    unit_rows_backward(upstream, unit, inverse_norms, dtype) -> gradients
        upstream: gradients of the unit rows, [B, D_k].  dtype: the type of the rows, to which each is cast once.
        dx = (g − e (e·g))/‖x‖.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gkd_fast.ops.autograd import PT2, refuse_forward_mode, register_autograd, transformed

torch.library.define("gkd_fast::unit_rows", "(Tensor[] rows, ScalarType dtype) -> (Tensor[], Tensor[])", tags=PT2)
torch.library.define(
    "gkd_fast::unit_rows_backward",
    "(Tensor[] upstream, Tensor[] unit, Tensor[] inverse_norms, ScalarType dtype) -> Tensor[]",
    tags=PT2,
)


@torch.library.register_fake("gkd_fast::unit_rows")
def _(rows, dtype):
    return (
        [x.new_empty(x.shape, dtype=dtype) for x in rows],
        [x.new_empty(x.shape[:1], dtype=dtype) for x in rows],
    )


@torch.library.register_fake("gkd_fast::unit_rows_backward")
def _(upstream, unit, inverse_norms, dtype):
    return [e.new_empty(e.shape, dtype=dtype) for e in unit]


def _setup_context(ctx, inputs, output):
    rows, _ = inputs
    unit, inverse_norms = output
    ctx.dtypes = [x.dtype for x in rows]
    ctx.save_for_backward(*unit, *inverse_norms)
    ctx.set_materialize_grads(False)


def _backward(ctx, unit_upstream, norm_upstream):
    stages, saved = len(ctx.dtypes), ctx.saved_tensors
    unit, inverse_norms = saved[:stages], saved[stages:]
    needs = ctx.needs_input_grad[0]
    unit_upstream, norm_upstream = (
        [g if needed else None for g, needed in zip(upstream, needs)] for upstream in (unit_upstream, norm_upstream)
    )
    return row_gradients(unit_upstream, unit, inverse_norms, ctx.dtypes, norm_upstream), None


def row_gradients(
    unit_upstream: Sequence[Tensor | None],
    unit: Sequence[Tensor],
    inverse_norms: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    norm_upstream: Sequence[Tensor | None] | None = None,
    ops: Any = torch.ops.gkd_fast,
) -> list[Tensor | None]:
    """The rows' gradients in their types, None where nothing comes from above; differentiable in grad mode."""
    gradients: list[Tensor | None] = [None] * len(unit)
    fused: dict[torch.dtype, list[int]] = {}
    for k, of_unit in enumerate(unit_upstream):
        of_norm = None if norm_upstream is None else norm_upstream[k]
        if of_unit is None and of_norm is None:
            continue
        if of_norm is not None or torch.is_grad_enabled():
            gradients[k] = _differentiable(unit[k], inverse_norms[k], of_unit, of_norm).to(dtypes[k])
        else:
            fused.setdefault(dtypes[k], []).append(k)
    for dtype, ks in fused.items():
        lists = ([values[k] for k in ks] for values in (unit_upstream, unit, inverse_norms))
        for k, gradient in zip(ks, ops.unit_rows_backward(*lists, dtype), strict=True):
            gradients[k] = gradient
    return gradients


def _differentiable(unit: Tensor, inverse_norms: Tensor, upstream: Tensor | None, norm_upstream: Tensor | None):
    """The same gradient in PyTorch's own ops, so that autograd derives it again; ∂(1/‖x‖)/∂x = −e/‖x‖²."""
    inverse = inverse_norms[:, None]
    gradient = torch.zeros_like(unit)
    if upstream is not None:
        gradient = inverse * (upstream - unit * (unit * upstream).sum(dim=1, keepdim=True))
    if norm_upstream is not None:
        gradient = gradient - (inverse * (norm_upstream[:, None] * inverse)) * unit
    return gradient


register_autograd("gkd_fast::unit_rows", _backward, setup_context=_setup_context)


def unit_rows(rows: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The L2-normalised rows of every tensor of ``rows``, in ``dtype``; without gradient where the tensor has none."""
    refuse_forward_mode(rows)
    return unit_rows_and_norms(rows, dtype)[0]


def unit_rows_and_norms(rows: Sequence[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """The unit rows, and 1/‖x‖ of every row."""
    unit, inverse_norms = torch.ops.gkd_fast.unit_rows(rows, dtype)
    # An op's outputs need gradient together; frozen stages must not have theirs computed.
    if transformed():
        return unit, inverse_norms
    return [e if x.requires_grad else e.detach() for e, x in zip(unit, rows, strict=True)], inverse_norms
