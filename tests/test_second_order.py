"""Second derivatives of the fused ops: finite differences, the reference, plain PyTorch's accuracy, column sets."""

import itertools
import sys

import pytest
import torch
from torch.autograd import gradgradcheck

from gkd_fast import functional, ops

CPU = torch.device("cpu")
FUSED = [name for name in ("cpp", "triton") if ops.missing(name, CPU) is None]
pytestmark = pytest.mark.skipif(not FUSED, reason="no fused backend computes on this CPU")
BACKEND = FUSED[0] if FUSED else None
D64 = torch.float64


@pytest.fixture(autouse=True)
def small_tiles(request):
    """Tiles of 32 rows, so that small batches have several."""
    if BACKEND == "cpp":
        request.getfixturevalue("tile_rows")(32)


def _matrices(batch: int, *widths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return [torch.randn(batch, w, dtype=D64, generator=generator).requires_grad_() for w in widths]


def _graph_conv(normalization, **options):
    def function(nodes, messages, backend=BACKEND):
        options.setdefault("bandwidth", 0.6)
        return functional.graph_conv(nodes, messages, normalization=normalization, backend=backend, **options)

    return function


def _node_contrast(num_students, temperature=0.4, **options):
    def function(*stages, backend=BACKEND):
        students, teachers = stages[:num_students], stages[num_students:]
        return functional.node_contrast(students, teachers, temperature=temperature, backend=backend, **options)

    return function


def _relation_kl(num_students, temperature=0.4, bandwidth=0.8):
    def function(*stages, backend=BACKEND):
        students, teachers = stages[:num_students], stages[num_students:]
        return functional.relation_kl(students, teachers, temperature=temperature, bandwidth=bandwidth, backend=backend)

    return function


# Name: the function of its inputs, and the inputs' widths.
FUNCTIONS = {
    "graph_conv symmetric": (_graph_conv("symmetric"), (4, 3)),
    "graph_conv row": (_graph_conv("row"), (4, 3)),
    "node_contrast": (_node_contrast(2), (3, 3, 3)),
    "node_contrast of some pairs": (_node_contrast(2, pairs=[(0, 1), (1, 0)]), (3, 3, 3, 3)),
    "relation_kl": (_relation_kl(2), (3, 2, 4)),
    "relation_kl of one pair": (_relation_kl(1), (3, 4)),
}
SHARP = {
    "node_contrast at a low temperature": (_node_contrast(1, temperature=0.01), (3, 3)),
    "relation_kl at a low temperature": (_relation_kl(1, temperature=0.01), (3, 4)),
}


def _second_order(function, inputs, moving, backend, dtype=D64):
    """Gradients of Σ ⟨gradient, cotangent⟩ at all inputs and the upstream; random cotangents of ``moving``."""
    generator = torch.Generator().manual_seed(7)
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    output = function(*inputs, backend=backend)
    upstream = torch.rand(output.shape, dtype=D64, generator=generator).to(dtype).requires_grad_()
    moving = [inputs[k] for k in moving]
    gradients = torch.autograd.grad(output, moving, upstream, create_graph=True)
    # Transposed, so that the cotangents are not contiguous.
    cotangents = [torch.randn(x.shape[::-1], dtype=D64, generator=generator).to(dtype).T for x in moving]
    return torch.autograd.grad(gradients, [*inputs, upstream], cotangents, materialize_grads=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_entry_against_finite_differences(name):
    function, widths = FUNCTIONS[name]
    for batch in (1, 2, 5):
        assert gradgradcheck(function, _matrices(batch, *widths))


@pytest.mark.parametrize("name", [*FUNCTIONS, *SHARP])
def test_finite_differences_across_tiles(name):
    function, widths = (FUNCTIONS | SHARP)[name]
    for batch in (33, 70):
        assert gradgradcheck(function, _matrices(batch, *widths), fast_mode=True)


@pytest.mark.parametrize("name", [*FUNCTIONS, *SHARP])
def test_agrees_with_the_reference(name):
    """Each input alone and all together as the direction; several tiles, one of them of a single row."""
    function, widths = (FUNCTIONS | SHARP)[name]
    inputs = _matrices(97, *(5 * w for w in widths))
    for moving in (*([k] for k in range(len(widths))), range(len(widths))):
        found = _second_order(function, inputs, moving, BACKEND)
        expected = _second_order(function, inputs, moving, "reference")
        for x, y in zip(found, expected, strict=True):
            assert (x - y).abs().max() <= 1e-10 * y.abs().max()


def test_node_contrast_without_kept_weighted_sums(monkeypatch):
    monkeypatch.setattr(sys.modules["gkd_fast.ops.node_contrast"], "KEEP_WEIGHTED_BYTES", 0)
    test_agrees_with_the_reference("node_contrast")


@pytest.mark.parametrize("kind", ["spread", "near-equal", "zero rows"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_float32_errs_no_more_than_twice_plain_pytorch(name, kind):
    function, widths = FUNCTIONS[name]
    inputs = [x.detach() for x in _matrices(161, *(16 * w for w in widths))]
    if kind == "near-equal":
        inputs = [1 + 0.1 * x for x in inputs]
    if kind == "zero rows":
        for x in inputs:
            x[3] = x[100] = 0
    inputs = [x.float() for x in inputs]
    moving = range(len(widths))
    truth = _second_order(function, inputs, moving, "reference")
    found, plain = (_second_order(function, inputs, moving, b, torch.float32) for b in (BACKEND, "reference"))
    for x, y, exact in zip(found, plain, truth, strict=True):
        error, allowed = ((z.double() - exact).abs().max() for z in (x, y))
        assert error <= 2 * allowed + 1e-7 * exact.abs().max()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_single_row_in_float32(name):
    """Nothing compares with anything: the exact results are 0 or of order 1."""
    function, widths = FUNCTIONS[name]
    inputs = [x.detach().float() for x in _matrices(1, *widths)]
    exact = _second_order(function, inputs, range(len(widths)), "reference")
    found = _second_order(function, inputs, range(len(widths)), BACKEND, torch.float32)
    for x, y in zip(found, exact, strict=True):
        torch.testing.assert_close(x.double(), y, atol=1e-5, rtol=1e-5)


def test_the_same_bits_for_any_number_of_threads():
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for function, widths in FUNCTIONS.values():
                inputs = _matrices(161, *(8 * w for w in widths))
                results.append(_second_order(function, inputs, range(len(widths)), BACKEND, torch.float32))
    finally:
        torch.set_num_threads(threads)
    single = results[: len(FUNCTIONS)]
    for again in (results[len(FUNCTIONS) : 2 * len(FUNCTIONS)], results[2 * len(FUNCTIONS) :]):
        assert all(torch.equal(x, y) for a, b in zip(single, again, strict=True) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_not_offered_is_an_error(name):
    function, widths = FUNCTIONS[name]
    inputs = _matrices(5, *widths)
    gradients = torch.autograd.grad(function(*inputs).sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs, create_graph=True)
    for x, wanted in itertools.product(second, inputs):
        with pytest.raises(NotImplementedError, match="third-order gradients are not offered"):
            torch.autograd.grad(x.sum(), wanted, retain_graph=True)
    with pytest.raises(NotImplementedError, match="the fused backends have no forward-mode derivative"):
        torch.func.jvp(function, tuple(x.detach() for x in inputs), tuple(torch.ones_like(x) for x in inputs))


def _unit(batch: int, width: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(batch, width, dtype=D64), dim=1)


ROWS = (slice(0, 40), slice(40, 97))


def _assert_same(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_row_sets_of_graph_conv():
    batch, width, depth = 97, 6, 5
    fused = torch.ops.gkd_fast
    nodes, tangent = _unit(batch, width), torch.randn(batch, width, dtype=D64)
    left, right, extra = torch.randn(3, batch, depth, dtype=D64)
    left_rates, right_rates, terms, term_tangents = torch.randn(4, batch, dtype=D64)
    settings = torch.tensor(2.5, dtype=D64), "float64"
    degrees = fused.graph_degrees_tangent(nodes, tangent, *settings)
    own = [tangent, left, right, left_rates, right_rates, extra, terms, term_tangents]
    for moving in (tangent, None):
        own[0] = moving
        sums = fused.graph_conv_tangent(nodes, moving, [right, left], [right_rates, left_rates], extra, *settings)
        gradient = fused.graph_conv_double_backward(nodes, *own, *settings)
        for rows in ROWS:
            mine = [x if x is None else x[rows] for x in own]
            columns = {"column_nodes": nodes, "column_tangent": moving, "offset": rows.start}
            found = fused.graph_conv_tangent(
                nodes[rows], mine[0], [right, left], [right_rates, left_rates], extra, *settings, **columns
            )
            for x, y in zip(found, sums, strict=True):
                _assert_same(x, y[rows])
            found = fused.graph_conv_double_backward(
                nodes[rows], *mine, *settings, **columns, column_left=left, column_right=right,
                column_left_rates=left_rates, column_right_rates=right_rates, column_extra=extra,
                column_terms=terms, column_term_tangents=term_tangents,
            )  # fmt: skip
            _assert_same(found, gradient[rows])
            found = fused.graph_degrees_tangent(
                nodes[rows], tangent[rows], *settings, column_nodes=nodes, column_tangent=tangent, offset=rows.start
            )
            _assert_same(found, degrees[rows])


def _rows(tensors, rows):
    return [x[rows] for x in tensors]


@pytest.mark.parametrize("moving", [[True, False, False], [True, False, True], [False, True, True]])
def test_row_sets_of_node_contrast(moving):
    fused = torch.ops.gkd_fast
    stages, tangents = [_unit(97, 6) for _ in moving], [torch.randn(97, 6, dtype=D64) for m in moving if m]
    students, teachers = stages[:2], stages[2:]
    upstream = torch.randn(97, 2, 1, dtype=D64)
    settings = [True, True], 0.3, "float64"
    _, log_sums, weighted = fused.node_contrast(students, teachers, *settings, True)
    moved = fused.node_contrast_tangent(students, teachers, tangents, moving, log_sums, weighted, *settings)
    gradients = fused.node_contrast_double_backward(
        upstream, students, teachers, tangents, moving, log_sums, weighted, moved[1], *settings, [True] * 3
    )
    split = sum(moving[:2])
    teacher_columns = {"teacher_columns": teachers, "teacher_column_tangents": tangents[split:]}
    for rows in ROWS:
        own = [_rows(students, rows), _rows(teachers, rows), _rows(tangents, rows), moving]
        statistics = log_sums[:, rows], weighted[:, rows]
        found = fused.node_contrast_tangent(*own, *statistics, *settings, **teacher_columns, offset=rows.start)
        _assert_same(found[0], moved[0][rows])
        _assert_same(found[1], moved[1][:, rows])
        found = fused.node_contrast_double_backward(
            upstream[rows], *own, *statistics, moved[1][:, rows], *settings, [True] * 3, **teacher_columns,
            student_columns=students, student_column_tangents=tangents[:split], offset=rows.start,
            column_upstream=upstream, column_log_sums=log_sums, column_log_sum_tangents=moved[1],
        )  # fmt: skip
        for x, y in zip(found, gradients, strict=True):
            _assert_same(x, y[rows])


@pytest.mark.parametrize("moving", [[True, False, False], [True, False, True], [False, True, True]])
@pytest.mark.parametrize("temperature", [0.3, 0.01])
def test_row_sets_of_relation_kl(moving, temperature):
    fused = torch.ops.gkd_fast
    stages = [_unit(97, width) for width in (4, 6, 5)]
    tangents = [torch.randn_like(x) for x, m in zip(stages, moving) if m]
    students, teachers = stages[:2], stages[2:]
    upstream = torch.randn(97, 2, 1, dtype=D64)
    settings = temperature, 0.8, "float64"
    statistics = fused.relation_kl(students, teachers, *settings)
    moved = fused.relation_kl_tangent(students, teachers, tangents, moving, *statistics, *settings)
    gradients = fused.relation_kl_double_backward(
        upstream, students, teachers, tangents, moving, *statistics, *moved, *settings, [True] * 3
    )
    columns = {"student_columns": students, "teacher_columns": teachers, "column_tangents": tangents}
    names = ("losses", "student_log_sums", "teacher_log_sums")
    column_statistics = {f"column_{name}": x for name, x in zip(names, statistics)}
    names = ("loss_tangents", "student_log_sum_tangents", "teacher_log_sum_tangents")
    column_statistics |= {f"column_{name}": x for name, x in zip(names, moved)}
    for rows in ROWS:
        own = [_rows(students, rows), _rows(teachers, rows), _rows(tangents, rows), moving]
        mine = [x[rows] if x.dim() == 3 else x[:, rows] for x in (*statistics, *moved)]
        found = fused.relation_kl_tangent(*own, *mine[:3], *settings, **columns, offset=rows.start)
        for x, y in zip(found, mine[3:], strict=True):
            _assert_same(x, y)
        found = fused.relation_kl_double_backward(
            upstream[rows], *own, *mine, *settings, [True] * 3, **columns, offset=rows.start,
            column_upstream=upstream, **column_statistics,
        )  # fmt: skip
        for x, y in zip(found, gradients, strict=True):
            _assert_same(x, y[rows])
