"""Ten seconds of the random calls of ``make fuzz``."""

from gkd_fast import reference

from .fuzz import draw, fuzz
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
