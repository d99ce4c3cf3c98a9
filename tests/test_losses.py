"""The losses as modules: they pool, compare with a teacher that has no gradient, and train."""

import pytest
import torch

from gkd_fast import functional, losses

MODULES = {
    "similarity_preserving": (
        lambda **o: losses.SimilarityPreserving(**o),
        lambda s, t: functional.similarity_preserving(s, t, norm=2),
    ),
    "correlation_congruence": (
        lambda **o: losses.CorrelationCongruence(**o),
        lambda s, t: functional.correlation_congruence(s, t, kernel="gaussian"),
    ),
    "pkt": (lambda **o: losses.PKT(**o), functional.pkt),
    "rkd": (
        lambda **o: losses.RKD(**o),
        lambda s, t: 25 * functional.rkd_distance(s, t) + 50 * functional.rkd_angle(s, t),
    ),
    "info_nce": (lambda **o: losses.InfoNCE(6, 6, 0.2, **o), lambda s, t: functional.info_nce(s, t, 0.2)),
}


@pytest.mark.parametrize("name", MODULES)
def test_features_of_any_layout_are_pooled_and_compared(name):
    make, function = MODULES[name]
    maps, tokens = torch.randn(9, 6, 3, 3).requires_grad_(), torch.randn(9, 5, 6).requires_grad_()
    loss = make(pool={"student": "mean", "teacher": "cls"})(maps, tokens)
    assert loss.shape == ()
    torch.testing.assert_close(loss, function(maps.mean(dim=(2, 3)), tokens[:, 0]))
    loss.backward()
    assert maps.grad.abs().max() > 0 and tokens.grad is None


@pytest.mark.parametrize("name", [name for name in MODULES if name != "rkd"])
def test_a_bank_goes_to_the_function(name):
    make, _ = MODULES[name]
    students, teachers = torch.randn(9, 6), torch.randn(9, 6)
    bank = (torch.randn(5, 6), torch.randn(5, 6)) if name != "info_nce" else torch.randn(5, 6)
    loss = make()(students, teachers, bank=bank)
    expected = {
        "similarity_preserving": lambda: functional.similarity_preserving(students, teachers, norm=2, bank=bank),
        "correlation_congruence": lambda: functional.correlation_congruence(
            students, teachers, kernel="gaussian", bank=bank
        ),
        "pkt": lambda: functional.pkt(students, teachers, bank=bank),
        "info_nce": lambda: functional.info_nce(students, teachers, 0.2, bank=bank),
    }[name]()
    assert torch.equal(loss, expected) and loss != make()(students, teachers)


def test_info_nce_projects_and_learns_its_temperature():
    module = losses.InfoNCE(4, 6, 0.2, learn_temperature=True)
    students, teachers = torch.randn(9, 4), torch.randn(9, 6)
    loss = module(students, teachers)
    torch.testing.assert_close(loss, functional.info_nce(module.projection(students), teachers, 0.2))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


def test_kd_divergence_has_no_gradient_at_the_teacher():
    students, teachers = (torch.randn(9, 4).requires_grad_() for _ in range(2))
    loss = losses.KDDivergence(2.0, standardize=True)(students, teachers)
    torch.testing.assert_close(loss, functional.kd_divergence(students, teachers, temperature=2.0, standardize=True))
    loss.backward()
    assert students.grad is not None and teachers.grad is None


def test_rkd_leaves_out_what_has_no_weight_and_refuses_what_is_none():
    students, teachers = torch.randn(9, 4), torch.randn(9, 6)
    torch.testing.assert_close(
        losses.RKD(2.0, 0.0)(students, teachers), 2 * functional.rkd_distance(students, teachers)
    )
    assert losses.RKD(0.0, 0.0)(students, teachers) == 0
    bank = torch.randn(5, 4), torch.randn(5, 6)
    torch.testing.assert_close(
        losses.RKD(2.0, 0.0)(students, teachers, bank=bank),
        2 * functional.rkd_distance(students, teachers, bank=bank),
    )
    with pytest.raises(ValueError, match="bank must be None: rkd_angle"):
        losses.RKD(2.0, 1.0)(students, teachers, bank=bank)
    with pytest.raises(ValueError, match="must not be negative"):
        losses.RKD(-1.0)
