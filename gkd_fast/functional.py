"""The public functions: check the arguments, choose the backend and the precision, and call it.

Every function takes raw features, L2-normalises their rows and is differentiable; backend="reference" any number of
times, "cpp" and "triton" twice, with respect to every input and the upstream (one more derivative or forward mode is an
error there, never a silent zero).
"""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor

from gkd_fast import _neighbors, ops, reference
from gkd_fast._arguments import (
    BACKENDS,
    NORMALIZATIONS,
    bank_size,
    check_bandwidth,
    check_bank,
    check_banks,
    check_choice,
    check_features,
    check_flag,
    check_graph,
    check_graph_stages,
    check_pairs,
    check_positive,
    check_stages,
    check_width,
    compute_dtype,
    product_precision,
    select_backend,
)
from gkd_fast._autocast import autocast_disabled
from gkd_fast._compilation import leaves_graphs, meets_columns
from gkd_fast._neighbors import BANDWIDTH_SHARE, MAX_BANDWIDTH, MIN_BANDWIDTH
from gkd_fast._pairs import blocks_of, losses_of_blocks, used_of
from gkd_fast.distributed import Group, Shards, checking, graph_columns, of_union, shards_of, unit_columns
from gkd_fast.ops.autograd import saveable, transformed
from gkd_fast.relations import (
    correlation_congruence,
    info_nce,
    kd_divergence,
    pkt,
    rkd_angle,
    rkd_distance,
    similarity_preserving,
)

__all__ = [
    "BACKENDS", "NORMALIZATIONS", "adaptive_bandwidth", "correlation_congruence", "effective_neighbors", "graph_conv",
    "info_nce", "kd_divergence", "neighbor_bandwidth", "node_contrast", "pkt", "relation_kl", "rkd_angle",
    "rkd_distance", "similarity_preserving",
]  # fmt: skip

Bandwidth: TypeAlias = float | Tensor | str


@overload
def graph_conv(
    nodes: Tensor,
    messages: Tensor,
    *,
    bandwidth: Bandwidth = ...,
    neighbors: float | str | None = ...,
    self_weight: float | str | None = ...,
    normalization: str = ...,
    backend: str = ...,
    process_group: Group = ...,
) -> Tensor: ...


@overload
def graph_conv(
    nodes: Sequence[Tensor],
    messages: Sequence[Tensor],
    *,
    bandwidth: Bandwidth | Sequence[Bandwidth] = ...,
    neighbors: float | str | None = ...,
    self_weight: float | str | None = ...,
    normalization: str = ...,
    backend: str = ...,
    process_group: Group = ...,
) -> list[Tensor]: ...


@leaves_graphs(meets_columns)
def graph_conv(
    nodes: Tensor | Sequence[Tensor],
    messages: Tensor | Sequence[Tensor],
    *,
    bandwidth: Bandwidth | Sequence[Bandwidth] = "auto",
    neighbors: float | str | None = "auto",
    self_weight: float | str | None = "auto",
    normalization: str = "symmetric",
    backend: str = "auto",
    process_group: Group = None,
) -> Any:
    """One graph convolution over the batch: the normalised adjacency of ``nodes`` times ``messages``.

    A_ij = exp((e_i·e_j − 1)/σ²) with e the L2-normalised rows of ``nodes`` and A_ii = 1, normalised as
    D^-1/2 A D^-1/2 (``"symmetric"``) or D^-1 A (``"row"``). With ``self_weight=ρ`` the graph is over the others,
    A_ii = 0, and the output ρ · messages + (1 − ρ) · the graph's; a node without others keeps its message. With
    sequences, the convolutions of several stages of one batch, each with a graph of its own; on GPUs they share their
    launches.

    Args:
        nodes: ``[B, D]``, floating point, or a sequence of such tensors, of any widths.
        messages: ``[B, K]``, of the nodes' type and device, or as many of them as nodes.
        bandwidth: σ > 0, a number or a 0-dim tensor (taken without gradient), or ``"auto"``, found for the nodes. A
            sequence has one for each stage.
        neighbors: with ``bandwidth="auto"``, how many other nodes a node listens to: σ is
            :func:`neighbor_bandwidth` of it, or with None :func:`adaptive_bandwidth`. ``"auto"``: 8.
        self_weight: ρ from 0 to 1, or None: the graph with A_ii = 1. ``"auto"``: 0.8 with ``bandwidth="auto"``, else
            None.
        normalization: ``"symmetric"`` or ``"row"``.
        backend: ``"auto"``, ``"reference"``, ``"cpp"`` or ``"triton"``.
        process_group: the samples of all its ranks are the nodes, see :mod:`gkd_fast.distributed`.

    Returns:
        ``[B, K]``, of the messages' type; with sequences a list of them.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, type, device or value.
        RuntimeError: the chosen backend is not available here.
    """
    form = neighbors, self_weight
    if not isinstance(nodes, Tensor):
        return _convolve_stages(nodes, messages, bandwidth, form, normalization, backend, process_group)
    return _convolve(nodes, messages, bandwidth, form, normalization, backend, process_group)


def _convolve(
    nodes: Tensor, messages: Any, bandwidth: Any, form: tuple, normalization: str, backend: str, process_group: Group
) -> Tensor:
    with checking(process_group, "graph_conv"):
        check_features("nodes", nodes, process_group is not None)
        if not isinstance(messages, Tensor):
            raise TypeError(f"messages must be a Tensor, got {type(messages).__name__}, where nodes are one")
        check_features("messages", messages, process_group is not None)
        count = nodes.shape[0]
        if messages.shape[0] != count:
            raise ValueError(f"messages must have as many rows as nodes ({count}), got {messages.shape[0]}")
        dtype = compute_dtype({"nodes": nodes, "messages": messages})
        bandwidth, neighbors, self_weight = check_graph(bandwidth, *form)
        check_choice("normalization", normalization, NORMALIZATIONS)
        fused = select_backend(backend, nodes) != "reference"
    told = bandwidth if isinstance(bandwidth, (str, float, int)) else "a tensor"
    work = "graph_conv", told, neighbors, self_weight, normalization, fused
    shards = shards_of(process_group, [nodes, messages], work)
    if self_weight is not None and (count if shards is None else shards.total) == 1:
        return messages + 0 * reference.unit_rows(nodes.to(dtype)).sum().to(messages.dtype)
    if neighbors is not None and _in_shared_launches([nodes], backend, shards):
        stages = [nodes], [messages]
        return _convolve_as_found(*stages, dtype, neighbors, None, self_weight, normalization)[0][0]
    sigma = _bandwidth(bandwidth, neighbors, nodes, dtype, backend, shards)
    precision = product_precision(nodes)
    messages = saveable(messages)
    with autocast_disabled(nodes):
        if not fused:
            inputs = nodes.to(dtype), messages.to(dtype)
            settings = sigma, normalization, self_weight
            return of_union(lambda x, h: reference.graph_conv(x, h, *settings), inputs, shards).to(messages.dtype)
        variance = _inverse_variance(sigma, dtype, nodes.device)
        columns = None if shards is None else graph_columns(shards, [nodes, messages], dtype)
        given = dtype, variance, normalization, precision, columns
        if self_weight is None:
            output = ops.graph_conv(nodes, messages, *given)
            return output if output.dtype is messages.dtype else output.to(messages.dtype)
        values = messages.to(dtype)  # Once, so that the sum of their two gradients is rounded once.
        return torch.lerp(ops.neighbor_conv(nodes, values, *given), values, self_weight).to(messages.dtype)


def _convolve_stages(
    nodes: Any, messages: Any, bandwidth: Any, form: tuple, normalization: str, backend: str, process_group: Group
) -> list[Tensor]:
    with checking(process_group, "graph_conv"):
        nodes, messages, dtype = check_graph_stages(nodes, messages, process_group is not None)
        several = isinstance(bandwidth, Sequence) and not isinstance(bandwidth, str)
        given = list(bandwidth) if several else [bandwidth]
        checked = [check_graph(each, *form) for each in given] * (1 if several else len(nodes))
        if len(checked) != len(nodes):
            raise ValueError(f"bandwidth must hold one for each of {len(nodes)} stages, got {len(checked)}")
        check_choice("normalization", normalization, NORMALIZATIONS)
        self_weight = checked[0][2]
        # A node without others keeps its message.
        shares = _in_shared_launches(nodes, backend, process_group) and (self_weight is None or nodes[0].shape[0] > 1)
    if not shares:
        options = normalization, backend, process_group
        return [_convolve(x, h, sigma, tuple(own), *options) for x, h, (sigma, *own) in zip(nodes, messages, checked)]
    sought = checked[0][1]
    if sought is not None and all(neighbors is not None for _, neighbors, _ in checked):
        return _convolve_as_found(nodes, messages, dtype, sought, None, self_weight, normalization)[0]
    precision = product_precision(nodes[0])
    sigmas = []
    if any(sigma != "auto" or neighbors is not None for sigma, neighbors, _ in checked):
        # As of a graph alone, whose search takes products as autocast has them.
        sigmas = [
            _bandwidth(sigma, neighbors, x, dtype, backend, None) for (sigma, neighbors, _), x in zip(checked, nodes)
        ]
    with autocast_disabled(nodes[0]):
        variances: Tensor | tuple[float, float] = (BANDWIDTH_SHARE, MIN_BANDWIDTH)
        found = [sigma for sigma in sigmas if isinstance(sigma, Tensor)]
        if sigmas and len(found) == len(sigmas):
            variances = torch.stack(found).square().reciprocal()
        elif sigmas:
            variances = torch.stack([_inverse_variance(sigma, dtype, nodes[0].device) for sigma in sigmas])
        return ops.graph_conv_stages(nodes, messages, dtype, variances, normalization, precision, self_weight)


def graph_conv_as_found(
    nodes: Sequence[Tensor],
    messages: Sequence[Tensor],
    *,
    neighbors: float,
    starts: Sequence[Tensor] | None,
    self_weight: float | None,
    normalization: str,
    backend: str,
    process_group: Group,
) -> tuple[list[Tensor], list[Tensor]]:
    """:func:`graph_conv` of several stages, and their bandwidths, of which the search goes on from ``starts``."""
    if _in_shared_launches(nodes, backend, process_group) and nodes[0].shape[0] > 1:
        with checking(None, "graph_conv"):
            nodes, messages, dtype = check_graph_stages(nodes, messages, False)
        return _convolve_as_found(nodes, messages, dtype, neighbors, starts, self_weight, normalization)
    sigmas = _neighbor_bandwidths(nodes, neighbors, starts, backend, process_group)
    options: dict[str, Any] = {"self_weight": self_weight, "normalization": normalization, "backend": backend}
    outputs = graph_conv(nodes, messages, bandwidth=sigmas, neighbors=None, process_group=process_group, **options)
    return outputs, sigmas


def _convolve_as_found(
    nodes: Sequence[Tensor],
    messages: Sequence[Tensor],
    dtype: torch.dtype,
    neighbors: float,
    starts: Sequence[Tensor] | None,
    self_weight: float | None,
    normalization: str,
) -> tuple[list[Tensor], list[Tensor]]:
    """Convolutions and bandwidths of stages that share their launches: rows are normalised once for both."""
    precision = product_precision(nodes[0])
    with autocast_disabled(nodes[0]):
        units = ops.UnitStages(nodes, messages, dtype)
        sigmas, variances = _search_together(units, neighbors, starts, precision)
        given = dtype, variances, normalization, precision, self_weight, units
        return ops.graph_conv_stages(nodes, messages, *given), list(sigmas.unbind())


def _search_together(
    units: ops.UnitStages, neighbors: float, starts: Sequence[Tensor] | None, precision: str
) -> tuple[Tensor, Tensor]:
    """σ and 1/σ² of stages that share their launches."""
    first = units.rows[0]
    if neighbors >= len(first) - 1:
        return tuple(first.new_full((len(units.rows),), x) for x in (MAX_BANDWIDTH, MAX_BANDWIDTH**-2))
    passes = _neighbors.COLD_PASSES if starts is None else _neighbors.WARM_PASSES
    at = [x if x.dtype == first.dtype else x.to(first.dtype) for x in starts or ()]
    return units.bandwidths(at, neighbors, passes, precision)


@leaves_graphs(meets_columns)
def node_contrast(
    students: Tensor | Sequence[Tensor],
    teachers: Tensor | Sequence[Tensor],
    *,
    temperature: float = 0.1,
    pairs: Sequence[tuple[int, int]] | None = None,
    backend: str = "auto",
    process_group: Group = None,
    bank: Sequence[Tensor] | None = None,
) -> Tensor:
    """Contrast of every student node with the teacher's nodes: −log softmax_j(ŝ_b·t̂_j/τ)[b].

    Args:
        students: ``[B, D]``, or a sequence of S such tensors, all of one width.
        teachers: ``[B, D]``, or a sequence of T such tensors, of the students' width.
        temperature: τ > 0.
        pairs: as in :func:`relation_kl`.
        backend: ``"auto"``, ``"reference"``, ``"cpp"`` or ``"triton"``.
        process_group: the samples of all its ranks are the nodes, see :mod:`gkd_fast.distributed`.
        bank: further teacher nodes to tell the own one from, T tensors ``[N, D]``, without gradient; the same on all
            ranks.

    Returns:
        The losses per sample and pair, ``[B, S, T]``, ≥ 0, in float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: an argument has a wrong shape, type, device or value.
        RuntimeError: the chosen backend is not available here.
    """
    with checking(process_group, "node_contrast"):
        students, teachers, dtype = check_stages(students, teachers, process_group is not None)
        widths = {x.shape[1] for x in (*students, *teachers)}
        if len(widths) > 1:
            raise ValueError(f"students and teachers must share one width in node_contrast, got {sorted(widths)}")
        temperature = check_positive("temperature", temperature)
        wanted = check_pairs(pairs, len(students), len(teachers))
        more = check_bank("bank", bank, teachers)
        fused = select_backend(backend, students[0]) != "reference"
    shards = shards_of(
        process_group,
        [*students, *teachers],
        ("node_contrast", temperature, wanted, bank_size(more), fused),
        more,
    )
    precision = product_precision(students[0])

    def losses_of(student_stages: list[int], teacher_stages: list[int]) -> Tensor:
        chosen_students, chosen_teachers = [students[s] for s in student_stages], [teachers[t] for t in teacher_stages]
        bank = None if more is None else [more[t] for t in teacher_stages]
        if fused:
            flat = [wanted is None or (s, t) in wanted for s in student_stages for t in teacher_stages]
            columns = None
            if shards is not None:
                # The students' columns are for the teachers' gradients alone.
                trained = any(x.requires_grad for x in chosen_teachers)
                met = [*chosen_teachers, *chosen_students] if trained else chosen_teachers
                columns = unit_columns(shards, met, dtype, bank)
            return ops.node_contrast(chosen_students, chosen_teachers, dtype, flat, temperature, precision, columns)

        def of_all(*stages):
            return reference.node_contrast(stages[: len(student_stages)], stages[len(student_stages) :], temperature)

        # The bank's samples are rows too, of students that do not matter.
        beside = None if bank is None else [bank[0].new_zeros(bank[0].shape) for _ in student_stages] + bank
        return of_union(of_all, [x.to(dtype) for x in (*chosen_students, *chosen_teachers)], shards, beside)

    blocks = None if wanted is None else used_of(wanted) if fused else blocks_of(wanted)
    with autocast_disabled(students[0]):
        return losses_of_blocks(losses_of, blocks, students, teachers, dtype)


@leaves_graphs(meets_columns)
def relation_kl(
    students: Tensor | Sequence[Tensor],
    teachers: Tensor | Sequence[Tensor],
    *,
    temperature: float = 0.1,
    bandwidth: float = 1.0,
    pairs: Sequence[tuple[int, int]] | None = None,
    backend: str = "auto",
    process_group: Group = None,
    bank: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
) -> Tensor:
    """Kullback-Leibler divergence of the teacher's relations from the student's, row by row.

    ℓ_bst = Σ_j P^t_bj (log P^t_bj − log P^s_bj) where P is the row softmax of R/τ, R_ij = exp((e_i·e_j − 1)/σ²)
    of unit rows e and R_ii = 0 (the zero diagonal takes part in the softmax).

    Args:
        students: ``[B, D]``, or a sequence of S tensors ``[B, D_s]``.
        teachers: ``[B, D]``, or a sequence of T tensors ``[B, D_t]``.
        temperature: τ > 0.
        bandwidth: σ > 0.
        pairs: the (student, teacher) stage pairs that are wanted, all by default; the loss of the others is 0, and they
            are not computed: what a stage without a wanted pair holds has no part in anything.
        backend: ``"auto"``, ``"reference"``, ``"cpp"`` or ``"triton"``.
        process_group: the samples of all its ranks are the nodes, see :mod:`gkd_fast.distributed`.
        bank: further nodes to have relations with, S students and T teachers ``[N, width]``, without gradient; the
            same on all ranks.

    Returns:
        The losses per sample and pair, ``[B, S, T]``, ≥ 0, in float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: an argument has a wrong shape, type, device or value.
        RuntimeError: the chosen backend is not available here.
    """
    with checking(process_group, "relation_kl"):
        students, teachers, dtype = check_stages(students, teachers, process_group is not None)
        temperature = check_positive("temperature", temperature)
        bandwidth = check_positive("bandwidth", bandwidth)
        wanted = check_pairs(pairs, len(students), len(teachers))
        more = check_banks(bank, students, teachers)
        fused = select_backend(backend, students[0]) != "reference"
    stages = [*students, *teachers]
    told = "relation_kl", temperature, bandwidth, len(students), wanted, bank_size(more), fused
    shards = shards_of(process_group, stages, told, more)
    precision = product_precision(students[0])

    def losses_of(student_stages: list[int], teacher_stages: list[int]) -> Tensor:
        places = [*student_stages, *(len(students) + t for t in teacher_stages)]
        chosen = [stages[q] for q in places]
        bank = None if more is None else [more[q] for q in places]
        count = len(student_stages)
        if fused:
            columns = None if shards is None else unit_columns(shards, chosen, dtype, bank)
            return ops.relation_kl(chosen[:count], chosen[count:], dtype, temperature, bandwidth, precision, columns)

        def of_all(*stages):
            return reference.relation_kl(stages[:count], stages[count:], temperature, bandwidth)

        return of_union(of_all, [x.to(dtype) for x in chosen], shards, bank)

    blocks = None if wanted is None else blocks_of(wanted)
    with autocast_disabled(students[0]):
        return losses_of_blocks(losses_of, blocks, students, teachers, dtype)


def graph_losses(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    *,
    node_temperature: float,
    relation_temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """:func:`node_contrast` and :func:`relation_kl` of all pairs of stages of one width, which share the normalised
    rows and with them their graph: gradients of one loss alone need ``retain_graph``."""
    if select_backend(backend, students[0]) == "reference":
        return (
            node_contrast(students, teachers, temperature=node_temperature, backend=backend),
            relation_kl(students, teachers, temperature=relation_temperature, backend=backend),
        )
    students, teachers, dtype = check_stages(students, teachers, False)
    precision = product_precision(students[0])
    with autocast_disabled(students[0]):
        of_nodes, of_relations = ops.graph_losses(
            students, teachers, dtype, node_temperature, relation_temperature, 1.0, precision
        )
    return of_nodes, of_relations


@leaves_graphs(meets_columns)
def adaptive_bandwidth(nodes: Tensor, *, process_group: Group = None) -> Tensor:
    """The bandwidth that suits a batch: σ² = ½ · mean over i ≠ j of (1 − c_ij), without gradient.

    The mean needs no pairs: Σ_i≠j (1 − c_ij) = B Σ_i ‖e_i − ē‖² + (B − 1) · (number of zero rows), with ē the mean
    unit row. σ is at least 0.01, which it is when all rows point one way; it is 1 for a single row.

    Args:
        nodes: ``[B, D]``.
        process_group: as in :func:`graph_conv`; the bandwidth is that of all ranks' nodes.

    Returns:
        σ, a 0-dim tensor in float32 (float64 for float64 nodes) on the nodes' device.
    """
    with checking(process_group, "adaptive_bandwidth"):
        check_features("nodes", nodes, process_group is not None)
        dtype = compute_dtype({"nodes": nodes})
    shards = shards_of(process_group, [nodes], ("adaptive_bandwidth",))
    batch = len(nodes) if shards is None else shards.total
    if batch == 1:
        return torch.ones((), dtype=dtype, device=nodes.device)
    with torch.no_grad(), autocast_disabled(nodes):
        e = reference.unit_rows(nodes.to(dtype)) if len(nodes) else nodes.to(dtype)
        zero_rows = (e == 0).all(dim=1).sum()
        mean = e.sum(dim=0) / max(len(e), 1)
        spread = (e - mean).square().sum()
        if shards is not None:
            # The spread about the common mean is that about the ranks' own means, and theirs about it.
            rest = torch.stack([spread, zero_rows.to(dtype), spread.new_full((), len(e))])
            moments = shards.stack(torch.cat([mean, rest]))
            means, (spreads, zeros, counts) = moments[:, :-3], moments[:, -3:].T
            mean = counts @ means / batch
            spread = spreads.sum() + counts @ (means - mean).square().sum(dim=1)
            zero_rows = zeros.sum()
        distances = batch * spread + (batch - 1) * zero_rows
        return (BANDWIDTH_SHARE * distances / (batch * (batch - 1))).sqrt().clamp(min=MIN_BANDWIDTH)


@leaves_graphs(meets_columns)
def neighbor_bandwidth(
    nodes: Tensor,
    neighbors: float,
    *,
    start: float | Tensor | None = None,
    backend: str = "auto",
    process_group: Group = None,
) -> Tensor:
    """The bandwidth at which nodes listen to so many others: the mean of :func:`effective_neighbors` of the others.

    Without gradient. Each pass over the pairs gives their number and how it changes with σ, from which the next σ
    follows; nothing waits for the device. Where the nodes cannot have so many neighbours σ is the nearest that does:
    0.01 where more of them coincide, and 1,000, at which all weights are equal, where ``neighbors`` are all others or
    more.

    Args:
        nodes: ``[B, D]``.
        neighbors: k ≥ 1, need not be whole.
        start: a σ that is nearly right, such as that of the step before: one pass then is enough; None: the
            :func:`adaptive_bandwidth`, and seven passes; on GPUs an eighth, the first, finds where to start.
        backend: as in :func:`graph_conv`.
        process_group: as in :func:`graph_conv`; the mean is that over all ranks' nodes.

    Returns:
        σ, a 0-dim tensor in float32 (float64 for float64 nodes) on the nodes' device.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, type or value.
    """
    starts = None if start is None else [start]
    return _neighbor_bandwidths([nodes], neighbors, starts, backend, process_group)[0]


def _neighbor_bandwidths(
    stages: Sequence[Tensor],
    neighbors: float,
    starts: Sequence[float | Tensor] | None,
    backend: str,
    process_group: Group,
) -> list[Tensor]:
    """``neighbor_bandwidth`` of several stages of one batch, of which a pass goes on together."""
    first = stages[0]
    with checking(process_group, "neighbor_bandwidth"):
        for x in stages:
            check_features("nodes", x, process_group is not None)
        dtype = compute_dtype({"nodes": first})
        if neighbors is None or isinstance(neighbors, str):
            raise TypeError(f"neighbors must be a number, got {neighbors!r}")
        check_graph("auto", neighbors, None)
        for start in starts or ():
            if isinstance(start, str):
                raise ValueError(f"start must be a positive number or None, got {start!r}")
        given = [check_width("start", start) for start in starts or ()]
        fused = select_backend(backend, first) != "reference"
    work = "neighbor_bandwidth", neighbors, "cold" if starts is None else "warm", fused
    shards = shards_of(process_group, list(stages), work)
    nodes = len(first) if shards is None else shards.total
    if neighbors >= nodes - 1:
        return [torch.full((), MAX_BANDWIDTH, dtype=dtype, device=first.device) for _ in stages]
    precision = product_precision(first)
    with torch.no_grad(), autocast_disabled(first):
        begun = [
            x.to(first.device) if isinstance(x, Tensor) else torch.full((), x, dtype=torch.float64, device=first.device)
            for x in given
        ]
        if _in_shared_launches(stages, backend, shards):
            units = ops.UnitStages(stages, [], dtype)
            return list(_search_together(units, neighbors, begun or None, precision)[0].unbind())
        if starts is None:
            begun = [adaptive_bandwidth(x, process_group=shards) for x in stages]
        sums = _sums_of_neighbors(stages, dtype, precision, fused, shards)
        passes = _neighbors.COLD_PASSES if starts is None else _neighbors.WARM_PASSES
        total = shards.sum if shards is not None else lambda x: x
        begins = torch.stack(begun).double()
        return list(_neighbors.search(sums, begins, neighbors, nodes, passes, dtype, total).to(dtype).unbind())


def _sums_of_neighbors(
    stages: Sequence[Tensor], dtype: torch.dtype, precision: str, fused: bool, shards: Shards | None
) -> _neighbors.Sums:
    """What passes over the pairs of all stages; their rows are normalised once."""
    if not fused:

        def of_definition(variances: Tensor) -> Sequence[Sequence[Tensor]]:
            found = []
            for x, v in zip(stages, variances.unbind(), strict=True):

                def sums(nodes: Tensor, v: Tensor = v) -> Tensor:
                    return reference.neighbor_sums(nodes, v.rsqrt()).T

                found.append(of_union(sums, [x.to(dtype)], shards).double().unbind(dim=1))
            return list(zip(*found, strict=True))

        return of_definition
    units = ops.unit_rows(list(stages), dtype)
    columns = [None if shards is None else unit_columns(shards, [x], dtype) for x in stages]

    def of_each(variances: Tensor) -> Sequence[Sequence[Tensor]]:
        graphs = zip(units, variances.unbind(), columns, strict=True)
        return list(zip(*[ops.neighbor_sums(e, v, precision, c) for e, v, c in graphs], strict=True))

    return of_each


def _in_shared_launches(stages: Sequence[Tensor], backend: str, process_group: Group) -> bool:
    """Whether stages share the launches of their graphs."""
    shares = process_group is None and select_backend(backend, stages[0]) == "triton"
    return shares and not torch.compiler.is_compiling() and not transformed()


@leaves_graphs(meets_columns)
def effective_neighbors(
    nodes: Tensor,
    bandwidth: float | Tensor | str = "auto",
    *,
    others: bool = False,
    backend: str = "auto",
    process_group: Group = None,
) -> Tensor:
    """How many neighbours each node listens to: (Σ_j A_ij)² / Σ_j A_ij², from 1 (itself) to B (everybody).

    With ``others`` j is not i, and the numbers are from 1 to B − 1, 0 of a node without others. Without gradient.

    Args:
        nodes: ``[B, D]``.
        bandwidth: σ, or ``"auto"``: :func:`adaptive_bandwidth`.
        others: whether the own node is left out, as with a ``self_weight`` in :func:`graph_conv`.
        backend: as in :func:`graph_conv`.
        process_group: as in :func:`graph_conv`.

    Returns:
        ``[B]`` in float32 (float64 for float64 nodes).
    """
    with checking(process_group, "effective_neighbors"):
        others = check_flag("others", others)
        check_features("nodes", nodes, process_group is not None)
        dtype = compute_dtype({"nodes": nodes})
        bandwidth = check_bandwidth(bandwidth)
        fused = select_backend(backend, nodes) != "reference"
    shards = shards_of(process_group, [nodes], ("effective_neighbors", others, fused))
    sigma = _bandwidth(bandwidth, None, nodes, dtype, backend, shards)
    precision = product_precision(nodes)
    widths = (sigma, sigma / math.sqrt(2))
    with torch.no_grad(), autocast_disabled(nodes):
        if others:
            variance = _inverse_variance(sigma, dtype, nodes.device)
            sums = _sums_of_neighbors([nodes], dtype, precision, fused, shards)
            (log_sums,), (sharp_log_sums,), *_ = sums(variance[None])
            return (2 * log_sums - sharp_log_sums).exp().nan_to_num(0).to(dtype)
        if fused:
            (unit,) = ops.unit_rows([nodes], dtype)
            columns = None if shards is None else unit_columns(shards, [nodes], dtype)
            degree_sums = [
                ops.graph_degrees(unit, _inverse_variance(width, dtype, nodes.device), precision, columns)
                for width in widths
            ]
        else:

            def degrees(width):
                return lambda x: reference.similarities(x, width, diagonal=1.0).sum(dim=1)

            degree_sums = [of_union(degrees(width), [nodes.to(dtype)], shards) for width in widths]
    return degree_sums[0].square() / degree_sums[1]


def _inverse_variance(sigma: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """1/σ², a 0-dim tensor, so that an adaptive bandwidth needs no host synchronisation."""
    if isinstance(sigma, Tensor):
        return sigma.square().reciprocal()
    return torch.full((), sigma**-2, dtype=dtype, device=device)


def _bandwidth(
    bandwidth: float | Tensor | str,
    neighbors: float | None,
    nodes: Tensor,
    dtype: torch.dtype,
    backend: str,
    shards: Shards | None,
) -> float | Tensor:
    if isinstance(bandwidth, str):
        if neighbors is None:
            return adaptive_bandwidth(nodes, process_group=shards)
        return _neighbor_bandwidths([nodes], neighbors, None, backend, shards)[0]
    if isinstance(bandwidth, Tensor):
        return bandwidth.detach().to(device=nodes.device, dtype=dtype)
    return bandwidth
