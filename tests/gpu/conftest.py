"""Settings of the tests on a GPU, or of the same tests at small sizes without one (``target.py``)."""

import pytest
import torch

from gkd_fast.ops import backends

from .target import TARGET


@pytest.fixture(autouse=True)
def matmul_precision():
    """Restores PyTorch's setting for float32 products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(autouse=True)
def backend_at_hand():
    if TARGET.backend == "cpp" and (reason := backends.missing("cpp", TARGET.device)):
        pytest.skip(f"stands in for a GPU with the C++ kernels: {reason}")
    with TARGET.tiles():
        yield
