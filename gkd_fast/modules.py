"""The trainable parts: a graph convolution head and the network that weighs the stage pairs."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gkd_fast import functional, reference
from gkd_fast._arguments import BACKENDS, NORMALIZATIONS, check_choice, check_count, check_graph
from gkd_fast._autocast import autocast_enabled
from gkd_fast._training import recomputing, repeats_or_is_undone
from gkd_fast.distributed import Group, Shards, shards_of
from gkd_fast.ops.autograd import transformed


def first_parameter(module: nn.Module) -> Any:
    """``next(module.parameters(), None)`` without a walk over all modules."""
    for own in module._parameters.values():
        if own is not None:
            return own
    found = (first_parameter(child) for child in module._modules.values() if child is not None)
    return next((x for x in found if x is not None), None)


class BatchGCN(nn.Module):
    """Graph convolutions over the batch: ``act(Â (X W + b))``, ReLU between the layers, none after the last.

    The graph is that of the input features (:func:`gkd_fast.functional.graph_conv`), one for all layers. The adjacency,
    its bandwidth and its normalisation are this library's own choice: the paper leaves them open.

    Args:
        in_dim: width D of the features.
        embed_dim: width of every layer's output.
        layers: number of convolutions, at least 1.
        bandwidth: σ > 0, or ``"auto"``: adapted to each batch.
        neighbors: with ``bandwidth="auto"``, how many others a node listens to at any batch size (``"auto"``: 8), or
            None: as many as the mean distance gives; see :func:`gkd_fast.functional.graph_conv`. In training each
            call's σ is the next one's start (``found_bandwidth`` and ``found_batch``, buffers), so that one pass over
            the pairs finds it; at another batch size it is sought anew.
        self_weight: the own message's weight beside the others', from 0 to 1, or None: the graph with A_ii = 1.
            ``"auto"``: 0.8 with ``bandwidth="auto"``, else None.
        normalization: ``"symmetric"`` or ``"row"``.
        backend: as in :mod:`gkd_fast.functional`.

    Raises:
        ValueError: a width or the number of layers is not positive, or a name is unknown.
    """

    beside_buffers = "_batch", "_before"  # gkd_fast._snapshot puts them back with the buffers.
    found_bandwidth: Tensor
    found_batch: Tensor

    def __init__(
        self,
        in_dim: int,
        embed_dim: int = 128,
        *,
        layers: int = 1,
        bandwidth: float | str = "auto",
        neighbors: float | str | None = "auto",
        self_weight: float | str | None = "auto",
        normalization: str = "symmetric",
        backend: str = "auto",
    ):
        super().__init__()
        widths = [check_count("in_dim", in_dim)]
        widths += [check_count("embed_dim", embed_dim)] * check_count("layers", layers)
        check_choice("normalization", normalization, NORMALIZATIONS)
        check_choice("backend", backend, BACKENDS)
        self.linears = nn.ModuleList(nn.Linear(before, after) for before, after in zip(widths, widths[1:]))
        self.bandwidth, self.neighbors, self.self_weight = check_graph(bandwidth, neighbors, self_weight)
        if self.neighbors is not None:
            self.register_buffer("found_bandwidth", torch.ones(()))
            self.register_buffer("found_batch", torch.zeros((), dtype=torch.int64))
        # found_batch for the host, and what a call that is computed again started from.
        self._batch = 0
        self._before: tuple[int, Tensor | None] = (0, None)
        self.normalization = normalization
        self.backend = backend

    def forward(self, nodes: Tensor, process_group: Group = None) -> Tensor:
        """Graph embeddings ``[B, embed_dim]`` of the nodes ``[B, in_dim]``.

        With ``process_group`` the graph is that of all its ranks' nodes (:mod:`gkd_fast.distributed`).

        Raises:
            ValueError: the nodes are not a matrix of that width.
        """
        return _in_step([self], [nodes], process_group)[0]

    def _rows(self, nodes: Tensor) -> Tensor:
        """The nodes, checked, in the type that the layers take."""
        first = self.linears[0]
        if nodes.dim() != 2 or nodes.shape[1] != first.in_features:
            raise ValueError(f"nodes must have shape [batch, {first.in_features}], got {tuple(nodes.shape)}")
        return nodes if autocast_enabled(nodes) else nodes.to(first_parameter(first).dtype)

    def _kind(self) -> tuple:
        """What heads have in common that go in step."""
        graph = self.bandwidth, self.neighbors, self.self_weight, self.normalization
        return len(self.linears), *graph, self.backend, self.training

    def _start(self, batch: int) -> Tensor | None:
        """The bandwidth of the call before, if it had so many nodes."""
        found, start = self._before if recomputing() else (self._batch, self.found_bandwidth)
        return start if found == batch else None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        if self.neighbors is not None:  # A state without what a search found begins with one.
            state_dict.setdefault(prefix + "found_bandwidth", torch.ones(()))
            state_dict.setdefault(prefix + "found_batch", torch.zeros((), dtype=torch.int64))
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        if self.neighbors is not None and not self.found_batch.is_meta:
            self._batch = int(self.found_batch.item())

    def extra_repr(self) -> str:
        found = f"bandwidth={self.bandwidth!r}" if self.neighbors is None else f"neighbors={self.neighbors:g}"
        own = "" if self.self_weight is None else f", self_weight={self.self_weight:g}"
        return f"{found}{own}, normalization={self.normalization!r}"


class PlainHead(nn.Module):
    """Stands for a graph convolution with no graph: the features as they are, projected where their width differs.

    The projection is the graph convolution's own first one, so that both start from the same numbers.
    """

    def __init__(self, convolution: BatchGCN):
        super().__init__()
        first = convolution.linears[0]
        self.projection: nn.Module = nn.Identity() if first.in_features == first.out_features else first

    def forward(self, nodes: Tensor, process_group: Group = None) -> Tensor:
        """Embeddings ``[B, embed_dim]`` of the nodes, each of its own sample alone."""
        own = first_parameter(self.projection)
        return self.projection(nodes if own is None or autocast_enabled(nodes) else nodes.to(own.dtype))


def graph_embeddings(heads: Iterable[nn.Module], nodes: Sequence[Tensor], process_group: Group = None) -> list[Tensor]:
    """``head(nodes)`` of every stage; heads of one kind, without hooks, go in step, a layer of all after the other."""
    heads = list(heads)
    plain = [head for head in heads if type(head) is BatchGCN and not _has_hooks(head)]
    if len(plain) == len(heads) and len({head._kind() for head in plain}) == 1:
        return _in_step(plain, nodes, process_group)
    return [head(x, process_group) for head, x in zip(heads, nodes, strict=True)]


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _in_step(heads: Sequence[BatchGCN], nodes: Sequence[Tensor], process_group: Group) -> list[Tensor]:
    nodes = [head._rows(x) for head, x in zip(heads, nodes, strict=True)]
    first, layers = heads[0], len(heads[0].linears)
    if first.neighbors is not None:
        process_group = shards_of(process_group, list(nodes), ("BatchGCN",))
    bandwidths: Any = first.bandwidth
    if first.neighbors is None and layers > 1 and first.bandwidth == "auto":
        bandwidths = graph_bandwidths(heads, nodes, process_group)
    options: Any = {
        "self_weight": first.self_weight,
        "normalization": first.normalization,
        "backend": first.backend,
        "process_group": process_group,
    }
    hidden = nodes
    for depth in range(layers):
        messages = [head.linears[depth](x.relu() if depth else x) for head, x in zip(heads, hidden)]
        if depth or first.neighbors is None:
            hidden = functional.graph_conv(nodes, messages, bandwidth=bandwidths, neighbors=None, **options)
            continue
        batch = _batch_of(nodes, process_group)
        hidden, bandwidths = functional.graph_conv_as_found(
            nodes, messages, neighbors=first.neighbors, starts=_starts(heads, batch), **options
        )
        if first.training and _moves_state():
            _remember(heads, bandwidths, batch)
    return hidden


def graph_bandwidths(heads: Sequence[BatchGCN], nodes: Sequence[Tensor], process_group: Group) -> list[Any]:
    """The bandwidths, numbers or 0-dim tensors, of the graphs that heads of one kind make of these nodes."""
    first = heads[0]
    if first.bandwidth != "auto":
        return [first.bandwidth] * len(heads)
    if first.neighbors is None:
        return [functional.adaptive_bandwidth(x, process_group=process_group) for x in nodes]
    starts = _starts(heads, _batch_of(nodes, process_group))
    return functional._neighbor_bandwidths(nodes, first.neighbors, starts, first.backend, process_group)


def _starts(heads: Sequence[BatchGCN], batch: int) -> list[Tensor] | None:
    """The bandwidths of the call before, if all heads had so many nodes."""
    known = [start for start in (head._start(batch) for head in heads) if start is not None]
    return known if len(known) == len(heads) else None


@torch.no_grad()
def _remember(heads: Sequence[BatchGCN], bandwidths: Sequence[Tensor], batch: int) -> None:
    """What a call has found, all heads' in one go: the next one's search starts from it."""
    found = [head.found_bandwidth for head in heads]
    if not torch.compiler.is_compiling():
        for head, before in zip(heads, torch.stack(found).unbind()):
            head._before = head._batch, before
    torch._foreach_copy_(found, list(bandwidths))
    for head in heads:
        if head._batch != batch:
            head.found_batch.fill_(batch)
            head._batch = batch


def _batch_of(nodes: Sequence[Tensor], process_group: Group) -> int:
    return process_group.total if isinstance(process_group, Shards) else len(nodes[0])


def _moves_state() -> bool:
    """Whether this call is a training step's own."""
    return not transformed() and not repeats_or_is_undone()


class PairWeightNetwork(nn.Module):
    """The meta-network: how much each sample's student stage s should listen to teacher stage t.

    w[b,s,t] = sigmoid(cos(proj_s(student embedding), proj_t(teacher embedding))), one linear projection per stage.

    Args:
        embed_dim: width of the graph embeddings.
        num_student_stages: S.
        num_teacher_stages: T.
        width: width of the projections.

    Raises:
        ValueError: a number is not positive.
    """

    def __init__(self, embed_dim: int, num_student_stages: int, num_teacher_stages: int, width: int = 128):
        super().__init__()
        embed_dim = check_count("embed_dim", embed_dim)
        width = check_count("width", width)
        students = check_count("num_student_stages", num_student_stages)
        teachers = check_count("num_teacher_stages", num_teacher_stages)
        self.student_projections = nn.ModuleList(nn.Linear(embed_dim, width) for _ in range(students))
        self.teacher_projections = nn.ModuleList(nn.Linear(embed_dim, width) for _ in range(teachers))

    def forward(self, student_embeddings: Sequence[Tensor], teacher_embeddings: Sequence[Tensor]) -> Tensor:
        """Weights ``[B, S, T]`` in (0.26, 0.74), of lists of embeddings ``[B, embed_dim]``.

        Raises:
            ValueError: the number of embeddings is not that of the stages, or one has another width.
        """
        students = _project("student", self.student_projections, student_embeddings)
        teachers = _project("teacher", self.teacher_projections, teacher_embeddings)
        return torch.einsum("bsd,btd->bst", students, teachers).sigmoid()


def _project(side: str, projections: nn.ModuleList, embeddings: Sequence[Tensor]) -> Tensor:
    """Unit rows of the projections, ``[B, stages, width]``."""
    if len(embeddings) != len(projections):
        raise ValueError(f"{side}_embeddings must hold {len(projections)} stages, got {len(embeddings)}")
    for k, (projection, e) in enumerate(zip(projections, embeddings)):
        if e.shape[-1] != projection.in_features:
            raise ValueError(
                f"{side}_embeddings[{k}] must have width {projection.in_features}, got shape {tuple(e.shape)}"
            )
    return torch.stack([reference.unit_rows(p(e)) for p, e in zip(projections, embeddings)], dim=1)
