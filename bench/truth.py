"""The float64 truth at any size: plain autograd on strips of rows, so that no B×B matrix is held."""

from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import peers
from bench.cases import STEP, Case, Problem
from gkd_fast import _neighbors, functional

STRIP_ELEMENTS = 2**24  # entries of a float64 strip [rows, B]: 128 MB
DIFFERENCE_STEP = 1e-5  # relative step of the central difference at order 2
FOUND_NEIGHBORS = 1e-6  # what a bandwidth's number of neighbours may be off by

# Largest error that a result may have, relative to the largest entry of the truth.
TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 5e-2, "float16": 2e-2}
PRECISION_TOLERANCES = {"highest": 1e-4, "high": 1e-3, "medium": 5e-2}
SECOND_ORDER_FLOAT64 = 1e-5  # the truth itself is a central difference there


def tolerance(case: Case) -> float:
    if case.dtype == "float32":
        return PRECISION_TOLERANCES[case.precision]
    if case.dtype == "float64" and case.order == 2:
        return SECOND_ORDER_FLOAT64
    return TOLERANCES[case.dtype]


def errors(results: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """max |result − truth| / max |truth| of each tensor; a NaN or a wrong shape counts as infinite."""
    found = {}
    for name, expected in truth.items():
        result = results[name]
        if result.shape != expected.shape or not bool(result.isfinite().all()):
            found[name] = float("inf")
        else:
            found[name] = float((result.double() - expected).abs().max() / expected.abs().max())
    return found


def truth(case: Case, problem: Problem) -> dict[str, Tensor]:
    """What :meth:`Problem.results` should be, in float64."""
    if case.op == STEP:
        return _whole_loss(case, problem)
    wanted = [x.detach().double() for x in problem.wanted.values()]
    fixed = [] if case.op == "graph_conv" else [x.double() for x in problem.arguments[1]]
    upstream = problem.upstream.detach().double()
    if case.order == 1:
        output, gradients = first_order(case.op, problem.options, wanted, fixed, upstream)
        return {"output": output} | {f"d {name}": g for name, g in zip(problem.wanted, gradients)}
    cotangents = [v.double() for v in problem.cotangents]
    scale = max(x.norm() for x in wanted) / max(v.norm() for v in cotangents)
    step = float(DIFFERENCE_STEP * scale)
    ahead, behind = (
        first_order(case.op, problem.options, [x + sign * v for x, v in zip(wanted, cotangents)], fixed, upstream)
        for sign in (step, -step)
    )
    second = [(a - b) / (2 * step) for a, b in zip(ahead[1], behind[1])] + [(ahead[0] - behind[0]) / (2 * step)]
    return {f"dd {name}": g for name, g in zip([*problem.wanted, "upstream"], second)}


@torch.enable_grad()
def first_order(
    op: str, options: dict, wanted: list[Tensor], fixed: list[Tensor], upstream: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The output and the gradients with respect to ``wanted``, all float64."""
    wanted = [x.clone().requires_grad_(True) for x in wanted]
    if op == "graph_conv":
        return _graph_conv(*wanted, upstream, **options)
    units = [F.normalize(x, dim=1) for x in wanted]
    leaves = [e.detach().requires_grad_(True) for e in units]
    teachers = [F.normalize(x, dim=1) for x in fixed]
    strip_losses = {"relation_kl": _relation_strip, "node_contrast": _node_strip}[op]
    output = torch.empty_like(upstream)
    totals = [torch.zeros_like(e) for e in leaves]
    for rows in strips(len(upstream)):
        losses = strip_losses(rows, leaves, teachers, **options)
        output[rows] = losses.detach()
        for total, gradient in zip(totals, torch.autograd.grad(losses, leaves, upstream[rows])):
            total += gradient
    return output, list(torch.autograd.grad(units, wanted, totals))


def strips(batch: int) -> list[slice]:
    size = max(1, min(batch, STRIP_ELEMENTS // batch))
    return [slice(start, min(start + size, batch)) for start in range(0, batch, size)]


def _off_diagonal(strip: Tensor, rows: slice) -> Tensor:
    columns = torch.arange(strip.shape[1], device=strip.device)
    return columns[rows, None] != columns[None, :]


def _relation_strip(
    rows: slice, students: list[Tensor], teachers: list[Tensor], temperature: float, bandwidth: float
) -> Tensor:
    def log_relations(e: Tensor) -> Tensor:
        similarity = e[rows] @ e.T
        relation = ((similarity - 1) / bandwidth**2).exp() * _off_diagonal(similarity, rows)
        return (relation / temperature).log_softmax(dim=1)

    log_students = [log_relations(e) for e in students]
    log_teachers = [log_relations(e) for e in teachers]
    columns = [
        torch.stack([(log_t.exp() * (log_t - log_s)).sum(dim=1) for log_t in log_teachers], dim=1)
        for log_s in log_students
    ]
    return torch.stack(columns, dim=1)  # [rows, S, T]


def _node_strip(rows: slice, students: list[Tensor], teachers: list[Tensor], temperature: float) -> Tensor:
    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        logits = student[rows] @ teacher.T / temperature
        return logits.logsumexp(dim=1) - (student[rows] * teacher[rows]).sum(dim=1) / temperature

    return torch.stack([torch.stack([loss(s, t) for t in teachers], dim=1) for s in students], dim=1)


def _graph_conv(
    nodes: Tensor,
    messages: Tensor,
    upstream: Tensor,
    bandwidth: float,
    normalization: str,
    self_weight: float | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Log-degrees first, strip by strip; then the output as a function of rows, log-degrees and messages; then back."""
    unit = F.normalize(nodes, dim=1)
    e = unit.detach().requires_grad_(True)
    h = messages.detach().requires_grad_(True)
    own = 0.0 if self_weight is None else -torch.inf  # K_ii = 1, or the graph over the others

    with torch.no_grad():
        log_degrees = torch.cat([_exponents(e, rows, bandwidth, own).logsumexp(dim=1) for rows in strips(len(e))])
    log_degrees.requires_grad_(True)
    output = torch.empty_like(upstream)
    totals = [torch.zeros_like(x) for x in (e, h, log_degrees)]
    for rows in strips(len(e)):
        shift = log_degrees[rows, None]
        if normalization == "symmetric":
            shift = (shift + log_degrees[None, :]) / 2
        part = (_exponents(e, rows, bandwidth, own) - shift).exp() @ h
        if self_weight is not None:
            part = self_weight * h[rows] + (1 - self_weight) * part
        output[rows] = part.detach()
        for total, gradient in zip(totals, torch.autograd.grad(part, (e, h, log_degrees), upstream[rows])):
            total += gradient
    d_e, d_h, d_log_degrees = totals
    for rows in strips(len(e)):
        found = _exponents(e, rows, bandwidth, own).logsumexp(dim=1)
        d_e += torch.autograd.grad(found, e, d_log_degrees[rows])[0]
    return output, [torch.autograd.grad(unit, nodes, d_e)[0], d_h]


def _exponents(e: Tensor, rows: slice, bandwidth: float, own: float) -> Tensor:
    """(c_ij − 1)/σ² of these rows, ``own`` for i = j."""
    similarity = e[rows] @ e.T
    return torch.where(_off_diagonal(similarity, rows), (similarity - 1) / bandwidth**2, own)


def _whole_loss(case: Case, problem: Problem) -> dict[str, Tensor]:
    """The loss itself with its functions computed on strips."""
    parameters, students, teachers, target, weights = problem.arguments
    double = {x: x.detach().double().requires_grad_(True) for x in problem.wanted.values()}
    arguments = (
        {name: double[p] for name, p in parameters.items()},
        [double[x] for x in students],
        [x.double() for x in teachers],
        target,
        weights.double(),
    )
    wanted = {name: double[x] for name, x in problem.wanted.items()}
    exact = Problem(arguments, problem.options, wanted, problem.upstream.double())
    with mock.patch.multiple(
        functional,
        graph_conv=_strip_graph_conv,
        node_contrast=_strip_node_contrast,
        relation_kl=_strip_relation_kl,
        _neighbor_bandwidths=_strip_bandwidths,
    ):
        return exact.results(peers.build("reference", case))


class _Strips(torch.autograd.Function):
    """One of the three functions and its gradient, both computed on strips of rows."""

    @staticmethod
    def forward(ctx, op: str, options: dict, fixed: list[Tensor], shape: tuple[int, ...], *wanted: Tensor) -> Tensor:
        ctx.op, ctx.options, ctx.fixed = op, options, fixed
        ctx.save_for_backward(*wanted)
        return first_order(op, options, list(wanted), fixed, wanted[0].new_zeros(shape))[0]

    @staticmethod
    def backward(ctx, upstream: Tensor):
        gradients = first_order(ctx.op, ctx.options, list(ctx.saved_tensors), ctx.fixed, upstream)[1]
        return None, None, None, None, *gradients


def _strip_graph_conv(
    nodes, messages, *, bandwidth, normalization, backend, process_group=None, neighbors=None, self_weight=None
):
    """Of several stages, as a loss calls it; bandwidths that have so many neighbours are found before."""
    bandwidths = bandwidth if isinstance(bandwidth, list) else [bandwidth] * len(nodes)
    outputs = []
    for x, h, given in zip(nodes, messages, bandwidths, strict=True):
        sigma = functional.adaptive_bandwidth(x) if isinstance(given, str) else given
        options = {"bandwidth": float(sigma), "normalization": normalization, "self_weight": self_weight}
        outputs.append(_Strips.apply("graph_conv", options, [], h.shape, x, h))
    return outputs


@torch.no_grad()
def _strip_bandwidths(nodes, neighbors, starts, backend, process_group) -> list[Tensor]:
    """The search's own steps, with sums over strips, and what they lead to judged by its definition."""
    units = [F.normalize(x.detach().double(), dim=1) for x in nodes]
    begun = torch.stack([functional.adaptive_bandwidth(e) for e in units])

    def sums(variances: Tensor) -> list[tuple[Tensor, ...]]:
        return list(zip(*[_neighbor_sums(e, v) for e, v in zip(units, variances, strict=True)], strict=True))

    found = _neighbors.search(sums, begun, neighbors, len(nodes[0]), _neighbors.COLD_PASSES, torch.float64, lambda x: x)
    for log_sums, sharp_log_sums, sigma in zip(*sums(found**-2)[:2], found, strict=True):
        mean = (2 * log_sums - sharp_log_sums).exp().mean()
        if not (mean / neighbors - 1).abs() < FOUND_NEIGHBORS:
            raise ArithmeticError(f"σ = {sigma:g} gives {mean:g} neighbours, not {neighbors:g}")
    return list(found.unbind())


def _neighbor_sums(e: Tensor, inverse_variance: Tensor) -> list[Tensor]:
    """log Σ_j≠i K_ij, log Σ_j≠i K_ij², and the means of x_ij weighted by K_ij and by K_ij²."""
    of_strips = []
    for rows in strips(len(e)):
        x = _exponents(e, rows, float(inverse_variance) ** -0.5, -torch.inf)
        own = x == -torch.inf
        sums = [(power * x).logsumexp(dim=1) for power in (1, 2)]
        weights = [(power * x - total[:, None]).exp() for power, total in zip((1, 2), sums)]
        of_strips.append(torch.stack([*sums, *((w * x.masked_fill(own, 0)).sum(dim=1) for w in weights)]))
    return list(torch.cat(of_strips, dim=1).unbind())


def _strip_node_contrast(students, teachers, *, temperature, backend, pairs=None, process_group=None, bank=None):
    shape = (len(students[0]), len(students), len(teachers))
    return _Strips.apply("node_contrast", {"temperature": temperature}, teachers, shape, *students)


def _strip_relation_kl(students, teachers, *, temperature, backend, pairs=None, process_group=None, bank=None):
    options = {"temperature": temperature, "bandwidth": 1.0}
    shape = (len(students[0]), len(students), len(teachers))
    return _Strips.apply("relation_kl", options, teachers, shape, *students)
