"""Second derivatives of the fused ops: finite differences, the reference, plain PyTorch's accuracy, column sets."""

import itertools
import sys
from functools import partial

import pytest
import torch
from torch.autograd import gradgradcheck

from gkd_fast import ops

from .ops_cases import Calls
from .second_order_cases import (
    D64,
    FUNCTIONS,
    MOVING,
    SHARP,
    assert_agrees,
    assert_errs_no_more_than_plain,
    assert_exact_in_float32,
    check_row_sets_of_graph_conv,
    check_row_sets_of_node_contrast,
    check_row_sets_of_relation_kl,
    float32_results,
    matrices,
)

CPU = torch.device("cpu")
FUSED = [name for name in ("cpp", "triton") if ops.missing(name, CPU) is None]
pytestmark = pytest.mark.skipif(not FUSED, reason="no fused backend computes on this CPU")
BACKEND = FUSED[0] if FUSED else None
ROWS = (slice(0, 40), slice(40, 97))


@pytest.fixture(autouse=True)
def small_tiles(request):
    """Tiles of 32 rows, so that small batches have several."""
    if BACKEND == "cpp":
        request.getfixturevalue("tile_rows")(32)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_entry_against_finite_differences(name):
    function, widths = FUNCTIONS[name]
    for batch in (1, 2, 5):
        assert gradgradcheck(partial(function, backend=BACKEND), matrices(batch, *widths))


@pytest.mark.parametrize("name", [*FUNCTIONS, *SHARP])
def test_finite_differences_across_tiles(name):
    function, widths = (FUNCTIONS | SHARP)[name]
    for batch in (33, 70):
        assert gradgradcheck(partial(function, backend=BACKEND), matrices(batch, *widths), fast_mode=True)


@pytest.mark.parametrize("name", [*FUNCTIONS, *SHARP])
def test_agrees_with_the_reference(name):
    """Several tiles, one of them of a single row."""
    function, widths = (FUNCTIONS | SHARP)[name]
    assert_agrees(function, matrices(97, *(5 * w for w in widths)), BACKEND)


def test_node_contrast_without_kept_weighted_sums(monkeypatch):
    monkeypatch.setattr(sys.modules["gkd_fast.ops.node_contrast"], "KEEP_WEIGHTED_BYTES", 0)
    test_agrees_with_the_reference("node_contrast")


@pytest.mark.parametrize("kind", ["spread", "near-equal", "zero rows"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_float32_errs_no_more_than_twice_plain_pytorch(name, kind):
    function, widths = FUNCTIONS[name]
    inputs = [x.detach() for x in matrices(161, *(16 * w for w in widths))]
    if kind == "near-equal":
        inputs = [1 + 0.1 * x for x in inputs]
    if kind == "zero rows":
        for x in inputs:
            x[3] = x[100] = 0
    assert_errs_no_more_than_plain(function, inputs, BACKEND)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_single_row_in_float32(name):
    """Nothing compares with anything: the exact results are 0 or of order 1."""
    function, widths = FUNCTIONS[name]
    assert_exact_in_float32(function, matrices(1, *widths), BACKEND)


def test_the_same_bits_for_any_number_of_threads():
    threads = torch.get_num_threads()
    results = []
    # PyTorch's own products, of second orders without kernels, do not promise it.
    cpu = torch.device("cpu")
    functions = [case for name, case in FUNCTIONS.items() if ops.has_kernels(f"{name.split()[0]}_tangent", cpu)]
    assert functions
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for function, widths in functions:
                results.append(float32_results(function, matrices(161, *(8 * w for w in widths)), BACKEND))
    finally:
        torch.set_num_threads(threads)
    single = results[: len(functions)]
    for again in (results[len(functions) : 2 * len(functions)], results[2 * len(functions) :]):
        assert all(torch.equal(x, y) for a, b in zip(single, again, strict=True) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_not_offered_is_an_error(name):
    function, widths = FUNCTIONS[name]
    function, inputs = partial(function, backend=BACKEND), matrices(5, *widths)
    gradients = torch.autograd.grad(function(*inputs).sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs, create_graph=True)
    for x, wanted in itertools.product(second, inputs):
        with pytest.raises(NotImplementedError, match="third-order gradients are not offered"):
            torch.autograd.grad(x.sum(), wanted, retain_graph=True)
    with pytest.raises(NotImplementedError, match="the fused backends have no forward-mode derivative"):
        torch.func.jvp(function, tuple(x.detach() for x in inputs), tuple(torch.ones_like(x) for x in inputs))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_only_what_is_asked_for_is_computed(name):
    """The derivative of a gradient at the upstream alone is a tangent of the output; so it is in a hypergradient."""
    function, widths = FUNCTIONS[name]
    inputs, scale = matrices(40, *widths), torch.tensor(0.7, dtype=D64, requires_grad=True)
    features = [x * 2 for x in inputs]
    loss = scale * function(*features, backend=BACKEND).square().sum()
    moved = sum(g.square().sum() for g in torch.autograd.grad(loss, features[:1], create_graph=True))
    op = f"{name.split()[0]}_double_backward"
    with Calls() as calls:
        (alone,) = torch.autograd.grad(moved, scale, retain_graph=True)
    assert not calls.arguments(op) and len(calls.arguments(op.replace("double_backward", "tangent"))) == 1
    with Calls() as calls:
        both = torch.autograd.grad(moved, [scale, *inputs])
    assert len(calls.arguments(op)) == 1
    assert torch.equal(alone, both[0])


def test_row_sets_of_graph_conv():
    check_row_sets_of_graph_conv(97, ROWS)


@pytest.mark.parametrize("moving", MOVING)
def test_row_sets_of_node_contrast(moving):
    check_row_sets_of_node_contrast(97, ROWS, moving)


@pytest.mark.parametrize("moving", MOVING)
@pytest.mark.parametrize("temperature", [0.3, 0.01])
def test_row_sets_of_relation_kl(moving, temperature):
    check_row_sets_of_relation_kl(97, ROWS, moving, temperature)
