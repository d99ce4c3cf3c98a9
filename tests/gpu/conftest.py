"""Settings of the tests on a GPU, or of the same tests at small sizes without one (``target.py``)."""

import pytest
import torch

from gkd_fast.ops import backends

from .target import COMPILE_FOR, COMPILED, TARGET

ASSERTIONS = {"assert_all_products", "assert_no_worse_than_due", "assert_within"}


def pytest_collection_modifyitems(items):
    """Where nothing is judged, what these assertions call is compiled."""
    if TARGET is COMPILED:
        items[:] = [item for item in items if ASSERTIONS & set(item.function.__code__.co_names)]


@pytest.fixture(scope="session", autouse=True)
def compiler():
    if TARGET is not COMPILED:
        yield
        return
    from gkd_fast import kernels
    from gkd_fast.kernels.common.offline import offline

    kernels.register("CPU")
    with offline(COMPILE_FOR):
        yield


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
