"""The functions of a global batch: any number of ranks gives what one process does, in every order."""

import pytest
import torch

from gkd_fast import distributed, functional
from tests.ops_cases import D64, requires_cpp, rows

pytestmark = requires_cpp
BATCH = 41

# Name: the function of its inputs and of options, and the inputs' widths.
FUNCTIONS = {
    "graph_conv": (lambda x, **o: functional.graph_conv(*x, **o), (4, 3)),
    "graph_conv symmetric": (lambda x, **o: functional.graph_conv(*x, neighbors=None, self_weight=None, **o), (4, 3)),
    "graph_conv row": (lambda x, **o: functional.graph_conv(*x, bandwidth=0.6, normalization="row", **o), (4, 3)),
    "graph_conv of the others": (lambda x, **o: functional.graph_conv(*x, neighbors=5, self_weight=0.3, **o), (4, 3)),
    "graph_conv of the others, row": (
        lambda x, **o: functional.graph_conv(*x, bandwidth=0.6, self_weight=0.3, normalization="row", **o),
        (4, 3),
    ),
    "node_contrast": (lambda x, **o: functional.node_contrast(x[:2], x[2:], temperature=0.4, **o), (3, 3, 3, 3)),
    "node_contrast of some pairs": (
        lambda x, **o: functional.node_contrast(x[:2], x[2:], pairs=[(0, 1), (1, 0)], **o),
        (3, 3, 3, 3),
    ),
    "relation_kl": (lambda x, **o: functional.relation_kl(x[:2], x[2:], temperature=0.4, **o), (3, 2, 4, 5)),
    "relation_kl of some pairs": (
        lambda x, **o: functional.relation_kl(x[:2], x[2:], pairs=[(0, 1), (1, 0)], **o),
        (3, 2, 4, 5),
    ),
    "relation_kl, own shifts": (lambda x, **o: functional.relation_kl(*x, temperature=0.01, **o), (5, 4)),
    "info_nce": (lambda x, **o: functional.info_nce(*x, 0.4, reduction="none", **o), (4, 4)),
    "pkt": (lambda x, **o: functional.pkt(*x, reduction="none", **o), (5, 4)),
    "rkd_distance": (lambda x, **o: functional.rkd_distance(*x, reduction="none", **o), (5, 4)),
    "similarity_preserving": (lambda x, **o: functional.similarity_preserving(*x, reduction="none", **o), (5, 4)),
    "correlation_congruence": (
        lambda x, **o: functional.correlation_congruence(*x, kernel="gaussian", squared=True, reduction="none", **o),
        (5, 4),
    ),
}


def with_bank(name):
    """The same with seven more rows that have no gradient."""

    def function(x, **options):
        bank = tuple(y.to(x[0].dtype) + 0.5 for y in rows(7, 5, 4))
        return FUNCTIONS[name][0](x, bank=bank, **options)

    return function, FUNCTIONS[name][1]


OF_PAIR_SUMS = ("pkt", "rkd_distance", "similarity_preserving", "correlation_congruence")
FUNCTIONS |= {f"{name} with a bank": with_bank(name) for name in OF_PAIR_SUMS}
SHARDS = {
    "one": [41],
    "two equal": [20, 20],
    "two unequal": [40, 1],
    "four": [7, 13, 1, 20],
    "four, two without a sample": [0, 25, 16, 0],
}


def tensors(name: str, dtype: torch.dtype, batch: int):
    """Inputs, the upstream of the output, and cotangents of the inputs' gradients."""
    function, widths = FUNCTIONS[name]
    inputs = [x.to(dtype).requires_grad_() for x in rows(batch, *widths)]
    generator = torch.Generator().manual_seed(3)
    upstream, *cotangents = (
        torch.randn(x.shape, dtype=D64, generator=generator).to(dtype) for x in (function(inputs), *inputs)
    )
    return inputs, upstream, cotangents


def every_order(function, inputs, upstream, cotangents) -> list[list[torch.Tensor]]:
    """The output, the gradients, and the gradients of Σ ⟨gradient, cotangent⟩ at inputs and upstream."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    upstream = upstream.requires_grad_()
    output = function(inputs)
    gradients = torch.autograd.grad(output, inputs, upstream, create_graph=True)
    second = torch.autograd.grad(gradients, [*inputs, upstream], cotangents)
    return [[output.detach()], [g.detach() for g in gradients], list(second)]


def on_rank(group, name, dtype, counts, backend, budget):
    rank = torch.distributed.get_rank(group)
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    inputs, upstream, cotangents = tensors(name, dtype, sum(counts))
    distributed.GATHER_BUDGET = budget

    def function(x):
        return FUNCTIONS[name][0](x, backend=backend, process_group=group)

    return every_order(function, [x[own] for x in inputs], upstream[own], [x[own] for x in cotangents])


def judge(results, name, dtype, counts, tolerance):
    """``results`` of all ranks against one process; first what one rank misses if it sees its own samples alone."""
    inputs, upstream, cotangents = tensors(name, dtype, sum(counts))
    expected = every_order(FUNCTIONS[name][0], inputs, upstream, cotangents)
    for order, truths in enumerate(expected):
        for k, truth in enumerate(truths):
            found = torch.cat([result[order][k] for result in results])
            error = (found - truth).abs().max() / truth.abs().max()
            assert error <= tolerance, f"order {order}, tensor {k}: {error:.2g}"


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_ranks_compute_what_one_process_does(pool, name, shards):
    counts = SHARDS[shards]
    for budget in (float("inf"), 0):
        results = pool.run(on_rank, name, D64, counts, "cpp", budget, ranks=len(counts))
        judge(results, name, D64, counts, 1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_in_float32(pool, name):
    counts = SHARDS["four"]
    for budget in (float("inf"), 0):
        results = pool.run(on_rank, name, torch.float32, counts, "cpp", budget)
        # Own shifts: a rounding of a log-sum of size 1/τ.
        judge(results, name, torch.float32, counts, 1e-4 if "own shifts" in name else 1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_reference_too(pool, name):
    counts = SHARDS["four, two without a sample"]
    judge(pool.run(on_rank, name, D64, counts, "reference", 0), name, D64, counts, 1e-12)


def gradient_of_pairs(group, pairs, normalization, backend, budget):
    """The nodes' gradient at σ = 0.01 where each has one neighbour, on the other of two ranks, in bfloat16 products."""
    rank, generator = torch.distributed.get_rank(group), torch.Generator().manual_seed(0)
    x, messages, upstream = (torch.randn(2 * pairs, 24, generator=generator) for _ in range(3))
    own = slice(rank * pairs, (rank + 1) * pairs)
    nodes = (x[:pairs] + x[own] / 10).requires_grad_()
    distributed.GATHER_BUDGET = budget
    with torch.autocast("cpu", torch.bfloat16):
        output = functional.graph_conv(
            nodes, 3 + messages[own], bandwidth=0.01, self_weight=0.5, normalization=normalization, backend=backend,
            process_group=group,
        )  # fmt: skip
    return torch.autograd.grad(output, nodes, 3 + upstream[own])[0]


@pytest.mark.parametrize("budget", [float("inf"), 0])
@pytest.mark.parametrize("normalization", ["symmetric", "row"])
def test_nodes_of_one_neighbor_on_another_rank_have_no_gradient(pool, normalization, budget):
    """It is 1/σ² times the difference of what two ranks make of the same rows."""
    for gradient in pool.run(gradient_of_pairs, 40, normalization, "cpp", budget, ranks=2):
        assert gradient.abs().max() <= 16 * torch.finfo(torch.float32).eps / 0.01**2


def _alone(group, name, dtype, counts, backend, budget):
    rank = torch.distributed.get_rank(group)
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    inputs, upstream, cotangents = tensors(name, dtype, sum(counts))
    return every_order(FUNCTIONS[name][0], [x[own] for x in inputs], upstream[own], [x[own] for x in cotangents])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_ranks_without_a_group_compute_something_else(pool, name):
    counts = SHARDS["two equal"]
    results = pool.run(_alone, name, D64, counts, "cpp", 0, ranks=2)
    with pytest.raises(AssertionError, match="order 0"):
        judge(results, name, D64, counts, 1e-2)
