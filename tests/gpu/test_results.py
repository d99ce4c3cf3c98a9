"""Values and gradients against the reference in float64: few rows, stages, kinds of input, options, NaN, autocast."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from gkd_fast import GraphKDLoss, functional
from tests.ops_cases import GRAPHS
from tests.test_neighbor_bandwidth import DATA

from .problems import DEVICE, OPS, assert_all_products, assert_no_worse_than_due, problem
from .target import TARGET

ROWS = TARGET.other_rows
each_op = pytest.mark.parametrize("op", OPS)


@each_op
@pytest.mark.parametrize("batch", [*TARGET.few_rows, ROWS])
def test_batch_sizes(op, batch):
    assert_all_products(problem(op, batch, 48, torch.float64))


@each_op
@pytest.mark.parametrize("width", TARGET.few_rows_widths)
def test_widths_of_small_batches(op, width):
    assert_all_products(problem(op, TARGET.few_rows[-1], width, torch.float64, stages=(1, 1)))


@pytest.mark.parametrize("op", OPS[:2])
@pytest.mark.parametrize("stages", [(1, 1), (1, 3), (3, 1), (3, 3), (4, 5)], ids=str)
@pytest.mark.parametrize("teachers_wanted", [False, True], ids=["students", "both"])
def test_stages(op, stages, teachers_wanted):
    assert_no_worse_than_due(problem(op, 300, 32, stages=stages, teachers_wanted=teachers_wanted))


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["near", "zero", "strided"])
def test_kinds_of_input(op, dtype, kind):
    assert_no_worse_than_due(problem(op, 200, 40, dtype, kind=kind))


@pytest.mark.parametrize("op", OPS[:2])
@pytest.mark.parametrize("temperature", [0.01, 0.03, 5.0])
def test_temperatures(op, temperature):
    """At 0.01 sums under the common bound would underflow, and log-sums are near 100: ten times the rounding."""
    assert_no_worse_than_due(problem(op, 200, 40, temperature=temperature), slack=2e-5)


@pytest.mark.parametrize("op", ["relation_kl", *OPS[2:]])
@pytest.mark.parametrize("bandwidth", [0.05, 3.0])
def test_bandwidths(op, bandwidth):
    """At 0.05 the rounding of a similarity is multiplied by 1/σ² = 400."""
    assert_no_worse_than_due(problem(op, 200, 40, bandwidth=bandwidth), slack=2e-5)


@pytest.mark.parametrize("pairs", [[(0, 1)], [(1, 2), (0, 0)], []], ids=str)
def test_wanted_pairs_of_node_contrast(pairs):
    inputs = list(problem("node_contrast", 150, 32, stages=(2, 3)).inputs.values())
    fast, plain = (
        functional.node_contrast(inputs[:2], inputs[2:], pairs=pairs, backend=b) for b in (TARGET.backend, "reference")
    )
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)


@each_op
def test_gradcheck(op):
    checked = problem(op, 5, 3, torch.float64, stages=(2, 2), temperature=0.4)
    leaves = [x.detach().requires_grad_() for x in checked.inputs.values()]
    assert gradcheck(lambda *inputs: checked.call(TARGET.backend, inputs), leaves)


@each_op
def test_second_order(op):
    checked = problem(op, 5, 3, torch.float64, stages=(2, 2), temperature=0.4, teachers_wanted=False)
    leaves = [x.detach().requires_grad_(k < checked.wanted) for k, x in enumerate(checked.inputs.values())]
    assert gradgradcheck(lambda *inputs: checked.call(TARGET.backend, inputs), leaves)


@pytest.mark.parametrize("op", OPS[:2])
def test_second_order_of_stages(op):
    assert_no_worse_than_due(problem(op, 300, 32, stages=(2, 3)), order=2)


@each_op
def test_nan_in_is_nan_out(op):
    poisoned = problem(op, 130, 32, stages=(1, 1))
    name = next(iter(poisoned.inputs))
    poisoned.inputs[name][7, 3] = torch.nan
    assert poisoned.results(TARGET.backend)["output"][7].isnan().all()


@each_op
def test_backward_twice_and_frozen_inputs(op):
    checked = problem(op, 140, 32)
    leaves = [x.detach().requires_grad_() for x in checked.inputs.values()]
    output = checked.call(TARGET.backend, leaves)
    upstream = checked.upstream.to(output.device, output.dtype)
    first = torch.autograd.grad(output, leaves, upstream, retain_graph=True)
    second = torch.autograd.grad(output, leaves, 2 * upstream)
    for a, b in zip(first, second):
        torch.testing.assert_close(2 * a, b)
    (alone,) = torch.autograd.grad(
        checked.call(TARGET.backend, [leaves[0], *(x.detach() for x in leaves[1:])]), leaves[0], upstream
    )
    torch.testing.assert_close(alone, first[0], rtol=1e-5, atol=1e-7)


def test_autocast_multiplies_in_its_type():
    inputs = [x.float() for x in problem("relation_kl", 300, 64, stages=(1, 1)).inputs.values()]
    with torch.autocast(DEVICE.type, torch.bfloat16):
        inside = functional.relation_kl(*inputs, backend=TARGET.backend)
    outside = functional.relation_kl(*inputs, backend=TARGET.backend)
    assert inside.dtype == torch.float32 and not torch.equal(inside, outside)
    torch.testing.assert_close(inside, outside, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_a_whole_loss_is_the_references(graph):
    torch.manual_seed(0)
    values = {}
    features = [torch.randn(300, width, dtype=torch.float64, device=DEVICE) for width in (12, 20, 16, 24)]
    target = torch.arange(300, device=DEVICE) % 7
    for backend in ("reference", TARGET.backend):
        torch.manual_seed(1)
        options = {"num_classes": 7, "embed_dim": 32, "backend": backend}
        criterion = GraphKDLoss([12, 20], [16, 24], **options, **graph).double().to(DEVICE)
        students = [x.clone().requires_grad_() for x in features[:2]]
        loss = criterion(students, features[2:], target)
        values[backend] = [loss.detach(), *torch.autograd.grad(loss, [*students, *criterion.parameters()])]
    for fast, plain in zip(values[TARGET.backend], values["reference"]):
        torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("data", ["pixels", "noise of width 128", "two tight classes"])
def test_nodes_have_as_many_neighbors_as_wanted(data, dtype):
    """In float64 to the last digits that 7 passes find; else those of rows as the products take them."""
    for batch in TARGET.rows:
        nodes = DATA[data](batch).to(DEVICE, dtype)
        for k in (4, 16):
            if k < batch / 4:
                sigma = functional.neighbor_bandwidth(nodes, k, backend=TARGET.backend)
                found = functional.effective_neighbors(nodes, sigma, others=True, backend=TARGET.backend)
                assert found.mean().item() == pytest.approx(k, rel=1e-3 if dtype == torch.float64 else 0.15)
