"""What the tests of second derivatives share: functions, their double backward, and what column sets must give."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from gkd_fast import _arguments, functional

from .ops_cases import with_rounded_rows

D64 = torch.float64


def matrices(batch: int, *widths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return [torch.randn(batch, w, dtype=D64, generator=generator).requires_grad_() for w in widths]


def _graph_conv(normalization, self_weight=None):
    options = {"bandwidth": 0.6, "normalization": normalization, "self_weight": self_weight}

    def function(nodes, messages, backend):
        return functional.graph_conv(nodes, messages, backend=backend, **options)

    return function


def _node_contrast(num_students, temperature=0.4, **options):
    def function(*stages, backend):
        students, teachers = stages[:num_students], stages[num_students:]
        return functional.node_contrast(students, teachers, temperature=temperature, backend=backend, **options)

    return function


def _relation_kl(num_students, temperature=0.4, bandwidth=0.8):
    def function(*stages, backend):
        students, teachers = stages[:num_students], stages[num_students:]
        return functional.relation_kl(students, teachers, temperature=temperature, bandwidth=bandwidth, backend=backend)

    return function


# Name: the function of its inputs and the backend, and the inputs' widths.
FUNCTIONS = {
    "graph_conv symmetric": (_graph_conv("symmetric"), (4, 3)),
    "graph_conv row": (_graph_conv("row"), (4, 3)),
    "neighbor_conv symmetric": (_graph_conv("symmetric", 0.3), (4, 3)),
    "neighbor_conv row": (_graph_conv("row", 0.3), (4, 3)),
    "node_contrast": (_node_contrast(2), (3, 3, 3)),
    "node_contrast of some pairs": (_node_contrast(2, pairs=[(0, 1), (1, 0)]), (3, 3, 3, 3)),
    "relation_kl": (_relation_kl(2), (3, 2, 4)),
    "relation_kl of one pair": (_relation_kl(1), (3, 4)),
}
SHARP = {
    "node_contrast at a low temperature": (_node_contrast(1, temperature=0.01), (3, 3)),
    "relation_kl at a low temperature": (_relation_kl(1, temperature=0.01), (3, 4)),
}


def second_order(
    function: Callable, inputs: Sequence[Tensor], upstream: Tensor, backend: str,
    moving: Sequence[int] | None = None, length: float = 1.0,
) -> list[Tensor]:  # fmt: skip
    """Gradients of Σ ⟨gradient, cotangent⟩ at the inputs that require gradient, and at the upstream.

    ``moving``: the inputs whose gradients have a cotangent; None: all that require gradient. The cotangents' entries
    are
    random, of the size ``length``.
    """
    generator = torch.Generator().manual_seed(7)
    output = function(*inputs, backend=backend)
    upstream = upstream.to(output.dtype).requires_grad_()
    wanted = [x for x in inputs if x.requires_grad]
    moving = wanted if moving is None else [inputs[k] for k in moving]
    gradients = torch.autograd.grad(output, moving, upstream, create_graph=True)
    # Transposed, so that the cotangents are not contiguous.
    cotangents = [
        (length * torch.randn(x.shape[::-1], dtype=D64, generator=generator)).to(x).permute(*range(x.ndim)[::-1])
        for x in moving
    ]
    return list(torch.autograd.grad(gradients, [*wanted, upstream], cotangents, materialize_grads=True))


def _results(function, inputs, backend, dtype=D64, moving=None) -> list[Tensor]:
    """``second_order`` of the inputs in ``dtype``, under a random upstream."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    with torch.no_grad():
        shape = function(*inputs, backend="reference").shape
    upstream = torch.rand(shape, dtype=D64, generator=torch.Generator().manual_seed(7))
    return second_order(function, inputs, upstream, backend, moving)


def assert_agrees(function: Callable, inputs: Sequence[Tensor], backend: str) -> None:
    """In float64, each input alone and all together as the direction."""
    for moving in (*([k] for k in range(len(inputs))), None):
        found = _results(function, inputs, backend, moving=moving)
        expected = _results(function, inputs, "reference", moving=moving)
        for x, y in zip(found, expected, strict=True):
            assert (x - y).abs().max() <= 1e-10 * y.abs().max()


def assert_errs_no_more_than_plain(
    function: Callable, inputs: Sequence[Tensor], backend: str, dtype: torch.dtype = torch.float32
) -> None:
    """In ``dtype`` |truth − fast| ≤ 2·|truth − plain|, with plain PyTorch's float64 as truth.

    In bfloat16 plain is what errs more, plain PyTorch or the definition of rounded unit rows in float64, and results
    may err by float32's roundings (entries are up to 1/τ) and their own.
    """
    inputs = [x.detach().to(dtype) for x in inputs]
    truth = _results(function, inputs, "reference")
    found = _results(function, inputs, backend, dtype)
    with pytest.MonkeyPatch.context() as patch:
        # The reference backend computes in float32, plain PyTorch in the inputs' type.
        for module in (functional, _arguments):
            patch.setattr(module, "compute_dtype", lambda tensors: dtype)
        plain = _results(function, inputs, "reference", dtype)
    allowed = [(x.double() - exact).abs().max() for x, exact in zip(plain, truth, strict=True)]
    rounding, absolute = 1e-7, 0.0
    if dtype == torch.bfloat16:
        rounded = with_rounded_rows(lambda: _results(function, inputs, "reference"))
        allowed = [torch.maximum(x, (y - exact).abs().max()) for x, y, exact in zip(allowed, rounded, truth)]
        rounding, absolute = torch.finfo(dtype).eps / 2, 1e-5
    for x, most, exact in zip(found, allowed, truth, strict=True):
        assert (x.double() - exact).abs().max() <= 2 * most + rounding * exact.abs().max() + absolute


def assert_exact_in_float32(function: Callable, inputs: Sequence[Tensor], backend: str) -> None:
    """For results that are 0 or of order 1."""
    inputs = [x.detach().float() for x in inputs]
    exact = _results(function, inputs, "reference")
    found = _results(function, inputs, backend, torch.float32)
    for x, y in zip(found, exact, strict=True):
        torch.testing.assert_close(x.double(), y, atol=1e-5, rtol=1e-5)


def float32_results(function: Callable, inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
    return _results(function, inputs, backend, torch.float32)


def _unit(batch: int, width: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(batch, width, dtype=D64), dim=1)


def _assert_same(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


def _taken(x, rows, place):
    """Rows of x in memory of their own."""
    if isinstance(x, list):
        return [_taken(y, rows, place) for y in x]
    return x if x is None else place(x[rows])


def check_row_sets_of_graph_conv(batch: int, row_sets: Sequence[slice], place: Callable = torch.clone) -> None:
    """Some rows with all columns give what the whole batch gives there; ``place`` copies what is read."""
    width, depth = 6, 5
    fused = torch.ops.gkd_fast
    nodes, tangent = place(_unit(batch, width)), place(torch.randn(batch, width, dtype=D64))
    left, right, extra = (place(torch.randn(batch, depth, dtype=D64)) for _ in range(3))
    left_rates, right_rates, terms, term_tangents = (place(torch.randn(batch, dtype=D64)) for _ in range(4))
    settings = torch.tensor(2.5, dtype=D64), "float64"
    degrees = fused.graph_degrees_tangent(nodes, tangent, *settings)
    for moving in (tangent, None):
        own = [moving, left, right, left_rates, right_rates, extra, terms, term_tangents]
        values = [right, left], [right_rates, left_rates], extra
        sums = fused.graph_conv_tangent(nodes, moving, *values, *settings)
        gradient = fused.graph_conv_double_backward(nodes, *own, *settings)
        for rows in row_sets:
            mine = _taken([nodes, *own], rows, place)
            columns = {"column_nodes": nodes, "column_tangent": moving, "offset": rows.start}
            found = fused.graph_conv_tangent(*mine[:2], *values, *settings, **columns)
            for x, y in zip(found, sums, strict=True):
                _assert_same(x, y[rows])
            found = fused.graph_conv_double_backward(
                *mine, *settings, **columns, column_left=left, column_right=right, column_left_rates=left_rates,
                column_right_rates=right_rates, column_extra=extra, column_terms=terms,
                column_term_tangents=term_tangents,
            )  # fmt: skip
            _assert_same(found, gradient[rows])
            if moving is not None:
                _assert_same(fused.graph_degrees_tangent(*mine[:2], *settings, **columns), degrees[rows])


# Two students and a teacher of which these move.
MOVING = [[True, False, False], [True, False, True], [False, True, True]]


def check_row_sets_of_node_contrast(
    batch: int, row_sets: Sequence[slice], moving: list[bool], keep_weighted: bool = True, place: Callable = torch.clone
) -> None:
    fused = torch.ops.gkd_fast
    stages = [place(_unit(batch, 6)) for _ in moving]
    tangents = [place(torch.randn(batch, 6, dtype=D64)) for m in moving if m]
    students, teachers = stages[:2], stages[2:]
    upstream = place(torch.randn(batch, 2, 1, dtype=D64))
    settings = [True, True], 0.3, "float64"
    _, log_sums, weighted = fused.node_contrast(students, teachers, *settings, keep_weighted)
    moved = fused.node_contrast_tangent(students, teachers, tangents, moving, log_sums, weighted, *settings)
    gradients = fused.node_contrast_double_backward(
        upstream, students, teachers, tangents, moving, log_sums, weighted, moved[1], *settings, [True] * 3
    )
    split = sum(moving[:2])
    teacher_columns = {"teacher_columns": teachers, "teacher_column_tangents": tangents[split:]}
    for rows in row_sets:
        own = [*_taken([students, teachers, tangents], rows, place), moving]
        statistics = place(log_sums[:, rows]), place(weighted[:, rows]) if keep_weighted else weighted
        found = fused.node_contrast_tangent(*own, *statistics, *settings, **teacher_columns, offset=rows.start)
        _assert_same(found[0], moved[0][rows])
        _assert_same(found[1], moved[1][:, rows])
        found = fused.node_contrast_double_backward(
            place(upstream[rows]), *own, *statistics, place(moved[1][:, rows]), *settings, [True] * 3,
            **teacher_columns, student_columns=students, student_column_tangents=tangents[:split], offset=rows.start,
            column_upstream=upstream, column_log_sums=log_sums, column_log_sum_tangents=moved[1],
        )  # fmt: skip
        for x, y in zip(found, gradients, strict=True):
            _assert_same(x, y[rows])


def check_row_sets_of_relation_kl(
    batch: int, row_sets: Sequence[slice], moving: list[bool], temperature: float, place: Callable = torch.clone
) -> None:
    fused = torch.ops.gkd_fast
    stages = [place(_unit(batch, width)) for width in (4, 6, 5)]
    tangents = [place(torch.randn_like(x)) for x, m in zip(stages, moving) if m]
    students, teachers = stages[:2], stages[2:]
    upstream = place(torch.randn(batch, 2, 1, dtype=D64))
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
    for rows in row_sets:
        own = [*_taken([students, teachers, tangents], rows, place), moving]
        mine = [place(x[rows] if x.dim() == 3 else x[:, rows]) for x in (*statistics, *moved)]
        found = fused.relation_kl_tangent(*own, *mine[:3], *settings, **columns, offset=rows.start)
        for x, y in zip(found, mine[3:], strict=True):
            _assert_same(x, y)
        found = fused.relation_kl_double_backward(
            place(upstream[rows]), *own, *mine, *settings, [True] * 3, **columns, offset=rows.start,
            column_upstream=upstream, **column_statistics,
        )  # fmt: skip
        for x, y in zip(found, gradients, strict=True):
            _assert_same(x, y[rows])
