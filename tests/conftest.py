from pathlib import Path

import numpy as np
import pytest
import torch

# Tests run in parallel processes; threads of their own would only be in each other's way.
torch.set_num_threads(1)


@pytest.fixture(params=["case_a", "case_b", "case_c"])
def published_case(request) -> dict[str, torch.Tensor]:
    """Inputs and expected float64 outputs of the published losses."""
    with np.load(Path(__file__).parent / "data" / f"{request.param}.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def tile_rows():
    """Sets the rows per tile of the C++ kernels, for the time of a test."""
    from gkd_fast import _C

    yield _C._set_block
    _C._set_block(0)


@pytest.fixture
def instruction_sets():
    """The C++ kernels' instruction sets, best first, and what chooses one of them for the time of a test."""
    from gkd_fast import _C

    yield _C._instruction_sets(), _C._set_instruction_set
    _C._set_instruction_set(_C._instruction_sets()[0])
