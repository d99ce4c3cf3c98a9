"""What goes wrong on one rank is an error on all, which names the rank and the reason."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from gkd_fast import GraphKDLoss, functional
from tests.distributed.pool import Failure, Pool, die
from tests.ops_cases import requires_cpp

pytestmark = requires_cpp


def call(group, faults: dict):
    """relation_kl, on the ranks of ``faults`` with these changes of its arguments."""
    arguments = {"students": torch.randn(4, 3), "teachers": torch.randn(4, 3), "temperature": 0.1}
    arguments |= faults.get(dist.get_rank(group), {})
    return functional.relation_kl(**arguments, process_group=group)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"students": torch.randn(4, 3, 1)}, r"rank 2 has an error: ValueError: students\[0\] must have 2 dimensions"),
        ({"temperature": -1}, "rank 2 has an error: ValueError: temperature must be positive"),
        ({"temperature": 0.2}, r"rank 2 is at 'relation_kl\(0.2, .*, rank 0 at 'relation_kl\(0.1"),
        ({"students": torch.randn(4, 7)}, r"ranks disagree: rank 2 is at .*float32\[\*, 7\]"),
        ({"students": torch.randn(4, 3).double(), "teachers": torch.randn(4, 3).double()}, "rank 2 is at .*float64"),
        ({"students": torch.randn(4, 3, requires_grad=True)}, "rank 2 is at .*with gradient"),
    ],
)
def test_arguments_of_one_rank(pool, fault, message):
    outcomes = pool.outcomes(call, {2: fault})
    assert all(isinstance(x, Failure) for x in outcomes)
    for rank in (0, 1, 3):
        pytest.raises(ValueError, lambda rank=rank: raise_(outcomes[rank])).match(message)
    pool.run(call, {})


def raise_(failure: Failure) -> None:
    raise ValueError(failure)


def other_function(group):
    x = torch.randn(4, 3)
    function = functional.graph_conv if dist.get_rank(group) == 1 else functional.relation_kl
    return function(x, x, process_group=group)


def test_another_function_on_one_rank(pool):
    for outcome in pool.outcomes(other_function):
        assert isinstance(outcome, Failure) and "rank 1 is at 'graph_conv" in outcome


def test_no_sample_at_all(pool):
    faults = {rank: {"students": torch.empty(0, 3), "teachers": torch.empty(0, 3)} for rank in range(4)}
    for outcome in pool.outcomes(call, faults):
        assert isinstance(outcome, Failure) and "no rank has a sample" in outcome


def loss_of_wrong_features(group):
    criterion = GraphKDLoss(3, 3, num_classes=2, embed_dim=4, process_group=group)
    width = 5 if dist.get_rank(group) == 3 else 3
    return criterion(torch.randn(4, width), torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))


def test_features_of_one_rank(pool):
    for rank, outcome in enumerate(pool.outcomes(loss_of_wrong_features)):
        assert isinstance(outcome, Failure) and r"student_feats[0] must have width 3" in outcome
        assert rank == 3 or "rank 3 has an error" in outcome


def lose_one(group, how: str):
    """A step of the loss; between its forward and its backward pass rank 2 dies or stays away."""
    x = torch.randn(4, 3, requires_grad=True)
    losses = functional.relation_kl(x, x, process_group=group)
    if dist.get_rank(group) == 2:
        if how == "dies":
            die()
        time.sleep(12)
        return None
    losses.sum().backward()


@pytest.mark.parametrize("how", ["dies", "stays away"])
def test_a_rank_that_is_lost(how):
    pool = Pool(4, timeout=timedelta(seconds=4))
    try:
        outcomes = pool.outcomes(lose_one, how)
    finally:
        pool.close()
    assert outcomes[2] is None
    for rank in (0, 1, 3):
        assert isinstance(outcomes[rank], Failure)
        assert "ranks [2] do not answer: dead, or stuck elsewhere" in outcomes[rank]
