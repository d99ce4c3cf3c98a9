"""Stage pairs that are not wanted: no loss, no gradient, no work, whatever their stages hold."""

import pytest
import torch

from gkd_fast import GraphKDLoss, functional
from gkd_fast._pairs import blocks_of, used_of
from tests.ops_cases import D64, Calls, requires_cpp, rows

BACKENDS = ["reference", pytest.param("cpp", marks=requires_cpp)]
PAIRS = [[(0, 0), (1, 1)], [(0, 1), (1, 0), (1, 1)], [(0, 0), (0, 1)], [(1, 0)], []]


def _function(name: str, has_bank: bool, backend: str, temperature: float = 0.3):
    def function(students, teachers, pairs=None):
        bank = [x.detach()[:7].flip(1) for x in (*students, *teachers)] if has_bank else None
        if bank is not None:
            bank = bank[len(students) :] if name == "node_contrast" else (bank[: len(students)], bank[len(students) :])
        options = {"temperature": temperature, "bank": bank, "backend": backend, "pairs": pairs}
        return getattr(functional, name)(students, teachers, **options)

    return function


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("has_bank", [False, True])
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("name", ["node_contrast", "relation_kl"])
def test_both_orders_are_those_of_the_wanted_pairs_alone(name, pairs, has_bank, backend):
    """A stage without a wanted pair holds NaN, and has a gradient of zeros."""
    widths = [4] * 4 if name == "node_contrast" else [4, 3, 5, 6]
    stages = rows(37, *widths)
    for q, x in enumerate(stages):
        if not any(q in (s, 2 + t) for s, t in pairs):
            x.fill_(torch.nan)
    stages = [x.requires_grad_() for x in stages]
    function = _function(name, has_bank, backend)
    upstream = torch.randn(37, 2, 2, dtype=D64, requires_grad=True)
    cotangents = [torch.randn_like(x) for x in stages]

    def orders(losses):
        first = torch.autograd.grad((losses * upstream).sum(), stages, create_graph=True, materialize_grads=True)
        second = [torch.zeros_like(x) for x in (*stages, upstream)]
        if pairs:
            product = sum((x * v).sum() for x, v in zip(first, cotangents))
            second = torch.autograd.grad(product, [*stages, upstream], materialize_grads=True)
        return [losses, *first, *second]

    columns = torch.zeros(37, 2, 2, dtype=D64)
    for s, t in pairs:
        alone = function(stages[s : s + 1], stages[2 + t : 3 + t])
        place = torch.zeros(1, 2, 2, dtype=D64)
        place[0, s, t] = 1
        columns = columns + alone * place
    found = orders(function(stages[:2], stages[2:], pairs))
    torch.testing.assert_close(found, orders(columns), rtol=1e-9, atol=1e-11)


@requires_cpp
@pytest.mark.parametrize("name", ["node_contrast", "relation_kl"])
def test_unwanted_pairs_and_stages_are_in_no_call(name):
    stages = [x.requires_grad_() for x in rows(9, *[4] * 8)]
    with Calls() as calls:
        _function(name, False, "cpp")(stages[:4], stages[4:], [(0, 0), (2, 3)]).sum().backward()
    (gradients,) = {called for called, _ in calls.calls if called.endswith(f"{name}_backward")}
    met = [
        (len(x["students"]), len(x["teachers"]), sum(x.get("wanted", [True]))) for x in calls.arguments(gradients)
    ]  # fmt: skip
    assert met == ([(2, 2, 2)] if name == "node_contrast" else [(1, 1, 1)] * 2)
    assert len(calls.arguments("unit_rows")) == len(met)


def test_blocks_hold_every_pair_once_and_few_stages():
    matched = [(k, k) for k in range(3)]
    assert blocks_of(matched) == [([k], [k]) for k in range(3)]
    everything = [(s, t) for s in range(3) for t in range(2)]
    assert blocks_of(everything) == [([0, 1, 2], [0, 1])]
    # Three blocks of seven stages by their students, two of six by their teachers.
    assert blocks_of([(0, 0), (1, 1), (2, 0), (2, 1)]) == [([0, 2], [0]), ([1, 2], [1])]
    assert blocks_of([]) == used_of([]) == []
    assert used_of([(3, 1), (0, 1)]) == [([0, 3], [1])]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_a_stage_that_the_loss_does_not_use(backend):
    options = {"teacher_graph": "frozen", "backend": backend}
    torch.manual_seed(0)
    both = GraphKDLoss([4, 4], [4, 4], pairs=[(0, 0)], **options)
    student, teacher = ([torch.randn(9, 4), torch.full((9, 4), torch.nan)] for _ in range(2))
    leaf = student[0].requires_grad_()
    both(student, teacher).backward()
    torch.manual_seed(0)
    alone = GraphKDLoss([4], [4], **options)
    expected = alone([student[0].detach()], [teacher[0]]) / 2  # of two student stages
    torch.testing.assert_close(both(student, teacher), expected)
    assert leaf.grad.isfinite().all() and leaf.grad.any()
