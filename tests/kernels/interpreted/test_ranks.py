"""The kernels' column sets at work: two processes compute what one does, gathered and in a ring, in every order."""

import pytest
import torch

from gkd_fast import distributed, functional
from tests.distributed.pool import Pool
from tests.distributed.test_functions import FUNCTIONS, every_order, gradient_of_pairs, judge, on_rank
from tests.ops_cases import D64

from .test_cosines import alike

COUNTS = [4, 7]


@pytest.fixture(scope="module")
def pool():
    pool = Pool(len(COUNTS))
    yield pool
    pool.close()


@pytest.mark.parametrize("budget", [float("inf"), 0])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_ranks_compute_what_one_process_does(pool, name, budget):
    judge(pool.run(on_rank, name, D64, COUNTS, "triton", budget), name, D64, COUNTS, 1e-10)


@pytest.mark.parametrize("budget", [float("inf"), 0])
@pytest.mark.parametrize("normalization", ["symmetric", "row"])
def test_nodes_of_one_neighbor_on_another_rank_have_no_gradient(pool, normalization, budget):
    for gradient in pool.run(gradient_of_pairs, 10, normalization, "triton", budget):
        assert gradient.abs().max() <= 16 * torch.finfo(torch.float32).eps / 0.01**2


def alike_results(cosine: float, own: slice, dtype: torch.dtype, **options):
    """node_contrast's losses and derivatives at some of the rows 1 + s·randn."""
    inputs = alike(2, cosine)
    upstream, *cotangents = (x.detach().roll(1, 0) for x in alike(3, 0))

    def function(x):
        return functional.node_contrast([x[0]], [x[1]], **options).flatten(1)

    inputs, cotangents = ([x[own].to(dtype) for x in xs] for xs in (inputs, cotangents))
    return every_order(function, inputs, upstream[own, :1].to(dtype), cotangents)


def alike_on_rank(group, cosine, counts, budget):
    first = sum(counts[: torch.distributed.get_rank(group)])
    own = slice(first, first + counts[torch.distributed.get_rank(group)])
    distributed.GATHER_BUDGET = budget
    torch.set_float32_matmul_precision("medium")
    try:
        return alike_results(cosine, own, torch.float32, backend="triton", process_group=group)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("budget", [float("inf"), 0])
@pytest.mark.parametrize("cosine", [0, 0.99, 0.9999])
def test_ranks_round_what_rows_differ_by(pool, cosine, budget):
    """Products in bfloat16: errors relative to the largest entry."""
    results = pool.run(alike_on_rank, cosine, [20, 32], budget)
    for order, truths in enumerate(alike_results(cosine, slice(None), D64, backend="reference")):
        for k, truth in enumerate(truths):
            found = torch.cat([result[order][k] for result in results])
            assert (found - truth).abs().max() <= 1e-2 * truth.abs().max(), (order, k)
