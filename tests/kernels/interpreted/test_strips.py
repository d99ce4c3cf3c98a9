"""The strips of wide rows: their budget of memory, and how often they are made."""

import importlib

import pytest
import torch

from gkd_fast import functional
from gkd_fast.kernels.common import small, strips, table
from gkd_fast.kernels.common.launch import PRODUCTS
from gkd_fast.kernels.node_contrast import strips as node_contrast

from .judge import features

LOSSES = {
    "relation_kl": lambda *x: functional.relation_kl([x[0]], [x[1]], backend="triton"),
    "node_contrast": lambda *x: functional.node_contrast([x[0]], [x[1]], backend="triton"),
    "graph_conv": lambda *x: functional.graph_conv(x[0], x[1], bandwidth=1.0, backend="triton"),
    "neighbor_conv": lambda *x: functional.graph_conv(x[0], x[1], neighbors=5, backend="triton"),
}


def gradients(name: str, monkeypatch, budget: int) -> list[torch.Tensor]:
    for constant, value in {"LEAST": 16, "MOST_ROWS": 32, "STRIP_BYTES": budget}.items():
        monkeypatch.setattr(strips, constant, value)
    monkeypatch.setattr(small, "SMALL_BATCH", 0)
    inputs = features(50, 20, 20, dtype=torch.float32)
    with table.forced(16, 16, width=8):
        found = LOSSES[name](*inputs)
        upstream = torch.linspace(-1, 2, found.numel()).view_as(found)
        return [found.detach(), *torch.autograd.grad(found, inputs, upstream)]


@pytest.mark.parametrize("name", LOSSES)
def test_results_are_those_of_any_budget(name, monkeypatch):
    """Beyond roundings; of one budget they are the same bits every time."""
    one, same, other = (gradients(name, monkeypatch, budget) for budget in (1, 1, 2**20))
    for a, b, c in zip(one, same, other, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5 * float(a.abs().max()))


@pytest.mark.parametrize("rows", [128, 1000, 4096])
@pytest.mark.parametrize(("similarities", "weights"), [(1, 0), (1, 1), (2, 2), (6, 0)])
@pytest.mark.parametrize("name", ["bfloat16", "tf32x3", "float64"])
def test_strips_keep_to_the_budget(rows, similarities, weights, name):
    entry = strips.entry_bytes(PRODUCTS[name], similarities, weights)
    sums, product = (8, 8) if name == "float64" else (4, PRODUCTS[name].torch_type.itemsize)
    assert entry == similarities * sums + weights * product
    columns = strips.strip_columns(rows, entry)
    assert columns * rows * entry <= strips.STRIP_BYTES < (columns + strips.LEAST) * rows * entry


def test_the_budget_is_a_setting(monkeypatch):
    assert strips.STRIP_BYTES == 256 * 2**20
    monkeypatch.setenv("GKD_FAST_STRIP_MB", "64")
    assert strips.megabytes("GKD_FAST_STRIP_MB", 256) == 64 * 2**20
    for wrong in ("0", "-1", "64 MB", ""):
        monkeypatch.setenv("GKD_FAST_STRIP_MB", wrong)
        with pytest.raises(ValueError, match=f"GKD_FAST_STRIP_MB must be .* got {wrong!r}"):
            strips.megabytes("GKD_FAST_STRIP_MB", 256)


@pytest.mark.parametrize("needs_teachers", [False, True])
def test_one_strip_serves_the_gradients_of_students_and_teachers(needs_teachers, monkeypatch):
    """50 rows in strips of 32 and 18: forward and backward make two strips each, whatever is wanted."""
    made = []
    monkeypatch.setattr(node_contrast, "multiply", lambda a, b: made.append(a.shape) or strips.multiply(a, b))
    monkeypatch.setattr(importlib.import_module("gkd_fast.ops.node_contrast"), "KEEP_WEIGHTED_BYTES", 0)
    with monkeypatch.context() as patch:
        inputs = features(50, 20, 20, dtype=torch.float32)
        inputs[1].requires_grad_(needs_teachers)
        for constant, value in {"LEAST": 16, "MOST_ROWS": 32}.items():
            patch.setattr(strips, constant, value)
        patch.setattr(small, "SMALL_BATCH", 0)
        with table.forced(16, 16, width=8):
            LOSSES["node_contrast"](*inputs).sum().backward()
    assert [rows for rows, _ in made] == [32, 18] * 2
