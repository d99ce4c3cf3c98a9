"""info_nce on the CPU kernels against the reference: both directions, temperatures with gradient, second order."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from gkd_fast import functional, reference
from tests.ops_cases import D64, DTYPES, KINDS, TILES, Calls, check, requires_cpp, results, rows, same_bits, threads
from tests.precision_cases import BOUND, COSINES, near_rows

pytestmark = requires_cpp


def fused(temperature=0.1, **options):
    return partial(functional.info_nce, **{"temperature": temperature, "reduction": "none", "backend": "cpp"} | options)


def agree(draws, dtype, temperature: float = 0.1, symmetric: bool = True) -> None:
    definition = partial(reference.info_nce, temperature=temperature, symmetric=symmetric)
    check(fused(temperature, symmetric=symmetric), definition, draws, dtype, 1 / temperature)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tile", "batch"), TILES)
def test_batches(tile_rows, tile, batch, dtype):
    tile_rows(tile)
    agree((rows(batch, 5, 5, seed=seed) for seed in range(3)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_kinds_of_rows_and_temperatures(tile_rows, kind, temperature, dtype):
    """A temperature of 0.01 takes each row's and each column's own shift."""
    tile_rows(32)
    agree((rows(67, 33, 33, kind=kind, seed=seed) for seed in range(3)), dtype, temperature)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("cosine", COSINES)
def test_rows_that_are_nearly_alike_keep_the_bound_of_bfloat16(cosine, symmetric):
    inputs = [x.bfloat16() for x in near_rows(97, cosine, 65, 65)]
    definition = partial(reference.info_nce, temperature=0.1, symmetric=symmetric)
    truth = results(definition, [x.double() for x in inputs], torch.bfloat16)
    for x, y in zip(results(fused(symmetric=symmetric), inputs, torch.bfloat16), truth, strict=True):
        assert (x.double() - y).abs().max() <= BOUND * y.abs().max()


@pytest.mark.parametrize("dtype", [D64, torch.float32])
def test_one_direction(tile_rows, dtype):
    tile_rows(32)
    agree([rows(67, 5, 5)], dtype, symmetric=False)
    x, y = rows(67, 5, 5)
    one = functional.node_contrast(x, y, temperature=0.1)[:, 0, 0]
    torch.testing.assert_close(fused(symmetric=False)(x, y), one, rtol=0, atol=0)


@pytest.mark.parametrize("temperature", [0.3, 0.02])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_temperature_has_a_gradient(tile_rows, temperature, symmetric):
    tile_rows(32)
    inputs = rows(67, 5, 5)
    found = []
    for backend in ("cpp", "reference"):
        logit_scale = nn.Parameter(-torch.tensor(temperature, dtype=D64).log())
        leaves = [x.clone().requires_grad_() for x in inputs]
        loss = functional.info_nce(*leaves, (-logit_scale).exp(), symmetric=symmetric, backend=backend)
        gradients = torch.autograd.grad(loss, [*leaves, logit_scale], create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in gradients), [*leaves, logit_scale])
        found.append([loss, *gradients, *second])
    for x, y in zip(*found, strict=True):
        assert (x - y).abs().max() <= 1e-10 * max(1, y.abs().max())


def test_first_and_second_derivatives_against_finite_differences(tile_rows):
    tile_rows(32)
    for batch in (1, 2, 35):
        inputs = [x.requires_grad_() for x in rows(batch, 3, 3)]
        assert gradcheck(fused(0.4), inputs, fast_mode=batch > 2)
        assert gradgradcheck(fused(0.4), inputs, fast_mode=batch > 2)


@pytest.mark.parametrize("moving", [[0], [1], [0, 1]])
def test_second_order_of_each_side(tile_rows, moving):
    tile_rows(32)
    found = []
    for backend in ("cpp", "reference"):
        torch.manual_seed(1)
        inputs = [x.requires_grad_() for x in rows(67, 5, 5)]
        loss = fused(backend=backend)(*inputs)
        gradients = torch.autograd.grad(loss, [inputs[k] for k in moving], torch.rand_like(loss), create_graph=True)
        found.append(torch.autograd.grad(gradients, inputs, [torch.randn_like(x) for x in gradients]))
    for x, y in zip(*found, strict=True):
        assert (x - y).abs().max() <= 1e-10 * y.abs().max()


def test_only_what_is_asked_for_and_the_same_bits_for_any_number_of_threads(tile_rows):
    tile_rows(32)
    inputs, runs = [x.float() for x in rows(161, 9, 9)], []
    for count in (1, 2, 3):
        with threads(count):
            runs.append(results(fused(), inputs))
    assert all(same_bits(runs[0], run) for run in runs[1:])
    student = inputs[0].clone().requires_grad_()
    output = fused()(student, inputs[1])
    with Calls() as calls:
        output.sum().backward()
    assert [call["needs"] for call in calls.arguments("info_nce_backward")] == [[True, False]]


def test_every_instruction_set(tile_rows, instruction_sets):
    tile_rows(32)
    names, choose = instruction_sets
    for name in names:
        choose(name)
        for temperature in (0.1, 0.01):
            agree([rows(67, 9, 9)], torch.float32, temperature)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_bank_of_further_teachers(backend, symmetric):
    """The students tell their own teacher from the bank's too, the teachers theirs from the batch's students alone."""
    students, teachers, bank = rows(23, 5, 5, 5)
    s, t, b = (torch.nn.functional.normalize(x) for x in (students, teachers, bank[:9]))
    expected = -torch.log_softmax(s @ torch.cat([t, b]).T / 0.2, dim=1).diagonal()
    if symmetric:
        expected = (expected - torch.log_softmax(t @ s.T / 0.2, dim=1).diagonal()) / 2
    found = fused(0.2, symmetric=symmetric, backend=backend, bank=bank[:9])(students, teachers)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_the_loss_is_the_mean_and_compiles():
    inputs = rows(37, 5, 5)
    loss = fused(reduction="mean")
    expected = results(loss, inputs)
    torch.testing.assert_close(expected[0], fused()(*inputs).mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(results(torch.compile(loss, fullgraph=True), inputs), expected, rtol=1e-12, atol=1e-14)


def test_errors_name_the_argument():
    x, y = rows(5, 3, 4)
    with pytest.raises(ValueError, match="teachers must have the students' width 3, got 4"):
        functional.info_nce(x, y)
    with pytest.raises(ValueError, match="temperature must be positive and finite, got -1"):
        functional.info_nce(x, x, torch.tensor(-1.0))
    with pytest.raises(ValueError, match="temperature must be a number or a 0-dim floating point tensor"):
        functional.info_nce(x, x, torch.ones(2))
