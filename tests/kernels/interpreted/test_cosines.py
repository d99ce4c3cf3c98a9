"""Short product types where rows are alike: against float64 of the rows themselves, not of rounded ones."""

from functools import partial

import pytest
import torch

from gkd_fast import functional
from gkd_fast.kernels.common import table
from tests.second_order_cases import second_order

from .judge import values_and_gradients


def of_one_pair(function):
    return lambda student, teacher, backend: function([student], [teacher], backend=backend)


FUNCTIONS = {
    "graph_conv symmetric": partial(functional.graph_conv, neighbors=None, self_weight=None),
    "graph_conv row": partial(functional.graph_conv, neighbors=None, self_weight=None, normalization="row"),
    "neighbor_conv symmetric": partial(functional.graph_conv, neighbors=None, self_weight=0.3),
    "neighbor_conv row": partial(functional.graph_conv, neighbors=None, self_weight=0.3, normalization="row"),
    "node_contrast": functional.node_contrast,
}
LOSSES = {name: of_one_pair(getattr(functional, name)) for name in ("relation_kl", "node_contrast")}


def with_a_bank(student, teacher, backend):
    bank = tuple([x.detach().roll(1, 1)] for x in (student, teacher))
    return functional.relation_kl([student], [teacher], backend=backend, bank=bank)


def of_four_pairs(student, teacher, backend):
    students, teachers = [student, student.roll(1, 0)], [teacher, teacher.roll(2, 1)]
    return functional.relation_kl(students, teachers, backend=backend)


def contrast_with_a_bank(student, teacher, backend):
    bank = [teacher.detach().roll(1, 1)]
    return functional.node_contrast([student], [teacher], backend=backend, bank=bank)


def negatives_of_a_queue(student, teacher, backend):
    bank = teacher.detach().roll(1, 1)
    return functional.info_nce(student, teacher, 0.1, reduction="none", backend=backend, bank=bank)


MORE = {
    "relation_kl": LOSSES["relation_kl"], "relation_kl with a bank": with_a_bank,
    "relation_kl of four pairs": of_four_pairs, "node_contrast with a bank": contrast_with_a_bank,
    "info_nce with a bank": negatives_of_a_queue,
}  # fmt: skip
each_function = pytest.mark.parametrize("name", FUNCTIONS)


def alike(count: int, cosine: float) -> list[torch.Tensor]:
    """Matrices of rows 1 + s·randn, whose mean cosine is 1/(1 + s²)."""
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(52, 24, dtype=torch.float64, generator=generator) for _ in range(count)]
    return [(x if cosine == 0 else 1 + (1 / cosine - 1) ** 0.5 * x).requires_grad_() for x in noise]


def largest_errors(name: str, cosine: float, tiles: dict, results) -> list[float]:
    """Of every result, relative to its largest entry, with products in bfloat16."""
    inputs = alike(2, cosine)
    single = [x.detach().float().requires_grad_() for x in inputs]
    function = (FUNCTIONS | LOSSES | MORE)[name]
    shape = function(*inputs, backend="reference").shape
    upstream = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    truth = results(function, inputs, upstream, backend="reference")
    torch.set_float32_matmul_precision("medium")
    try:
        with table.forced(16, 16, **tiles):
            found = results(function, single, upstream, backend="triton")
    finally:
        torch.set_float32_matmul_precision("highest")
    return [((x - y).abs().max() / y.abs().max()).item() for x, y in zip(found, truth, strict=True)]


@each_function
@pytest.mark.parametrize("cosine", [0, 0.9, 0.99, 0.999, 0.9999])
@pytest.mark.parametrize("divided", ["small", "programs", "strips"])
def test_values_and_gradients(name, cosine, division, divided):
    assert max(largest_errors(name, cosine, division(divided), values_and_gradients)) <= 1e-2


@pytest.mark.parametrize("name", [*FUNCTIONS, "relation_kl"])
@pytest.mark.parametrize("cosine", [0, 0.9, 0.99, 0.999, 0.9999])
def test_second_order(name, cosine, division):
    """At cosine 0 rows differ by their length, and so do roundings of rows and directions: 1.8e-2 of relation_kl."""
    bound = 2e-2 if (name, cosine) == ("relation_kl", 0) else 1e-2
    assert max(largest_errors(name, cosine, division("whole"), second_order)) <= bound


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("cosine", [0, 0.9, 0.99])
def test_losses_of_small_batches(name, cosine, division):
    assert max(largest_errors(name, cosine, division("small"), values_and_gradients)) <= 1e-2


@pytest.mark.parametrize("cosine", [0, 0.9, 0.99, 0.999, 0.9999])
@pytest.mark.parametrize(
    ("name", "divided"),
    [("relation_kl", "small"), ("relation_kl", "strips"), ("relation_kl with a bank", "programs"),
     ("relation_kl of four pairs", "programs"), ("node_contrast with a bank", "programs"),
     ("node_contrast with a bank", "strips"), ("info_nce with a bank", "programs")],
)  # fmt: skip
def test_losses_of_batches_of_any_size(name, cosine, divided, division):
    assert max(largest_errors(name, cosine, division(divided), values_and_gradients)) <= 1e-2
