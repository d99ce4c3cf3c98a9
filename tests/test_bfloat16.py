"""Tiles that the CPU multiplies in bfloat16, against the float64 definition of the rows as they are given.

Tests of such products are skipped where the processor has none; the accuracy rule of the other files holds everywhere.
"""

import threading
from collections.abc import Sequence
from importlib import import_module

import pytest
import torch
from torch import Tensor

from gkd_fast import functional, ops, reference
from tests.ops_cases import D64, FUNCTIONS, MISSING, requires_cpp, results, rows, same_bits, threads
from tests.precision_cases import (
    BOUND,
    CASES,
    COSINES,
    MODES,
    assert_keeps_bound,
    first_order_results,
    near_rows,
    second_order_results,
)
from tests.second_order_cases import FUNCTIONS as SECOND_ORDER
from tests.second_order_cases import assert_errs_no_more_than_plain, matrices

BF16 = torch.bfloat16
EPS = torch.finfo(BF16).eps  # a rounding errs by up to half of it
ROUNDING = "avx512_bf16"
if MISSING is None:
    from gkd_fast import _C

HAS_PRODUCTS = MISSING is None and ROUNDING in _C._instruction_sets()
pytestmark = requires_cpp
with_products = pytest.mark.skipif(not HAS_PRODUCTS, reason="this processor multiplies no bfloat16")


def close(found: Sequence[Tensor], expected: Sequence[Tensor], rounding: float, absolute: float = 0.0) -> None:
    for x, y in zip(found, expected, strict=True):
        error, size = (x.double() - y.double()).abs().max().item(), y.abs().max().item()
        assert error <= rounding * size + absolute, f"error {error:.3g}, size {size:.3g}"


@with_products
@pytest.mark.parametrize("cosine", COSINES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_results_of_the_true_rows_whatever_their_cosines(tile_rows, name, mode, cosine):
    """Outputs and the gradients of all inputs; tiles are crossed."""
    tile_rows(32)
    assert_keeps_bound(name, cosine, "cpp", BF16, mode)


@with_products
@pytest.mark.parametrize("cosine", COSINES)
@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_at_the_true_rows(tile_rows, name, cosine):
    """The gradients of inputs and upstream."""
    tile_rows(32)
    assert_keeps_bound(name, cosine, "cpp", BF16, results=second_order_results)


@with_products
@pytest.mark.parametrize("cosine", [0.9, 0.999])
@pytest.mark.parametrize("name", CASES)
def test_zero_rows_among_rows_that_are_nearly_alike(tile_rows, name, cosine):
    tile_rows(32)
    assert_keeps_bound(name, cosine, "cpp", BF16, zero_rows=True)


@with_products
@pytest.mark.parametrize("name", CASES)
def test_the_blocks_that_the_kernels_choose_and_any_number_of_threads(name):
    """With as many rows as have blocks of the largest size; the same bits whoever works."""
    function, widths = CASES[name]
    inputs = [x.to(BF16) for x in near_rows(800, 0.99, *widths)]
    found = []
    for count in (1, 2, 3):
        with threads(count):
            found.append(first_order_results(function, inputs, "cpp"))
    assert same_bits(found[0], found[1]) and same_bits(found[0], found[2])
    truth = first_order_results(function, [x.double() for x in inputs], "reference")
    for x, y in zip(found[0], truth, strict=True):
        assert (x.double() - y).abs().max() <= BOUND * y.abs().max()


@with_products
def test_a_zero_row_is_orthogonal_to_all_rows_to_the_last_bit(tile_rows):
    """Of losses that a temperature of 1 makes of cosines: those of zero students are log B."""
    tile_rows(32)
    student, teacher = near_rows(67, 0.999, 65, 65)
    student[3] = student[40] = 0
    losses = functional.node_contrast(student.to(BF16), teacher.to(BF16), temperature=1.0, backend="cpp")
    torch.testing.assert_close(losses[[3, 40]], torch.full((2, 1, 1), 67.0).log(), rtol=0, atol=1e-6)


@with_products
@pytest.mark.parametrize("name", FUNCTIONS)
def test_which_products_are_taken(instruction_sets, name):
    """Those of rounded rows for bfloat16 inputs alone, where the instruction set and PyTorch's settings allow them."""
    available, use = instruction_sets
    make, widths = FUNCTIONS[name]
    function, inputs = make("cpp"), [x.to(BF16) for x in rows(67, *widths)]

    def taken(*names: str, dtype: torch.dtype = BF16) -> list[list[Tensor]]:
        found = []
        for instruction_set in names:
            use(instruction_set)
            found.append(results(function, [x.to(dtype) for x in inputs], BF16))
        return found

    assert available[0] == ROUNDING
    rounded, plain = taken(ROUNDING, "avx512")
    assert not same_bits(rounded, plain)
    with torch.backends.mkldnn.flags(enabled=False):
        assert same_bits(*taken(ROUNDING), plain)
    for dtype in (torch.float32, torch.float16, D64):
        assert same_bits(*taken(ROUNDING, "avx512", dtype=dtype))


@with_products
@pytest.mark.parametrize("name", FUNCTIONS)
def test_nan_stays_nan(tile_rows, name):
    tile_rows(32)
    make, widths = FUNCTIONS[name]
    inputs = [x.to(BF16) for x in rows(67, *widths)]
    inputs[0][40] = torch.nan
    output, *gradients = results(make("cpp"), inputs, BF16)
    assert output[40].isnan().any() and gradients[0][40].isnan().all()


@with_products
def test_a_product_that_fails_is_an_error_and_keeps_no_thread_waiting(tile_rows):
    """PyTorch refuses products from the moment at which another thread switches oneDNN off."""
    tile_rows(32)
    make, widths = FUNCTIONS["relation_kl"]
    function, inputs = make("cpp"), [x.to(BF16) for x in rows(1000, *widths)]
    expected, done = results(function, inputs, BF16), threading.Event()

    def switch():
        enabled = False
        while not done.wait(1e-3):
            torch.backends.mkldnn.set_flags(enabled)
            enabled = not enabled

    switching = threading.Thread(target=switch)
    with threads(4):
        switching.start()
        try:
            for _ in range(8):
                with pytest.raises(RuntimeError, match="Brgemm"):
                    while True:
                        function(*inputs)
        finally:
            done.set()
            switching.join()
            torch.backends.mkldnn.set_flags(True)
        assert same_bits(results(function, inputs, BF16), expected)


BOUNDS = [slice(0, 3), slice(3, 61), slice(61, 101)]


def unit_stages(*widths: int) -> list[Tensor]:
    return [reference.unit_rows(x).float() for x in rows(101, *widths)]


@with_products
@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_shards_of_relation_kl_and_node_contrast(tile_rows, temperature):
    """Rectangles of rows and all columns give what the symmetric tiles give, but for roundings of weights."""
    tile_rows(32)
    calls, upstream, needs = torch.ops.gkd_fast, torch.randn(101, 1, 1), [True, True]
    (student, teacher), both = unit_stages(33, 33), [[True], [True]]
    options = (temperature, 0.7, "bfloat16")
    whole = calls.relation_kl([student], [teacher], *options)
    gradients = calls.relation_kl_backward(upstream, [student], [teacher], *whole, *options, needs)
    contrast = calls.node_contrast([student], [teacher], both[0], temperature, "bfloat16", True)
    contrast_gradients = calls.node_contrast_backward(
        upstream, [student], [teacher], *contrast[1:], both[0], temperature, "bfloat16", needs
    )
    # A log-sum is rounded to float32, which a low temperature turns into a relative error of P.
    tolerance = {"rounding": 1e-6, "absolute": 2e-6 / temperature}
    for part in BOUNDS:
        own = [student[part]], [teacher[part]]
        columns = [student], [teacher], part.start
        found = calls.relation_kl(*own, *options, *columns)
        close(found, [whole[0][part], whole[1][:, part], whole[2][:, part]], **tolerance)
        found = calls.relation_kl_backward(
            upstream[part], *own, *found, *options, needs, *columns, upstream, *whole
        )  # fmt: skip
        close(found, [x[part] for x in gradients], EPS, EPS * 0.01)
        found = calls.node_contrast(*own, *both[:1], temperature, "bfloat16", True, [teacher], part.start)
        close(found, [contrast[0][part], *(x[:, part] for x in contrast[1:])], EPS, EPS * 0.01)
        for kept in (found[2], torch.empty(0)):
            again = calls.node_contrast_backward(
                upstream[part], *own, found[1], kept, both[0], temperature, "bfloat16", needs, [teacher], [student],
                part.start, upstream, contrast[1],
            )  # fmt: skip
            close(again, [x[part] for x in contrast_gradients], 2 * EPS, EPS / temperature * 0.01)


@with_products
@pytest.mark.parametrize("normalization", ["symmetric", "row"])
def test_shards_of_graph_conv(tile_rows, normalization):
    tile_rows(32)
    calls, upstream, messages = torch.ops.gkd_fast, torch.randn(101, 17), torch.randn(101, 17)
    (nodes,) = unit_stages(33)
    settings = torch.tensor(2.0), normalization, "bfloat16"
    output, degrees = calls.graph_conv(nodes, messages, *settings)
    given = upstream, nodes, messages, output, degrees
    gradients = calls.graph_conv_backward(*given, *settings, [True, True])
    terms = ops.node_terms(upstream, output, messages, gradients[1], degrees, normalization)
    for part in BOUNDS:
        found = calls.graph_conv(
            nodes[part], messages[part], *settings, nodes, messages, part.start, degrees[part], degrees
        )
        close(found, [output[part], degrees[part]], EPS)
        found = calls.graph_conv_backward(
            *(x[part] for x in given), *settings, [True, True], nodes, messages, part.start, upstream, degrees,
            terms[part], terms,
        )  # fmt: skip
        close(found, [x[part] for x in gradients], 2 * EPS)


@with_products
@pytest.mark.parametrize("budget", [2**40, 0])
def test_gradients_of_a_student_near_its_teacher(tile_rows, monkeypatch, budget):
    """The own column's weight is nearly 1 and cancels with what is taken from the mean."""
    monkeypatch.setattr(import_module("gkd_fast.ops.node_contrast"), "KEEP_WEIGHTED_BYTES", budget)
    tile_rows(32)
    (teacher,) = matrices(97, 129)
    student = teacher + 0.1 * matrices(97, 129, 129)[1]

    def call(x: Tensor, backend: str) -> Tensor:
        return functional.node_contrast(x, teacher.to(x.dtype), backend=backend)

    truth = results(lambda x: call(x, "reference"), [student])
    with torch.autocast("cpu", BF16):
        found = results(lambda x: call(x, "cpp"), [student.float()])
    close(found[1:], truth[1:], BOUND)


@pytest.mark.parametrize("kind", ["spread", "near-equal"])
@pytest.mark.parametrize("name", SECOND_ORDER)
def test_second_order_errs_no_more_than_twice_plain_pytorch(tile_rows, name, kind):
    tile_rows(32)
    function, widths = SECOND_ORDER[name]
    for batch in (1, 97):
        inputs = matrices(batch, *(16 * w + 1 for w in widths))
        if kind == "near-equal":
            inputs = [1 + 0.1 * x for x in inputs]
        assert_errs_no_more_than_plain(function, inputs, "cpp", BF16)
