"""A replay of an unrolled step must see what the step saw; where it does not, there is no gradient but an error."""

import pytest
import torch
from torch import nn

from gkd_fast import UnrolledSGD

MODES = ["exact", "differences"]


def _problem():
    model, scale = nn.Linear(3, 1), nn.Parameter(torch.ones(()))
    batches = [torch.randn(8, 3) for _ in range(3)]
    return model, scale, batches


def _loss(model, scale, x):
    return scale * (model(x) - 1).square().mean()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("steps", [1, 3])
def test_a_lambda_that_sees_the_last_batch_of_its_loop_is_an_error(mode, steps):
    model, scale, batches = _problem()
    before = model.weight.detach().clone()
    with UnrolledSGD(model.parameters(), [model], lr=0.1, second_derivatives=mode) as unrolled:
        for x in batches[:steps]:
            unrolled.step(lambda: _loss(model, scale, x))  # noqa: B023
        x = batches[-1] + 1
        with pytest.raises(RuntimeError, match=r"objective of step \d gave .* when it was replayed: .*lambda x=x:"):
            unrolled.hypergradient(lambda: _loss(model, 1, batches[0]), [scale])
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("mode", MODES)
def test_a_lambda_that_holds_its_batch_gives_the_gradient_of_the_unrolled_loop(mode):
    model, scale, batches = _problem()
    model, scale, batches = model.double(), nn.Parameter(scale.double()), [x.double() for x in batches]
    weight, bias = model.weight, model.bias
    for x in batches:
        loss = scale * (x @ weight.T + bias - 1).square().mean()
        g = torch.autograd.grad(loss, (weight, bias), create_graph=True)
        weight, bias = weight - 0.1 * g[0], bias - 0.1 * g[1]
    (expected,) = torch.autograd.grad((batches[0] @ weight.T + bias - 1).square().mean(), scale)
    with UnrolledSGD(model.parameters(), [model], lr=0.1, momentum=0, second_derivatives=mode) as unrolled:
        for x in batches:
            unrolled.step(lambda x=x: _loss(model, scale, x))
        (found,) = unrolled.hypergradient(lambda: _loss(model, 1, batches[0]), [scale])
    torch.testing.assert_close(found, expected)


def test_replays_that_are_not_numbers_are_no_other_value():
    model, scale, batches = _problem()
    with UnrolledSGD(model.parameters(), [model], lr=0.1) as unrolled:
        unrolled.step(lambda: _loss(model, scale, batches[0] * float("nan")))
        assert unrolled.hypergradient(lambda: _loss(model, 1, batches[0]), [scale])[0].isnan()


def test_replays_draw_the_random_numbers_of_their_step():
    model, scale, batches = _problem()
    with UnrolledSGD(model.parameters(), [model], lr=0.1) as unrolled:
        for x in batches:
            unrolled.step(lambda x=x: _loss(model, scale, nn.functional.dropout(x)))
        assert unrolled.hypergradient(lambda: _loss(model, 1, batches[0]), [scale])[0].isfinite()
