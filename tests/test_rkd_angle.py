"""rkd_angle on the CPU kernels against the reference."""

from functools import partial

import pytest
import torch
from torch.autograd import gradcheck

from gkd_fast import functional, reference
from tests.ops_cases import D64, DTYPES, Calls, check, requires_cpp, results, rows, same_bits, threads

pytestmark = requires_cpp

fused = partial(functional.rkd_angle, reduction="none", backend="cpp")


@pytest.mark.parametrize(("tile", "batch"), [(32, 1), (32, 2), (32, 31), (32, 33), (32, 67), (64, 65), (96, 97)])
def test_batches(tile_rows, tile, batch):
    tile_rows(tile)
    check(fused, reference.rkd_angle, [rows(batch, 5, 7)], D64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["random", "converged", "clustered", "zero rows"])
def test_types_and_kinds_of_rows(tile_rows, kind, dtype):
    tile_rows(32)
    check(fused, reference.rkd_angle, (rows(67, 17, 17, kind=kind, seed=seed) for seed in range(3)), dtype, 10)


def test_the_loss_is_the_mean_of_the_losses_per_sample():
    x, y = rows(23, 5, 4)
    torch.testing.assert_close(functional.rkd_angle(x, y), fused(x, y).mean(), rtol=1e-12, atol=0)


def test_derivatives_against_finite_differences(tile_rows):
    tile_rows(32)
    for batch in (2, 5, 35):
        assert gradcheck(fused, [x.requires_grad_() for x in rows(batch, 4, 3)], fast_mode=batch > 5)


def test_only_what_is_asked_for_and_the_same_bits_for_any_number_of_threads(tile_rows):
    tile_rows(32)
    inputs, runs = [x.float() for x in rows(97, 9, 6)], []
    for count in (1, 2, 3):
        with threads(count):
            runs.append(results(fused, inputs))
    assert all(same_bits(runs[0], run) for run in runs[1:])
    student = inputs[0].clone().requires_grad_()
    output = fused(student, inputs[1])
    with Calls() as calls:
        output.sum().backward()
    assert [call["needs"] for call in calls.arguments("rkd_angle_backward")] == [[True, False]]


def test_every_instruction_set(tile_rows, instruction_sets):
    tile_rows(32)
    names, choose = instruction_sets
    for name in names:
        choose(name)
        check(fused, reference.rkd_angle, [rows(67, 9, 5)], D64)
        check(fused, reference.rkd_angle, [rows(67, 9, 5)], torch.float32, 10)


def test_a_second_derivative_is_an_error():
    x, y = (x.requires_grad_() for x in rows(5, 3, 4))
    (gradient,) = torch.autograd.grad(fused(x, y).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="rkd_angle has first derivatives alone"):
        torch.autograd.grad(gradient.sum(), x)


def test_compiles():
    inputs = rows(37, 5, 4)
    expected = results(fused, inputs)
    torch.testing.assert_close(results(torch.compile(fused, fullgraph=True), inputs), expected, rtol=1e-12, atol=1e-14)
