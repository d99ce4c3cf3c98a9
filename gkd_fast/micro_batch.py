"""Outputs of a large batch with the activations of a small one."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from gkd_fast._arguments import is_whole
from gkd_fast._snapshot import Snapshot

Tensors = Sequence[Tensor | None]


@torch.compiler.disable
def micro_batched(
    forward: Callable[..., Any],
    *args: Any,
    micro_batch: int | None,
    modules: nn.Module | Iterable[nn.Module] | None = None,
    **kwargs: Any,
) -> Any:
    """``forward(*args, **kwargs)`` on a few samples at a time, with the activations of those alone.

    The batch is cut into parts of (nearly) one size, which run without gradient, and their outputs are joined. The
    backward pass runs each part again, with its share of the gradient at the outputs (Gao et al., *Scaling Deep
    Contrastive Learning Batch Size under Memory Limited Setup*, 2021). So a loss of the whole batch costs one more
    forward pass, and the activations of one part::

        logits, features = micro_batched(student, images, micro_batch=64)
        loss = criterion(features, teacher_features, labels)
        loss.backward()

    Outputs and gradients are those of the parts run one after the other within one graph; where ``forward`` treats its
    samples one by one, they are those of the whole batch. Batch norm in training mode takes the statistics of each
    part, and its running statistics are updated once per part. The second run sees the buffers, modes, autocast
    settings and PyTorch random state of the first and leaves no trace in them. Parameters get their gradient once,
    summed over the parts in float32 at least, so gradient accumulation, loss scales, DDP around the caller and
    ``torch.autograd.grad`` go with it; collectives within ``forward`` need as many parts on every rank. Second
    derivatives are taken part by part, too. A batch of one part runs plainly and keeps its activations.

    Args:
        forward: a module, or a callable that runs ``modules``. Its outputs are tensors with the samples as their first
            dimension, or None, in tuples, lists and dicts. It depends on its arguments, on parameters and buffers of
            ``modules`` and on PyTorch's random state alone.
        *args: of ``forward``; all tensors, nested ones too, have the samples as their first dimension. They may require
            gradient.
        micro_batch: the most samples in a part, at least 1; None runs the whole batch plainly.
        modules: what ``forward`` runs; by default ``forward`` itself.
        **kwargs: of ``forward``, as ``args``.

    Raises:
        ValueError: inputs or outputs of another batch size, or modules with which this would go wrong: DDP around them
            instead of around the caller, hooks on parameters' gradients.
        TypeError: ``modules`` missing, or an output that is neither a tensor nor None.
        RuntimeError: in the backward pass, where ``forward`` depends on a parameter that is not of ``modules``.
        NotImplementedError: in the third derivative.
    """
    if micro_batch is None:
        return forward(*args, **kwargs)
    if not is_whole(micro_batch) or micro_batch < 1:
        raise ValueError(f"micro_batch must be an int of at least 1 or None, got {micro_batch!r}")
    if not callable(forward):
        raise TypeError(f"forward must be a module or a callable, got {type(forward).__name__}")
    roots = _roots(forward, modules)
    parameters = list(dict.fromkeys(p for root in roots for p in root.parameters()))
    leaves, structure = tree_flatten((args, kwargs))
    inputs = [x for x in leaves if isinstance(x, Tensor)]
    parts = -(-_batch_size(inputs) // int(micro_batch))
    call = _Call(forward, leaves, structure, parts)
    if parts <= 1:
        return call.assemble(call.run(inputs))
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in (*parameters, *inputs)):
        return call.assemble(call.first_pass(inputs))
    _check_modules(roots)
    call.prepare_replay(roots, parameters, inputs)
    return call.assemble(_Outputs.apply(call, *parameters, *inputs))


class _Call:
    """A forward function whose samples are cut into parts, each of which can be run again as it ran at first."""

    def __init__(self, forward: Callable[..., Any], leaves: Sequence[Any], structure: TreeSpec, parts: int):
        self.forward = forward
        # The tensors among the arguments are held by autograd alone.
        self.is_tensor = [isinstance(x, Tensor) for x in leaves]
        self.constants = [None if isinstance(x, Tensor) else x for x in leaves]
        self.structure = structure
        self.parts = parts
        self.output_structure: tuple[TreeSpec, list[bool]] | None = None

    def cut(self, rows: Tensors) -> Iterator[tuple[Tensor | None, ...]]:
        """Part by part, the rows of each tensor that belong to it."""
        return zip(*([None] * self.parts if x is None else x.tensor_split(self.parts) for x in rows))

    def run(self, inputs: Tensors) -> list[Tensor]:
        """The output tensors for these input tensors."""
        tensors = iter(inputs)
        leaves = [next(tensors) if here else x for here, x in zip(self.is_tensor, self.constants)]
        args, kwargs = tree_unflatten(leaves, self.structure)
        leaves, structure = tree_flatten(self.forward(*args, **kwargs))
        found = structure, [x is not None for x in leaves]
        if self.output_structure not in (None, found):
            raise ValueError("forward must return the same structure for every part of the batch")
        self.output_structure = found
        outputs = [x for x in leaves if x is not None]
        _check_outputs(outputs, _batch_size(inputs))
        return outputs

    def assemble(self, outputs: Sequence[Tensor]) -> Any:
        """The output tensors in the structure that the forward function returned."""
        assert self.output_structure is not None
        structure, is_tensor = self.output_structure
        tensors = iter(outputs)
        return tree_unflatten([next(tensors) if here else None for here in is_tensor], structure)

    def first_pass(self, inputs: Tensors) -> list[Tensor]:
        """The outputs of all parts, without gradient."""
        with torch.no_grad():
            return [torch.cat(rows) for rows in zip(*(self.run(part) for part in self.cut(inputs)))]

    def prepare_replay(
        self, roots: Sequence[nn.Module], parameters: Sequence[nn.Parameter], inputs: Sequence[Tensor]
    ) -> None:
        """Takes down what the first pass will see, before it."""
        self.parameters = parameters
        self.snapshot = Snapshot(roots, inputs)
        self.autocast = _autocast_settings({x.device.type for x in (*parameters, *inputs)})
        self.leaves_checked = False

    def replay(self, rows: Tensors, derivative: Callable[[Tensors], Tensors]) -> list[Tensor | None]:
        """Runs a derivative on every part: its results are summed for the parameters, joined for the rows.

        Args:
            rows: what is cut.
            derivative: takes a part of each of the rows; returns gradients at the parameters, then at the first rows.
        """
        count = len(self.parameters)
        sums: list[Tensor | None] = [None] * count
        pieces = []
        with self.snapshot.replay(), torch.enable_grad():
            for part in self.cut(rows):
                gradients = derivative(part)
                sums = [_add(total, g) for total, g in zip(sums, gradients[:count])]
                pieces.append(list(zip(gradients[count:], part)))
        at_parameters = [None if x is None else x.to(p.dtype) for x, p in zip(sums, self.parameters)]
        return at_parameters + [_join(column) for column in zip(*pieces)]

    def gradients(
        self, inputs: Tensors, upstreams: Tensors, wanted: Sequence[bool], create_graph: bool = False
    ) -> list[Tensor | None]:
        """A part's gradients at the parameters and the inputs, within :meth:`replay`."""
        with contextlib.ExitStack() as stack:
            for settings in self.autocast:
                stack.enter_context(torch.autocast(**settings))
            outputs = self.run(inputs)
        variables = [*self.parameters, *inputs]
        if not self.leaves_checked:
            _check_leaves(outputs, variables)
            self.leaves_checked = True
        return _differentiate(outputs, upstreams, variables, wanted, create_graph)


class _Outputs(torch.autograd.Function):
    """The outputs of all parts, as a function of parameters and input tensors."""

    @staticmethod
    def forward(ctx, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.save_for_backward(*tensors)
        outputs = call.first_pass(tensors[len(call.parameters) :])
        ctx.mark_non_differentiable(*(y for y in outputs if not (y.is_floating_point() or y.is_complex())))
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *upstreams: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *_Gradients.apply(ctx.call, ctx.needs_input_grad[1:], *ctx.saved_tensors, *upstreams)


class _Gradients(torch.autograd.Function):
    """The gradients at parameters and input tensors, as a function of these and of the upstreams."""

    @staticmethod
    def forward(ctx, call: _Call, wanted: Sequence[bool], *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.call, ctx.wanted = call, wanted
        ctx.save_for_backward(*tensors)
        count = len(call.parameters)
        num_inputs = len(wanted) - count

        def derivative(part: Tensors) -> Tensors:
            inputs = [_leaf(x) for x in part[:num_inputs]]
            return call.gradients(inputs, part[num_inputs:], wanted)

        return tuple(call.replay(tensors[count:], derivative))

    @staticmethod
    def backward(ctx, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError("micro_batched has first and second derivatives, no third")
        call, wanted, needed = ctx.call, ctx.wanted, ctx.needs_input_grad[2:]
        count = len(call.parameters)
        num_inputs, num_rows = len(wanted) - count, len(needed) - count

        def derivative(part: Tensors) -> Tensors:
            rows = [_leaf(x) for x in part[:num_rows]]
            gradients = call.gradients(rows[:num_inputs], rows[num_inputs:], wanted, create_graph=True)
            given = (*cotangents[:count], *part[num_rows:])
            return _differentiate(gradients, given, [*call.parameters, *rows], needed)

        return None, None, *call.replay((*ctx.saved_tensors[count:], *cotangents[count:]), derivative)


def _differentiate(
    outputs: Tensors, upstreams: Tensors, inputs: Tensors, wanted: Sequence[bool], create_graph: bool = False
) -> list[Tensor | None]:
    """Gradients at the wanted inputs, None at the others and where nothing depends on them."""
    pairs = [(y, v) for y, v in zip(outputs, upstreams) if y is not None and v is not None and y.requires_grad]
    chosen = [x for x, want in zip(inputs, wanted) if want and x is not None]
    if not pairs or not chosen:
        return [None] * len(inputs)
    known, given = zip(*pairs)
    found = iter(torch.autograd.grad(known, chosen, given, create_graph=create_graph, allow_unused=True))
    return [next(found) if want else None for want in wanted]


def _leaf(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().requires_grad_(x.requires_grad)


def _add(total: Tensor | None, x: Tensor | None) -> Tensor | None:
    """Their sum, in the total's own memory and in float32 at least."""
    if x is None:
        return total
    if total is None:
        return x.detach().to(torch.promote_types(x.dtype, torch.float32), copy=True)
    return total.add_(x.detach())


def _join(pieces: Sequence[tuple[Tensor | None, Tensor | None]]) -> Tensor | None:
    """The gradients of all parts' rows, zero for a part where nothing depends on them."""
    if all(gradient is None for gradient, _ in pieces):
        return None
    rows = [torch.zeros_like(row) if g is None else g for g, row in pieces if row is not None]
    return torch.cat(rows).detach()


def _roots(forward: Callable[..., Any], modules: nn.Module | Iterable[nn.Module] | None) -> list[nn.Module]:
    if modules is None:
        if not isinstance(forward, nn.Module):
            raise TypeError(f"modules must be given where forward is no module itself, got {type(forward).__name__}")
        modules = forward
    if isinstance(modules, nn.Module):
        return [modules]
    if not hasattr(modules, "__iter__"):
        raise TypeError(f"modules must be a module or several, got {type(modules).__name__}")
    roots = list(modules)
    for root in roots:
        if not isinstance(root, nn.Module):
            raise TypeError(f"modules must be a module or several, got {type(root).__name__}")
    return roots


def _batch_size(inputs: Tensors) -> int:
    shapes = [tuple(x.shape) for x in inputs if x is not None]
    if not shapes or len({shape[:1] for shape in shapes}) > 1 or not shapes[0]:
        raise ValueError(
            f"the arguments must hold tensors of one batch size, their first dimension, got shapes {shapes}"
        )
    return shapes[0][0]


def _check_outputs(outputs: Sequence[Any], batch_size: int) -> None:
    for x in outputs:
        if not isinstance(x, Tensor):
            raise TypeError(f"outputs must be tensors or None in tuples, lists and dicts, got {type(x).__name__}")
        if x.shape[:1] != (batch_size,):
            raise ValueError(
                f"outputs must have one row for each of the {batch_size} samples, got shape {tuple(x.shape)}"
            )


def _check_modules(roots: Iterable[nn.Module]) -> None:
    for module in (module for root in roots for module in root.modules()):
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError("modules must not be within DDP, which would average part by part: wrap the caller in DDP")
        for name, parameter in module.named_parameters(recurse=False):
            if parameter._backward_hooks:
                raise ValueError(
                    f"modules must not have gradient hooks, which would run for every part, got one on {name!r}: "
                    "Tensor.register_post_accumulate_grad_hook is for the whole gradient"
                )


def _check_leaves(outputs: Iterable[Tensor], known: Iterable[Tensor | None]) -> None:
    """RuntimeError where the outputs depend on other leaves than these, whose gradient would be lost."""
    found = {id(x) for x in known}
    nodes = {y.grad_fn for y in outputs if y.grad_fn is not None}
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in found:
            raise RuntimeError(
                f"forward depends on a tensor of shape {tuple(leaf.shape)} that requires gradient and is neither an "
                "argument nor a parameter of modules"
            )
        new = {following for following, _ in node.next_functions if following is not None} - nodes
        nodes |= new
        waiting += new


def _autocast_settings(devices: Iterable[str]) -> list[dict[str, Any]]:
    """Arguments of torch.autocast that give the current state."""
    return [
        {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        for device in sorted({"cpu", *devices})
        if torch.amp.is_autocast_available(device)
    ]
