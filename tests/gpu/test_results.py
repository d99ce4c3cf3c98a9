"""Values and gradients on a GPU against the reference in float64."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from gkd_fast import GraphKDLoss, functional

from .problems import DEVICE, OPS, assert_no_worse_than_plain, problem

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
each_op = pytest.mark.parametrize("op", OPS)


@each_op
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 2, 97, 127, 129, 700])
def test_batch_sizes(op, dtype, batch):
    assert_no_worse_than_plain(problem(op, batch, 48, dtype))


@each_op
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 17, 64, 128, 129, 256, 257, 512, 1000, 2048, 4096])
def test_widths(op, dtype, dim):
    assert_no_worse_than_plain(problem(op, 150, dim, dtype, stages=(1, 1)))


@pytest.mark.parametrize("op", OPS[:2])
@pytest.mark.parametrize("stages", [(1, 1), (1, 3), (3, 1), (3, 3), (4, 5)], ids=str)
@pytest.mark.parametrize("teachers_wanted", [False, True], ids=["students", "both"])
def test_stages(op, stages, teachers_wanted):
    assert_no_worse_than_plain(problem(op, 300, 32, stages=stages, teachers_wanted=teachers_wanted))


def test_stages_of_different_widths():
    widths = problem("relation_kl", 200, 24), problem("relation_kl", 200, 80)
    mixed = widths[0]
    mixed.inputs |= {"students[1]": widths[1].inputs["students[1]"], "teachers[0]": widths[1].inputs["teachers[0]"]}
    assert_no_worse_than_plain(mixed)


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["near", "zero", "strided"])
def test_kinds_of_input(op, dtype, kind):
    assert_no_worse_than_plain(problem(op, 200, 40, dtype, kind=kind))


@pytest.mark.parametrize("op", OPS[:2])
@pytest.mark.parametrize("temperature", [0.01, 0.03, 5.0])
def test_temperatures(op, temperature):
    """At 0.01 sums under the common bound would underflow, and log-sums are near 100: ten times the rounding."""
    assert_no_worse_than_plain(problem(op, 200, 40, temperature=temperature), slack=2e-5)


@pytest.mark.parametrize("op", ["relation_kl", "graph_conv symmetric", "graph_conv row"])
@pytest.mark.parametrize("bandwidth", [0.05, 3.0])
def test_bandwidths(op, bandwidth):
    """At 0.05 the rounding of a similarity is multiplied by 1/σ² = 400."""
    assert_no_worse_than_plain(problem(op, 200, 40, bandwidth=bandwidth), slack=2e-5)


@each_op
@pytest.mark.parametrize(("precision", "slack"), [("high", 2e-3), ("medium", 2e-2)])
def test_float32_products_in_lower_precision(op, precision, slack):
    """Against plain PyTorch in full precision: by four roundings of tf32 (2^-11) or of bfloat16 (2^-8)."""
    torch.set_float32_matmul_precision(precision)
    assert_no_worse_than_plain(problem(op, 300, 64), slack)


@pytest.mark.parametrize("pairs", [[(0, 1)], [(1, 2), (0, 0)], []], ids=str)
def test_wanted_pairs_of_node_contrast(pairs):
    inputs = list(problem("node_contrast", 150, 32, stages=(2, 3)).inputs.values())
    fast, plain = (
        functional.node_contrast(inputs[:2], inputs[2:], pairs=pairs, backend=b) for b in ("triton", "reference")
    )
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)


@each_op
def test_gradcheck(op):
    checked = problem(op, 5, 3, torch.float64, stages=(2, 2), temperature=0.4)
    leaves = [x.detach().requires_grad_() for x in checked.inputs.values()]
    assert gradcheck(lambda *inputs: checked.call("triton", inputs), leaves)


@each_op
def test_second_order(op):
    checked = problem(op, 5, 3, torch.float64, stages=(2, 2), temperature=0.4, teachers_wanted=False)
    leaves = [x.detach().requires_grad_(k < checked.wanted) for k, x in enumerate(checked.inputs.values())]
    assert gradgradcheck(lambda *inputs: checked.call("triton", inputs), leaves)


@each_op
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("batch", "dim"), [(1, 48), (129, 48), (700, 17), (150, 1000)])
def test_second_order_of_sizes_and_types(op, dtype, batch, dim):
    """Gradients of Σ ⟨gradient, cotangent⟩ at inputs and upstream, judged as first gradients are."""
    assert_no_worse_than_plain(problem(op, batch, dim, dtype, stages=(1, 1)), order=2)


@pytest.mark.parametrize("op", OPS[:2])
def test_second_order_of_stages(op):
    assert_no_worse_than_plain(problem(op, 300, 32, stages=(2, 3)), order=2)


@each_op
def test_nan_in_is_nan_out(op):
    poisoned = problem(op, 130, 32, stages=(1, 1))
    name = next(iter(poisoned.inputs))
    poisoned.inputs[name][7, 3] = torch.nan
    assert poisoned.results("triton")["output"][7].isnan().all()


@each_op
def test_backward_twice_and_frozen_inputs(op):
    checked = problem(op, 140, 32)
    leaves = [x.detach().requires_grad_() for x in checked.inputs.values()]
    output = checked.call("triton", leaves)
    upstream = checked.upstream.to(output.device, output.dtype)
    first = torch.autograd.grad(output, leaves, upstream, retain_graph=True)
    second = torch.autograd.grad(output, leaves, 2 * upstream)
    for a, b in zip(first, second):
        torch.testing.assert_close(2 * a, b)
    (alone,) = torch.autograd.grad(
        checked.call("triton", [leaves[0], *(x.detach() for x in leaves[1:])]), leaves[0], upstream
    )
    torch.testing.assert_close(alone, first[0], rtol=1e-5, atol=1e-7)


def test_autocast_multiplies_in_its_type():
    inputs = [x.float() for x in problem("relation_kl", 300, 64, stages=(1, 1)).inputs.values()]
    with torch.autocast("cuda", torch.bfloat16):
        inside = functional.relation_kl(*inputs, backend="triton")
    outside = functional.relation_kl(*inputs, backend="triton")
    assert inside.dtype == torch.float32 and not torch.equal(inside, outside)
    torch.testing.assert_close(inside, outside, rtol=0.05, atol=0.01)


def test_a_whole_loss_is_the_references():
    torch.manual_seed(0)
    values = {}
    features = [torch.randn(300, width, dtype=torch.float64, device=DEVICE) for width in (12, 20, 16, 24)]
    target = torch.arange(300, device=DEVICE) % 7
    for backend in ("reference", "triton"):
        torch.manual_seed(1)
        criterion = GraphKDLoss([12, 20], [16, 24], num_classes=7, embed_dim=32, backend=backend).double().to(DEVICE)
        students = [x.clone().requires_grad_() for x in features[:2]]
        loss = criterion(students, features[2:], target)
        values[backend] = [loss.detach(), *torch.autograd.grad(loss, [*students, *criterion.parameters()])]
    for fast, plain in zip(values["triton"], values["reference"]):
        torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-11)
