"""``python -m bench step``: forward and backward of a whole ``GraphKDLoss``, fused against the reference backend.

The loss is measured like an op: its parameters and the student's features are the inputs with gradient. The float64
truth is the loss itself with its three functions computed on strips (:mod:`bench.truth`).
"""

import argparse
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from bench import ops
from bench import truth as oracle
from bench.cases import CLASSES, STEP, Case, Problem, features

WIDTHS = (64, 128, 256)  # of the stages' features, repeated where there are more stages


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", nargs="+", type=int, default=[4096])
    parser.add_argument("--dim", type=int, default=128, help="width of the graph embeddings")
    parser.add_argument("--stages", type=int, default=3, help="S = T")
    parser.add_argument("--backend", nargs="+", choices=("cpp", "triton"), help="reference is always measured as well")
    parser.add_argument("--no-memory", action="store_true", help="measure no memory (one process per backend)")
    ops.add_common_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    base = Case(STEP, 1, arguments.dim, arguments.stages, device=arguments.device)
    return ops.measure_all(arguments, [base.at(batch) for batch in arguments.batch])


def problem(case: Case) -> Problem:
    generator = torch.Generator().manual_seed(case.batch + case.dim)
    dtype = getattr(torch, case.dtype)
    widths = [WIDTHS[k % len(WIDTHS)] for k in range(case.stages)]

    def stages(requires_grad: bool) -> list[Tensor]:
        made = [features(case.batch, width, generator).to(case.device, dtype) for width in widths]
        return [x.requires_grad_(requires_grad) for x in made]

    torch.manual_seed(0)
    criterion = _criterion(widths, case.dim, "reference").to(case.device, dtype)
    parameters = {name: p.detach().clone().requires_grad_(True) for name, p in criterion.named_parameters()}
    students, teachers = stages(True), stages(False)
    target = (torch.arange(case.batch) % CLASSES).to(case.device)
    weights = torch.rand(case.batch, case.stages, case.stages, generator=generator).to(case.device, dtype)
    wanted = {f"students[{k}]": x for k, x in enumerate(students)} | parameters
    upstream = torch.rand((), generator=generator).to(case.device, dtype)
    return Problem((parameters, students, teachers, target, weights), {"embed_dim": case.dim}, wanted, upstream)


def build(backend: str) -> Callable[..., Tensor]:
    from bench import peers

    if backend not in peers.LIBRARY:
        raise peers.Unavailable(f"has no {STEP}")
    made = {}

    def function(parameters, students, teachers, target, weights, *, embed_dim: int) -> Tensor:
        if not made:
            made["criterion"] = _criterion([x.shape[1] for x in students], embed_dim, backend).to(students[0])
        arguments = (students, teachers, target)
        return torch.func.functional_call(made["criterion"], parameters, arguments, {"weights": weights})

    return function


def truth(problem: Problem) -> dict[str, Tensor]:
    from gkd_fast import functional

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
        functional, graph_conv=_graph_conv, node_contrast=_node_contrast, relation_kl=_relation_kl
    ):
        return exact.results(build("reference"))


def _criterion(widths: list[int], embed_dim: int, backend: str) -> torch.nn.Module:
    from gkd_fast import GraphKDLoss

    return GraphKDLoss(widths, widths, num_classes=CLASSES, embed_dim=embed_dim, backend=backend)


class _Strips(torch.autograd.Function):
    """One of the three functions and its gradient, both computed on strips of rows."""

    @staticmethod
    def forward(ctx, op: str, options: dict, fixed: list[Tensor], shape: tuple[int, ...], *wanted: Tensor) -> Tensor:
        ctx.op, ctx.options, ctx.fixed = op, options, fixed
        ctx.save_for_backward(*wanted)
        return oracle.first_order(op, options, list(wanted), fixed, wanted[0].new_zeros(shape))[0]

    @staticmethod
    def backward(ctx, upstream: Tensor):
        gradients = oracle.first_order(ctx.op, ctx.options, list(ctx.saved_tensors), ctx.fixed, upstream)[1]
        return None, None, None, None, *gradients


def _graph_conv(nodes, messages, *, bandwidth, normalization, backend, process_group=None):
    options = {"bandwidth": float(bandwidth), "normalization": normalization}
    return _Strips.apply("graph_conv", options, [], messages.shape, nodes, messages)


def _node_contrast(students, teachers, *, temperature, backend, pairs=None, process_group=None, bank=None):
    shape = (len(students[0]), len(students), len(teachers))
    return _Strips.apply("node_contrast", {"temperature": temperature}, teachers, shape, *students)


def _relation_kl(students, teachers, *, temperature, backend, process_group=None, bank=None):
    options = {"temperature": temperature, "bandwidth": 1.0}
    shape = (len(students[0]), len(students), len(teachers))
    return _Strips.apply("relation_kl", options, teachers, shape, *students)
