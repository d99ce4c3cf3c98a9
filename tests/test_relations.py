"""The losses over a batch's relations: the published values, and the fused kernels against the reference."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from gkd_fast import functional, ops, reference
from gkd_fast.relations import gram_blocks
from tests.ops_cases import D64, DTYPES, FUSED, Calls, check, requires_cpp, results, rows, same_bits, threads

LOSSES = {
    "pkt": functional.pkt,
    "rkd_distance": functional.rkd_distance,
    "rkd_angle": functional.rkd_angle,
    "similarity_preserving": functional.similarity_preserving,
    "correlation_bilinear": functional.correlation_congruence,
    "correlation_gaussian": partial(functional.correlation_congruence, kernel="gaussian"),
}
# Losses per sample; of these the results' sizes are those of the definitions' terms.
PER_SAMPLE = {
    "pkt": functional.pkt,
    "rkd_distance": functional.rkd_distance,
    "similarity_preserving": functional.similarity_preserving,
    "similarity_preserving, norm 2": partial(functional.similarity_preserving, norm=2),
    "correlation_bilinear": partial(functional.correlation_congruence, squared=True),
    "correlation_gaussian": partial(functional.correlation_congruence, kernel="gaussian", squared=True),
    "correlation_gaussian of order 5": partial(
        functional.correlation_congruence, kernel="gaussian", gamma=0.7, order=5, squared=True
    ),
}
DEFINITIONS = {
    "pkt": reference.pkt,
    "rkd_distance": reference.rkd_distance,
    "similarity_preserving": reference.similarity_preserving,
    "similarity_preserving, norm 2": partial(reference.similarity_preserving, norm=2),
    "correlation_bilinear": reference.correlation_congruence,
    "correlation_gaussian": partial(reference.correlation_congruence, kernel="gaussian"),
    "correlation_gaussian of order 5": partial(reference.correlation_congruence, kernel="gaussian", gamma=0.7, order=5),
}
every_loss = pytest.mark.parametrize("name", LOSSES)
every_loss_per_sample = pytest.mark.parametrize("name", PER_SAMPLE)
BACKENDS = ["reference", pytest.param("cpp", marks=requires_cpp)]


def published(case: str, name: str, backend: str) -> None:
    """A loss's published value and gradient of the students, in float64."""
    with np.load(Path(__file__).parent / "data" / f"{case}.npz") as arrays:
        case = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    students = case["students"].requires_grad_()
    loss = LOSSES[name](students, case["teachers"], backend=backend)
    (gradient,) = torch.autograd.grad(loss, students)
    assert loss.shape == ()
    torch.testing.assert_close(loss.detach(), case[name], rtol=0, atol=1e-10)
    torch.testing.assert_close(gradient, case[f"{name}_grad"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", ["relational_a", "relational_b"])
@pytest.mark.parametrize("backend", BACKENDS)
@every_loss
def test_the_published_values(case, name, backend):
    published(case, name, backend)


def agree(name: str, draws, dtype) -> None:
    """Losses of size 1 are differences of terms of this size, so that they err by roundings of these."""
    check(partial(PER_SAMPLE[name], reduction="none", backend="cpp"), DEFINITIONS[name], draws, dtype, gain=10)


@requires_cpp
@pytest.mark.parametrize(("tile", "batch"), [(32, 2), (32, 31), (32, 33), (32, 67), (64, 65), (96, 193), (0, 257)])
@every_loss_per_sample
def test_batches(tile_rows, tile, batch, name):
    tile_rows(tile)
    agree(name, [rows(batch, 5, 7)], D64)


@requires_cpp
@every_loss_per_sample
def test_a_single_sample(name):
    for x in results(partial(PER_SAMPLE[name], reduction="none", backend="cpp"), rows(1, 5, 3)):
        assert x.isfinite().all()
    agree(name, [rows(1, 5, 3)], D64)


@requires_cpp
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["random", "clustered", "zero rows"])
@every_loss_per_sample
def test_types_and_kinds_of_rows(tile_rows, name, kind, dtype):
    tile_rows(32)
    agree(name, (rows(101, 33, 17, kind=kind, seed=seed) for seed in range(3)), dtype)


@requires_cpp
@pytest.mark.parametrize("name", ["pkt", "rkd_distance", "correlation_gaussian"])
def test_a_student_like_its_teacher(tile_rows, name):
    tile_rows(32)
    for kind in ("converged", "nearly converged"):
        for dtype in (D64, torch.float32):
            agree(name, (rows(101, 9, 9, kind=kind, seed=seed) for seed in range(3)), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@every_loss_per_sample
def test_the_loss_is_the_mean_of_the_losses_per_sample(name, backend):
    inputs = rows(23, 5, 4)
    loss = partial(PER_SAMPLE[name], backend=backend)
    each = results(partial(loss, reduction="none"), inputs)
    assert each[0].shape == (23,)
    torch.testing.assert_close(loss(*inputs), each[0].mean(), rtol=1e-12, atol=1e-14)


@requires_cpp
@every_loss_per_sample
def test_first_and_second_derivatives_against_finite_differences(tile_rows, name):
    tile_rows(32)
    loss = partial(PER_SAMPLE[name], reduction="none", backend="cpp")
    for batch in (2, 7, 35):
        inputs = [x.requires_grad_() for x in rows(batch, 4, 3)]
        assert gradcheck(loss, inputs, fast_mode=batch > 7)
        assert gradgradcheck(loss, inputs, fast_mode=batch > 2)


def second_order(loss, inputs) -> list[torch.Tensor]:
    inputs = [x.clone().requires_grad_() for x in inputs]
    upstream = torch.rand(len(inputs[0]), dtype=inputs[0].dtype, requires_grad=True)
    gradients = torch.autograd.grad(loss(*inputs), inputs, upstream, create_graph=True)
    along = [torch.randn_like(x) for x in gradients]
    return list(torch.autograd.grad(gradients, [*inputs, upstream], along))


@requires_cpp
@every_loss_per_sample
def test_second_derivatives_agree_with_the_reference(tile_rows, name):
    tile_rows(32)
    inputs, found = rows(97, 12, 7), []
    for backend in ("cpp", "reference"):
        torch.manual_seed(0)
        found.append(second_order(partial(PER_SAMPLE[name], reduction="none", backend=backend), inputs))
    for x, y in zip(*found, strict=True):
        assert (x - y).abs().max() <= 1e-10 * y.abs().max()


@requires_cpp
@every_loss_per_sample
def test_only_what_is_asked_for_and_the_same_bits(tile_rows, name):
    tile_rows(32)
    loss = partial(PER_SAMPLE[name], reduction="none", backend="cpp")
    inputs = [x.float() for x in rows(161, 9, 6)]
    runs = []
    for count in (1, 2, 3):
        with threads(count):
            runs.append(results(loss, inputs))
    assert all(same_bits(runs[0], run) for run in runs[1:])
    students = inputs[0].clone().requires_grad_()
    output = loss(students, inputs[1])
    with Calls() as calls:
        (alone,) = torch.autograd.grad(output.sum(), students)
    assert all(call["needs"] != [True, True] for call in calls.arguments("pair_sums_backward"))
    torch.testing.assert_close(alone, torch.autograd.grad(loss(students, inputs[1]).sum(), students)[0], rtol=0, atol=0)


@requires_cpp
@every_loss_per_sample
def test_every_instruction_set(tile_rows, instruction_sets, name):
    tile_rows(32)
    names, choose = instruction_sets
    for set_name in names:
        choose(set_name)
        agree(name, [rows(67, 9, 5)], D64)
        agree(name, [rows(67, 9, 5)], torch.float32)


def pair_problem(kind: str, batch: int):
    """Sides, terms and constants of a kind, in float64."""
    generator = torch.Generator().manual_seed(batch)
    sides = [0.5 * torch.randn(batch, width, dtype=D64, generator=generator) for width in (4, 3)]
    terms = torch.rand(2, batch, dtype=D64, generator=generator) / batch
    if kind in ("distances", "rkd_distance"):
        terms = torch.stack([x.square().sum(dim=1) for x in sides])
    count = {"absolute_sums": 1, "distances": 1}.get(kind, 2)
    terms = terms[: {"absolute_sums": 0, "distances": 1, "polynomial": 0}.get(kind, 2)]
    constants = {"rkd_distance": [0.9, 0.8, 0.1, 0.2], "polynomial": [0.2, 0.5, 0.3], "pkt": [1e-7]}.get(kind, [])
    return sides[:count], terms.contiguous(), torch.tensor(constants, dtype=D64)


KINDS = ["absolute_sums", "distances", "rkd_distance", "polynomial", "pkt"]


@requires_cpp
@pytest.mark.parametrize("kind", KINDS)
def test_row_sets_give_the_whole_batch(tile_rows, kind):
    tile_rows(32)
    whole_batch_and_row_sets(kind, 101, (slice(0, 3), slice(3, 64), slice(64, 101)))


def whole_batch_and_row_sets(kind: str, batch: int, parts: tuple[slice, ...]) -> None:
    """Results of some rows against all columns are those of the whole batch there, all four ops'."""
    fused = torch.ops.gkd_fast
    sides, terms, constants = pair_problem(kind, batch)
    upstream, needs = torch.rand(batch, dtype=D64), [True] * len(sides)
    tangents, term_tangents = [torch.randn_like(x) for x in sides], torch.randn_like(terms)
    along = tangents, needs, term_tangents, torch.randn_like(constants)
    whole = [
        fused.pair_sums(kind, sides, terms, constants, "float64"),
        fused.pair_sums_tangent(kind, sides, terms, constants, *along, "float64"),
        fused.pair_sums_backward(kind, upstream, sides, terms, constants, "float64", needs),
        fused.pair_sums_double_backward(kind, upstream, sides, terms, constants, *along, "float64", needs),
    ]
    for part in parts:
        own, own_terms, columns = [x[part] for x in sides], terms[:, part].contiguous(), (sides, terms)
        own_along = [x[part] for x in tangents], needs, term_tangents[:, part].contiguous(), along[3]
        g, column_tangents = upstream[part], (tangents, term_tangents)
        found = [
            fused.pair_sums(kind, own, own_terms, constants, "float64", *columns, part.start),
            fused.pair_sums_tangent(
                kind, own, own_terms, constants, *own_along, "float64", *columns, *column_tangents, part.start
            ),
            fused.pair_sums_backward(
                kind, g, own, own_terms, constants, "float64", needs, *columns, upstream, part.start
            ),
            fused.pair_sums_double_backward(
                kind, g, own, own_terms, constants, *own_along, "float64", needs, *columns, *column_tangents, upstream,
                part.start,
            ),
        ]  # fmt: skip
        for x, y in zip(found[:2], whole[:2]):
            torch.testing.assert_close(x, y[:, part], rtol=1e-11, atol=1e-12)
        for x, y in zip(found[2:], whole[2:]):
            torch.testing.assert_close(x[0], [z[part] for z in y[0]], rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(x[1], y[1][:, part], rtol=1e-11, atol=1e-12)


OF_BANKS = {name: loss for name, loss in LOSSES.items() if name != "rkd_angle"} | PER_SAMPLE


def with_first_and_second_order(loss, inputs) -> list[torch.Tensor]:
    """The loss, gradients, and those of the sum of their squares."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = loss(*leaves)
    gradients = torch.autograd.grad(3 * value, leaves, create_graph=True)
    return [value, *gradients, *torch.autograd.grad(sum(x.square().sum() for x in gradients), leaves)]


def of_columns(name: str, inputs, bank) -> torch.Tensor:
    """The definition: the samples' rows of relations between all samples, those of the bank among them."""
    whole, count = [torch.cat(x) for x in zip(inputs, bank)], len(inputs[0])
    if "rkd" not in name:
        return DEFINITIONS[name](*whole)[:count]
    relations = [torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist") for x, y in zip(inputs, whole)]
    relations = [d / (d.sum() / (count * (len(whole[0]) - 1))) for d in relations]
    return torch.nn.functional.smooth_l1_loss(*relations, reduction="none").mean(dim=1)


@pytest.mark.parametrize("backend", BACKENDS)
@every_loss_per_sample
def test_a_bank_is_further_columns(name, backend):
    *inputs, bank_s, bank_t = rows(23, 5, 4, 5, 4)
    bank = bank_s[:9] + 0.3, bank_t[:9]
    loss = partial(PER_SAMPLE[name], reduction="none", bank=bank, backend=backend)
    torch.testing.assert_close(loss(*inputs), of_columns(name, inputs, bank), rtol=1e-10, atol=1e-13)
    found, expected = (results(f, inputs) for f in (loss, lambda *x: of_columns(name, x, bank)))
    # The distance of a row to itself, which cdist has, has no gradient either.
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@requires_cpp
@pytest.mark.parametrize("batch", [1, 2, 33, 67])
@pytest.mark.parametrize("name", OF_BANKS)
def test_derivatives_with_a_bank(tile_rows, name, batch):
    tile_rows(32)
    inputs, bank = rows(batch, 5, 4), [x + 0.3 for x in rows(45, 5, 4)]
    found, expected = (
        with_first_and_second_order(partial(OF_BANKS[name], bank=bank, backend=b), inputs) for b in ("cpp", "reference")
    )
    for x, y in zip(found, expected, strict=True):
        assert (x - y).abs().max() <= 1e-10 * max(y.abs().max(), 1e-3)


@requires_cpp
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("name", ["pkt", "rkd_distance", "correlation_gaussian"])
def test_types_with_a_bank(tile_rows, name, dtype):
    tile_rows(32)
    inputs, bank = ([x.to(dtype) for x in rows(count, 9, 7)] for count in (67, 45))
    loss = partial(PER_SAMPLE[name], reduction="none")
    found = results(partial(loss, bank=bank, backend="cpp"), inputs, dtype)
    of_wide = partial(loss, bank=[x.double() for x in bank], backend="reference")
    bound = 1e-4 if dtype == torch.float32 else 3e-2
    for x, y in zip(found, results(of_wide, [x.double() for x in inputs], dtype), strict=True):
        assert (x - y).abs().max() <= bound * y.abs().max()


@pytest.mark.parametrize("name", [name for name in OF_BANKS if name in LOSSES])
def test_an_empty_bank_is_none(name):
    inputs = rows(11, 5, 4)
    found = OF_BANKS[name](*inputs, bank=(inputs[0][:0], inputs[1][:0]))
    torch.testing.assert_close(found, OF_BANKS[name](*inputs), rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OF_BANKS)
def test_the_sides_of_a_bank_may_be_lists(name, backend):
    inputs, bank = rows(11, 5, 4), rows(9, 5, 4)
    found, expected = (OF_BANKS[name](*inputs, bank=x, backend=backend) for x in (([bank[0]], [bank[1]]), bank))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@requires_cpp
@every_loss
def test_compiled_losses_give_the_same_numbers(name):
    loss = partial(LOSSES[name], backend="cpp")
    inputs = rows(37, 5, 4)
    expected = results(loss, inputs)
    torch.testing.assert_close(results(torch.compile(loss, fullgraph=True), inputs), expected, rtol=1e-12, atol=1e-14)


@requires_cpp
def test_what_is_not_offered_is_an_error():
    x, y = (x.requires_grad_() for x in rows(5, 3, 4))
    first = torch.autograd.grad(functional.pkt(x, y), x, create_graph=True)[0]
    second = torch.autograd.grad(first.square().sum(), x, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="third-order gradients are not offered"):
        torch.autograd.grad(second.sum(), x)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(functional.pkt, (x.detach(), y.detach()), (x.detach(), y.detach()))
    with pytest.raises(NotImplementedError, match="pair_sums has no derivative"):
        sides, terms, constants = pair_problem("pkt", 5)
        torch.ops.gkd_fast.pair_sums(
            "pkt", [x.requires_grad_() for x in sides], terms, constants, "float64"
        ).sum().backward()


def test_kd_divergence():
    x, y = rows(11, 7, 7)
    expected = torch.nn.functional.kl_div(
        torch.log_softmax(x / 3, dim=1), torch.softmax(y / 3, dim=1), reduction="batchmean"
    )  # fmt: skip
    torch.testing.assert_close(functional.kd_divergence(x, y, temperature=3.0), 9 * expected)
    each = functional.kd_divergence(x, y, temperature=3.0, reduction="none")
    torch.testing.assert_close(each.mean(), 9 * expected)
    standard = functional.kd_divergence(5 * x + 2, y, temperature=2.0, standardize=True)
    torch.testing.assert_close(
        standard, functional.kd_divergence(x, y, temperature=2.0, standardize=True), rtol=1e-5, atol=0
    )
    assert gradcheck(partial(functional.kd_divergence, standardize=True), [x.requires_grad_(), y.requires_grad_()])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: functional.pkt(x, y[:3]), r"teachers must have the batch size of students \(5\), got 3"),
        (lambda x, y: functional.pkt(x, y, reduction="sum"), "reduction must be one of"),
        (lambda x, y: functional.pkt(x, y, eps=0.0), "eps must be positive"),
        (lambda x, y: functional.rkd_distance(x[0], y), "students must have 2 dimensions"),
        (lambda x, y: functional.similarity_preserving(x, y, norm=3), "norm must be 1 or 2, got 3"),
        (lambda x, y: functional.correlation_congruence(x, y, kernel="rbf"), "kernel must be one of"),
        (lambda x, y: functional.correlation_congruence(x, y, order=0), "order must be a whole number from 1 to 16"),
        (lambda x, y: functional.correlation_congruence(x, y, reduction="none"), "needs squared=True"),
        (
            lambda x, y: functional.pkt(x, y, bank=(x, y[:3])),
            r"bank\[1\] must have shape \[5, 4\] on cpu, got \(3, 4\)",
        ),
        (lambda x, y: functional.pkt(x[None], y[None], bank=(x, y), within="tokens"), "bank must be None within="),
        (lambda x, y: functional.rkd_angle(x, y, bank=(x, y)), "bank must be None: rkd_angle is of this process"),
        (lambda x, y: functional.rkd_angle(x, y, process_group="g"), "process_group must be None: rkd_angle"),
        (lambda x, y: functional.kd_divergence(x, y), "teachers must have the shape of students"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call(*rows(5, 3, 4))


@requires_cpp
def test_without_kernels_auto_takes_the_reference(monkeypatch, recwarn):
    monkeypatch.setattr(ops, "has_kernels", lambda op, device: False)
    x, y = rows(5, 3, 4)
    assert torch.equal(functional.pkt(x, y), reference.pkt(x, y).mean())
    with pytest.raises(RuntimeError, match="backend='cpp' is not available: there are no cpp kernels of pair_sums"):
        functional.pkt(x, y, backend="cpp")


@pytest.mark.parametrize("norm2", [True, False])
def test_gram_matrices_are_summed_in_blocks_of_rows(monkeypatch, norm2):
    """With whole blocks and a part of one, rows of zeros, and gradients of one side or both."""
    monkeypatch.setattr(gram_blocks, "BLOCK", 16)
    name = "similarity_preserving, norm 2" if norm2 else "correlation_bilinear"
    for batch in (7, 32, 45):
        inputs = rows(batch, 5, 4, kind="zero rows")
        for wanted in ([0], [1], [0, 1]):
            found = []
            for backend in (FUSED, "reference"):
                leaves = [x.clone().requires_grad_(k in wanted) for k, x in enumerate(inputs)]
                loss = PER_SAMPLE[name](*leaves, backend=backend)
                found.append(
                    [loss.detach(), *torch.autograd.grad(loss, [leaves[k] for k in wanted], 3 * loss.detach())]
                )
            for x, y in zip(*found, strict=True):
                assert (x - y).abs().max() <= 1e-12 * max(1, y.abs().max())


def test_similarity_preserving_with_squares_has_forward_mode():
    x, y = rows(9, 5, 4)
    loss, definition = (partial(PER_SAMPLE["similarity_preserving, norm 2"], backend=b) for b in (FUSED, "reference"))
    found, expected = (torch.func.jvp(f, (x, y), (x.flip(0), y)) for f in (loss, definition))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x.flip(0))
        tangents = [torch.autograd.forward_ad.unpack_dual(f(dual, y)).tangent for f in (loss, definition)]
    torch.testing.assert_close(*tangents, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["similarity_preserving, norm 2", "correlation_bilinear"])
def test_gram_losses_keep_their_types_under_autocast(name):
    leaves = [x.float().requires_grad_() for x in rows(9, 5, 4)]
    loss = partial(PER_SAMPLE[name], backend=FUSED)
    plain = torch.autograd.grad(loss(*leaves), leaves)
    with torch.autocast("cpu"):
        within = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(within, plain, rtol=1e-5, atol=1e-7)


@requires_cpp
@pytest.mark.parametrize("norm", [1, 2])
def test_second_derivatives_of_similarity_preserving_where_products_are_zero(norm):
    """|x| has slope 0 at 0, along any direction."""
    inputs, found = rows(21, 5, 4, kind="zero rows"), []
    for backend in ("cpp", "reference"):
        torch.manual_seed(0)
        loss = partial(functional.similarity_preserving, norm=norm, reduction="none", backend=backend)
        found.append(second_order(loss, inputs))
    for x, y in zip(*found, strict=True):
        assert (x - y).abs().max() <= 1e-10 * y.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_rows_have_second_derivatives(backend):
    for x in second_order(partial(functional.pkt, reduction="none", backend=backend), rows(5, 3, 4, kind="zero rows")):
        assert x.isfinite().all()


def test_logits_of_one_class_or_all_alike_are_standardized_to_zero():
    for x in (torch.randn(4, 1, dtype=D64), torch.full((4, 3), 2.0, dtype=D64)):
        logits = x.clone().requires_grad_()
        loss = functional.kd_divergence(logits, x, standardize=True)
        (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
        assert loss == 0 and gradient.isfinite().all()
        assert torch.autograd.grad(gradient.square().sum(), logits)[0].isfinite().all()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("reduction", {"reduction": np.ones(3)}),
        ("within", {"within": torch.ones(3)}),
        ("squared", {"squared": torch.ones(3)}),
        ("kernel", {"kernel": ["bilinear"]}),
        ("mask", {"within": "tokens", "mask": torch.ones(5, 3).to_sparse()}),
    ],
)
def test_values_of_a_wrong_kind_are_named(name, options):
    x = torch.ones(5, 3, 2) if "mask" in options else torch.ones(5, 3)
    with pytest.raises((TypeError, ValueError), match=name):
        functional.correlation_congruence(x, x, **options)
