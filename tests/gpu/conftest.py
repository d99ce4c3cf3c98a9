"""Tests of the Triton kernels on a GPU. Without one they are skipped; the interpreter and compile tests stand in."""

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    reason = pytest.mark.skip(reason="needs a CUDA device: torch.cuda.is_available() is False")
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(reason)


@pytest.fixture(autouse=True)
def matmul_precision():
    """Restores PyTorch's setting for float32 products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
