"""Ten seconds of the random calls of ``make fuzz``."""

import pytest
import torch

from gkd_fast import reference

from .fuzz import draw, fuzz
from .fuzz.judge import _error
from .ops_cases import FUSED, requires_fused

pytestmark = requires_fused


def test_random_calls_agree_with_the_reference_and_errors_name_their_argument():
    done, failures = fuzz(10, 0, FUSED)
    assert not failures, [f"{failure}: {failure.__cause__}" for failure in failures]
    assert sum(done.values()) > 20


def test_a_case_is_always_the_same():
    assert draw(0, 7, "cpp") == draw(0, 7, "cpp") != draw(1, 7, "cpp")


def test_a_wrong_result_is_a_failure(monkeypatch):
    node_contrast = reference.node_contrast
    monkeypatch.setattr(reference, "node_contrast", lambda *x: 1.01 * node_contrast(*x))
    assert fuzz(3, 0, FUSED)[1]


@pytest.mark.parametrize(("truth", "error"), [(7e4, 0.0), (-7e4, torch.inf), (6e4, torch.inf)])
def test_infinity_is_right_beyond_the_type(truth, error):
    found = torch.tensor([torch.inf, 1.0], dtype=torch.float16)
    assert _error(found, torch.tensor([truth, 1.0], dtype=torch.float64)) == error
