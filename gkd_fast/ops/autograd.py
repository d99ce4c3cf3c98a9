"""What the ops' autograd formulas share: the errors for derivatives that are not offered."""

from collections.abc import Callable, Iterable
from functools import wraps

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from gkd_fast.ops.backends import INTERPRETED

PT2 = (torch.Tag.pt2_compliant_tag,)
LIBRARY = torch.library.Library("gkd_fast", "FRAGMENT")


def register_autograd(name: str, backward: Callable, setup_context: Callable | None = None) -> None:
    """What ``torch.library.register_autograd`` does for ops whose tensors come in lists, at less than half its cost.

    That one walks every argument as a tree, several times per call, which at the published batch of 64 takes longer
    than the work. ``backward`` and ``setup_context`` are as there.
    """
    op = getattr(torch.ops.gkd_fast, name.removeprefix("gkd_fast::")).default
    defaults = [x.default_value if x.has_default_value() else None for x in op._schema.arguments]
    kinds = [_kind(x.type) for x in op._schema.arguments]
    result_kinds = [_kind(x.type) for x in op._schema.returns]
    below = torch._C._after_autograd_keyset

    def redispatch(keyset, arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & below, *arguments)

    def forward(ctx, keyset, arguments, structure, *tensors):
        if transformed():  # The levels below this one have derivatives of their own.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                result = redispatch(keyset, arguments)
        else:
            result = redispatch(keyset, arguments)
        ctx.arguments = _counts(arguments, kinds)
        results = (result,) if len(result_kinds) == 1 else result
        ctx.results = structure[:] = _counts(results, result_kinds)
        if setup_context is not None:
            needs = ctx.needs_input_grad
            ctx.needs_input_grad = _nested(needs[3:], ctx.arguments)
            # The dispatcher leaves out arguments that equal their defaults.
            setup_context(ctx, (*arguments, *defaults[len(arguments) :]), result)
            ctx.needs_input_grad = needs
        return tuple(_flat(results, ctx.results))

    def derived(ctx, *upstream):
        needs = ctx.needs_input_grad
        ctx.needs_input_grad = _nested(asked_for(ctx, 3), ctx.arguments)
        try:
            gradients = backward(ctx, *_nested(upstream, ctx.results))
        finally:
            ctx.needs_input_grad = needs
        flat: list[Tensor | None] = [None, None, None]
        for gradient, count in zip(gradients, ctx.arguments):
            if count is not None:
                flat += [gradient] if count < 0 else gradient or [None] * count
        return tuple(flat)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(derived)}
    function = type(op._opname, (torch.autograd.Function,), methods)
    # The transforms of torch.func come here level by level, each for its own graph.
    at_level = type(op._opname, (torch.autograd.function._SingleLevelFunction,), methods)

    def implementation(keyset, *arguments):
        if transformed():
            refuse_forward_mode(_flat(arguments, _counts(arguments, kinds)))  # of this level
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)):
            return redispatch(keyset, arguments)
        structure: list[int | None] = []
        tensors = _flat(arguments, _counts(arguments, kinds))
        if transformed():
            with torch._functorch.utils.enable_single_level_autograd_function():
                outputs = at_level.apply(keyset, arguments, structure, *tensors)
        else:
            outputs = function.apply(keyset, arguments, structure, *tensors)
        results = _nested(outputs, structure)
        return results[0] if len(results) == 1 else tuple(results)

    LIBRARY.impl(op._opname, implementation, "Autograd", with_keyset=True)


def register_loop(name: str) -> None:
    """The rule by which ``torch.func.vmap`` takes an op: one sample after the other."""
    op = getattr(torch.ops.gkd_fast, name).default

    def rule(info, dims, *arguments):
        leaves, structure = tree_flatten(arguments)
        dims = tree_leaves(dims)
        samples = []
        for k in range(info.batch_size):
            taken = (x if dim is None else x.select(dim, k).contiguous() for x, dim in zip(leaves, dims, strict=True))
            samples.append(op(*tree_unflatten(taken, structure)))
        results = tree_map(lambda *x: torch.stack(x), *samples)
        return results, tree_map(lambda x: 0, results)

    torch.library.register_vmap(f"gkd_fast::{name}", rule, lib=LIBRARY)


def _kind(schema_type) -> str | None:
    """Whether an argument or a result is, or may be, a "tensor" or a "list" of them."""
    name = str(schema_type).removeprefix("Optional[").rstrip("]")
    return {"Tensor": "tensor", "List[Tensor": "list"}.get(name)


def _counts(values, kinds) -> list[int | None]:
    """-1 for each tensor, their number for each list of tensors, None for anything else."""
    return [None if kind is None or x is None else -1 if kind == "tensor" else len(x) for x, kind in zip(values, kinds)]


def _flat(values, counts) -> list[Tensor]:
    """The tensors among the values and in lists among them."""
    flat: list[Tensor] = []
    for x, count in zip(values, counts):
        if count is not None:
            flat += [x] if count < 0 else x
    return flat


def _nested(flat, counts) -> list:
    """One entry of ``flat`` for each tensor, a list of them for each list; False for anything else."""
    found: list = []
    at = 0
    for count in counts:
        if count is None:
            found.append(False)
        elif count < 0:
            found.append(flat[at])
            at += 1
        else:
            found.append(flat[at : at + count])
            at += count
    return found


def asked_for(ctx, first: int) -> list[bool]:
    """``ctx.needs_input_grad`` of a Function's tensors, its inputs from ``first`` on; False also for those whose
    gradient leads to nothing that the running backward pass is to give, as autograd does for its own functions."""
    needs = ctx.needs_input_grad[first:]
    if torch.compiler.is_compiling():
        return list(needs)
    return [
        needed and (_is_leaf(node) or torch._C._will_engine_execute_node(node))
        for needed, (node, _) in zip(needs, ctx.next_functions)
    ]


def _is_leaf(node) -> bool:
    following = node.next_functions
    return not following or all(after is None for after, _ in following)


def refuse_derivative(op: str) -> None:
    """Make the derivative of ``op`` an error instead of a silent zero."""

    def backward(ctx, *upstream):
        raise _not_offered(op)

    register_autograd(op, backward)


def last_derivative(backward: Callable) -> Callable:
    """A ``backward`` of an autograd Function whose own derivative is an error."""

    @wraps(backward)
    def wrapped(ctx, *upstream):
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        if not torch.is_grad_enabled():
            return gradients
        return tuple(x if x is None else _Last.apply(backward.__qualname__, x, *upstream) for x in gradients)

    return wrapped


class _Last(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name, result, *inputs):
        ctx.name = name
        return result.view_as(result)

    @staticmethod
    def backward(ctx, *upstream):
        raise _not_offered(ctx.name)


def _not_offered(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"{name} has no derivative: the fused backends offer first and second derivatives, third-order gradients are "
        'not offered; use backend="reference", which is differentiable any number of times'
    )


def refuse_forward_mode(tensors: Iterable[Tensor]) -> None:
    """Raise if a tensor carries a forward-mode tangent, which ``register_autograd`` would turn into zero."""
    if forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            'the fused backends have no forward-mode derivative; use reverse mode, or backend="reference"'
        )


def refuse_column_gradient(op: str, derivative: str, has_columns: bool) -> None:
    """A column set belongs to other rows, whose upstream only the caller knows: the op ``derivative`` takes it."""
    if has_columns:
        raise NotImplementedError(
            f"{op} with a column set is not differentiated automatically: call {derivative} with the columns' "
            "statistics and upstream"
        )


def transformed() -> bool:
    """Whether a transform of ``torch.func`` is at work. Its tensors' ``requires_grad`` says nothing."""
    return torch._C._are_functorch_transforms_active()


def refuse_transforms(what: str) -> None:
    """Raise within a transform of ``torch.func``, which takes apart neither the tensors of a bank nor an autograd
    Function that saves what it has computed."""
    if transformed():
        raise NotImplementedError(
            f'{what} is not transformed by torch.func on the fused backends; use backend="reference"'
        )


def saveable(x: Tensor) -> Tensor:
    """``x``, or a copy where it was made in inference mode: autograd refuses to save such tensors."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not x.is_inference():
        return x
    return x.clone()


def flags(needs) -> list[bool]:
    """``ctx.needs_input_grad`` of a tensor-list argument as a list of bools."""
    return [bool(x) for x in needs]


def needed_like(stages: Iterable[Tensor], needs: list[bool]) -> list[Tensor]:
    """Empty gradients of the stages that need one: what a backward op's fake gives."""
    return [x.new_empty(x.shape) for x, needed in zip(stages, needs, strict=True) if needed]


def scatter(gradients: list[Tensor | None], needs: list[bool]) -> list[Tensor | None]:
    """A compact list of gradients back at the places that asked for one."""
    compact = iter(gradients)
    return [next(compact) if needed else None for needed in needs]


def tangents_of(cotangents: list[Tensor | None], needs: list[bool]) -> tuple[list[Tensor], list[bool]]:
    """The cotangents of a backward op's gradients as directions of its stages: the given ones, and which they are.

    By the symmetry of second derivatives the double backward is the backward's own tangent along them.
    """
    stages = scatter(cotangents, needs)
    return [x.contiguous() for x in stages if x is not None], [x is not None for x in stages]


def second_order_precision(product_precision: str, x: Tensor) -> str:
    """The product precision in which the second order of these rows needs its statistics: that of its own products.

    The C++ kernels multiply in the rows' own type there; P made of products with one rounding and log-sums of products
    with another would not add up to 1, and what cancels would not.
    """
    return "float32" if x.is_cpu and not INTERPRETED and product_precision == "bfloat16" else product_precision
