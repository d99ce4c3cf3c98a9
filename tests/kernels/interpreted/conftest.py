"""Every tensor that a launcher allocates is NaN and lies between NaNs, so what is not written or not ours shows."""

import math

import pytest
import torch

from gkd_fast.kernels.common import launch, memory, plan, small, strips
from gkd_fast.kernels.graph_conv import graphs as graph_conv
from gkd_fast.kernels.node_contrast import launches as node_contrast
from gkd_fast.kernels.pair_sums import launches as pair_sums
from gkd_fast.kernels.relation_kl import launches as relation_kl

MARGIN = 64


def between_nans(x: torch.Tensor) -> torch.Tensor:
    """The same tensor, contiguous, with NaNs before and after it in memory."""
    buffer = torch.full((x.numel() + 2 * MARGIN,), math.nan, dtype=x.dtype)
    inner = buffer[MARGIN : MARGIN + x.numel()].view(x.shape)
    inner.copy_(x.detach())
    return inner


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    new_empty = torch.Tensor.new_empty

    def surrounded(self, *size, **options):
        x = new_empty(self, *size, **options)
        return between_nans(x.fill_(math.nan)) if x.is_floating_point() else x

    monkeypatch.setattr(torch.Tensor, "new_empty", surrounded)
    monkeypatch.setattr(
        memory, "several", lambda x, count, *shape, dtype: [surrounded(x, shape, dtype=dtype) for _ in range(count)]
    )
    monkeypatch.setattr(torch, "empty_like", lambda x, **options: surrounded(x, x.shape, **options))


@pytest.fixture(autouse=True)
def always_divided(monkeypatch):
    """Columns are divided however few tiles they are."""
    monkeypatch.setattr(node_contrast, "LEAST_SAVED", 0)
    plan.forget()


class Division:
    """How a batch is worked on: by the kernels of small batches, in a tile of 64 columns; or by the others with the
    columns whole, among programs, in pieces of 16 or 32, in strips of 16 × 16, or in wider ones that are divided among
    programs.
    """

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch

    def __call__(self, name: str) -> dict:
        """Sets it up and returns the options of ``table.forced``."""
        plan.forget()
        self.monkeypatch.setattr(small, "SMALL_BATCH", 64 if name == "small" else 0)
        if name != "programs":
            for module in (graph_conv, node_contrast, pair_sums, relation_kl):
                self.monkeypatch.setattr(module, "multiprocessors", lambda device: 1)
        if name == "pieces":
            self.monkeypatch.setattr(launch, "COLUMN_BYTES", 1)
            self.monkeypatch.setattr(launch, "COLUMN_MULTIPLE", 16)
            self.monkeypatch.setattr(relation_kl, "SLOT_BYTES", 1)
            self.monkeypatch.setattr(relation_kl, "ROW_MULTIPLE", 16)
        if name == "strips":
            for constant, value in {"LEAST": 16, "MOST_ROWS": 16, "STRIP_BYTES": 1}.items():
                self.monkeypatch.setattr(strips, constant, value)
            return {"width": 8}
        if name == "divided strips":
            # Of 48 columns or fewer, the sums of each tile of columns apart.
            for constant, value in {"LEAST": 16, "MOST_ROWS": 16, "STRIP_BYTES": 16 * 48 * 16}.items():
                self.monkeypatch.setattr(strips, constant, value)
            self.monkeypatch.setattr(strips, "multiprocessors", lambda device: 2)
            return {"width": 8}
        return {}


@pytest.fixture
def division(monkeypatch):
    return Division(monkeypatch)


@pytest.fixture(params=["small", "programs"])
def small_or_large(request, division):
    """The kernels of small batches and those of larger ones, whose columns are divided among programs."""
    division(request.param)
