"""The kernels' column sets at work: two processes compute what one does, gathered and in a ring, in every order."""

import pytest

from tests.distributed.pool import Pool
from tests.distributed.test_functions import FUNCTIONS, judge, on_rank
from tests.ops_cases import D64

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
