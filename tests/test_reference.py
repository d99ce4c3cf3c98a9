"""The definition against the published figures, and its behaviour at the edges."""

import pytest
import torch

from gkd_fast import reference

D64 = torch.float64


def test_losses_match_the_published_ones(published_case):
    case = published_case
    students = [s.clone().requires_grad_() for s in case["students"]]
    node = reference.node_contrast(students, list(case["teachers"]))
    relation = reference.relation_kl(students, list(case["teachers"]))
    torch.testing.assert_close(node, case["node_per_sample"], atol=1e-10, rtol=0)
    torch.testing.assert_close(relation, case["relation_per_sample"], atol=1e-10, rtol=0)

    node_loss, relation_loss = ((x * case["weights"]).mean(dim=0).sum() / len(students) for x in (node, relation))
    torch.testing.assert_close(node_loss, case["node_loss"], atol=1e-10, rtol=0)
    torch.testing.assert_close(relation_loss, case["relation_loss"], atol=1e-10, rtol=0)
    gradients = torch.autograd.grad(node_loss + relation_loss, students)
    torch.testing.assert_close(torch.stack(gradients), case["grad_students"], atol=1e-10, rtol=0)


@pytest.mark.parametrize("normalization", ["symmetric", "row"])
def test_graph_conv_matches_the_published_one(published_case, normalization):
    case = published_case
    nodes = case["students"][0].clone().requires_grad_()
    messages = case["messages"].clone().requires_grad_()
    output = reference.graph_conv(nodes, messages, 0.7, normalization)
    torch.testing.assert_close(output, case[f"conv_{normalization}"], atol=1e-10, rtol=0)
    gradients = torch.autograd.grad(output, [nodes, messages], case["upstream"])
    for name, gradient in zip(("nodes", "messages"), gradients):
        torch.testing.assert_close(gradient, case[f"conv_{normalization}_grad_{name}"], atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, D64])
@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e18])
def test_unit_rows_do_not_depend_on_scale(dtype, scale):
    x = torch.randn(5, 7, dtype=dtype)
    expected = x / x.norm(dim=1, keepdim=True)
    torch.testing.assert_close(reference.unit_rows(x * scale), expected)


def _with_zero_row() -> torch.Tensor:
    x = torch.randn(6, 4, dtype=D64)
    x[2] = 0
    return x.requires_grad_()


LOSSES = {
    "graph_conv symmetric": lambda x: reference.graph_conv(x, x.flip(1), 0.5, "symmetric"),
    "graph_conv row": lambda x: reference.graph_conv(x, x.flip(1), 0.5, "row"),
    "node_contrast": lambda x: reference.node_contrast([x], [x.flip(0)]),
    "relation_kl": lambda x: reference.relation_kl([x], [x.flip(1)]),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_zero_row_is_orthogonal_and_has_no_gradient_of_its_own(name):
    x = _with_zero_row()
    assert torch.equal(reference.unit_rows(x)[2], torch.zeros(4, dtype=D64))
    value = LOSSES[name](x)
    (first,) = torch.autograd.grad(value.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert value.isfinite().all() and first.isfinite().all() and second.isfinite().all()
    # Dividing by a small constant instead would give 1e12 and 1e24.
    assert first.abs().max() < 1e4 and second.abs().max() < 1e7
    if not name.startswith("graph_conv"):  # there the row is also a message
        assert torch.equal(first[2], torch.zeros(4, dtype=D64))


@pytest.mark.parametrize("dtype", [torch.float32, D64])
def test_extreme_settings_stay_finite(dtype):
    x = torch.randn(9, 5, dtype=dtype)
    x[1], x[2] = x[0], -x[0]  # cosines of exactly ±1
    x.requires_grad_()
    teacher = torch.randn(9, 5, dtype=dtype)
    values = [
        reference.graph_conv(x, teacher, 0.05),
        reference.node_contrast([x], [teacher], temperature=0.01),
        reference.relation_kl([x], [teacher], temperature=0.01, bandwidth=0.05),
        reference.relation_kl([x], [teacher], temperature=0.01, bandwidth=1.0),
    ]
    for value in values:
        (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), x)
        assert value.isfinite().all() and gradient.isfinite().all() and second.isfinite().all()


def test_identical_networks_have_no_relation_loss():
    x = torch.randn(8, 5, dtype=D64, requires_grad=True)
    loss = reference.relation_kl([x], [x.detach() * 3])
    torch.testing.assert_close(loss, torch.zeros_like(loss), atol=1e-14, rtol=0)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-13, rtol=0)


def test_a_single_sample():
    x = torch.randn(1, 5, dtype=D64, requires_grad=True)
    assert torch.equal(reference.graph_conv(x, x * 2, 0.5), x * 2)
    for loss in (reference.node_contrast([x], [x.flip(1)]), reference.relation_kl([x], [x.flip(1)])):
        assert loss.shape == (1, 1, 1) and loss.item() == 0
