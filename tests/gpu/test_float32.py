"""float32 rows, whose products are sums of float16 products: a matrix unit that cut digits off as it adds would show in
long sums.
"""

import pytest
import torch

from .problems import D64, OPS, problem
from .target import GPU, TARGET

ROWS = (300, 65536) if TARGET is GPU else (20, 36)
WIDTH = 64 if TARGET is GPU else 20
EPS = torch.finfo(torch.float32).eps


def errors(op: str, rows: int, setting: str) -> dict[str, float]:
    """Root mean squares relative to those of the results; the truth is the float64 kernels': the reference would take
    B×B numbers.
    """
    checked = problem(op, rows, WIDTH, D64, stages=(1, 1))
    truth = checked.results(TARGET.backend, D64)
    torch.set_float32_matmul_precision(setting)
    try:
        found = checked.results(TARGET.backend, torch.float32)
    finally:
        torch.set_float32_matmul_precision("highest")
    return {name: float((found[name].double() - x).norm() / x.norm()) for name, x in truth.items()}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("setting", ["highest", "high"])
def test_errors_do_not_grow_with_the_batch(op, setting):
    few, many = (errors(op, rows, setting) for rows in ROWS)
    grown = {name: (few[name], error) for name, error in many.items() if not error <= 2 * few[name] + 4 * EPS}
    assert not grown
