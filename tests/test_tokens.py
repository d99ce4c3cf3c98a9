"""The losses within the tokens of each sample: one graph per sample, of the tokens that count."""

from functools import partial

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from gkd_fast import functional, losses

from .ops_cases import D64, requires_cpp, same_bits, threads
from .test_relations import BACKENDS, PER_SAMPLE

LOSSES = PER_SAMPLE | {
    "rkd_angle": functional.rkd_angle,
    "info_nce": partial(functional.info_nce, temperature=0.3),
    "info_nce, one-sided": partial(functional.info_nce, temperature=0.3, symmetric=False),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def tokens(samples: int, count: int, name: str = "", dtype=D64, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    widths = (6, 6) if name.startswith("info_nce") else (6, 4)
    return [0.5 + torch.randn(samples, count, width, dtype=D64, generator=generator).to(dtype) for width in widths]


def padding(samples: int, count: int) -> torch.Tensor:
    """Which tokens count: all of one sample, a single one of the next, none, and others at any place."""
    mask = torch.rand(samples, count, generator=torch.Generator().manual_seed(count)) < 0.6
    mask[0], mask[1], mask[2] = True, False, False
    mask[1, count // 2] = True
    return mask


def derived(loss, inputs) -> list[torch.Tensor]:
    """Losses per sample, and gradients of a sum of them with unequal factors."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    each = loss(*inputs, reduction="none")
    upstream = torch.linspace(-1, 2, len(each), dtype=each.dtype)
    return [each.detach(), *torch.autograd.grad(each, inputs, upstream)]


@pytest.mark.parametrize("backend", BACKENDS)
@every_loss
def test_a_sample_has_the_loss_of_its_own_tokens(name, backend):
    """Against the loss over a batch that the tokens make, in float64."""
    inputs, mask = tokens(5, 9, name), padding(5, 9)
    inputs = [x.requires_grad_() for x in inputs]
    found = LOSSES[name](*inputs, reduction="none", within="tokens", mask=mask, backend=backend)
    graphs = [[x[g][mask[g]] for x in inputs] for g in range(5)]
    expected = [LOSSES[name](*x, backend="reference") if len(x[0]) else x[0].sum() for x in graphs]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-9, atol=1e-12)
    whole = LOSSES[name](*inputs, within="tokens", mask=mask, backend=backend)
    torch.testing.assert_close(whole, found.mean(), rtol=1e-12, atol=1e-14)
    gradients = torch.autograd.grad(whole, inputs)
    for x, y in zip(gradients, torch.autograd.grad(torch.stack(expected).mean(), inputs), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-11)
        assert not x[~mask].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_of_correlations_are_those_of_the_graphs(backend):
    inputs, mask = tokens(5, 9), padding(5, 9)
    options = {"kernel": "gaussian", "backend": backend}
    found = functional.correlation_congruence(*inputs, within="tokens", mask=mask, reduction="none", **options)
    graphs = [[x[g][mask[g]] for x in inputs] for g in (0, 3, 4)]
    expected = [functional.correlation_congruence(*x, **options) for x in graphs]
    torch.testing.assert_close(found[[0, 3, 4]], torch.stack(expected), rtol=1e-9, atol=1e-12)
    assert found[2] == 0


@requires_cpp
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("samples", "count"), [(3, 1), (1, 70), (4, 33), (3, 65)])
@every_loss
def test_shapes(tile_rows, name, samples, count, masked):
    tile_rows(32)
    mask = padding(samples, count) if masked and samples > 2 else None
    inputs = tokens(samples, count, name)
    options = {"within": "tokens", "mask": mask}
    found, expected = (derived(partial(LOSSES[name], backend=b, **options), inputs) for b in ("cpp", "reference"))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-10)


@requires_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_loss
def test_types(name, dtype):
    inputs, mask = tokens(4, 21, name, dtype), padding(4, 21)
    found = derived(partial(LOSSES[name], within="tokens", mask=mask, backend="cpp"), inputs)
    exact = derived(
        partial(LOSSES[name], within="tokens", mask=mask, backend="reference"), [x.double() for x in inputs]
    )
    assert found[1].dtype == dtype
    bound = 1e-3 if dtype == torch.float32 else 3e-2
    for x, y in zip(found, exact, strict=True):
        assert (x - y).abs().max() <= bound * y.abs().max()


@requires_cpp
@every_loss
def test_first_and_second_derivatives_against_finite_differences(name):
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0]])
    loss = partial(LOSSES[name], within="tokens", mask=mask, reduction="none", backend="cpp")
    inputs = [x.requires_grad_() for x in tokens(2, 4, name)]
    assert gradcheck(loss, inputs)
    assert name == "rkd_angle" or gradgradcheck(loss, inputs, fast_mode=True)  # which has first derivatives alone


@requires_cpp
@every_loss
def test_the_same_bits_of_any_number_of_threads(name):
    inputs, mask = tokens(5, 40, name, torch.float32), padding(5, 40)
    runs = []
    for count in (1, 2, 3):
        with threads(count):
            runs.append(derived(partial(LOSSES[name], within="tokens", mask=mask, backend="cpp"), inputs))
    if not name.startswith("info_nce"):  # whose products are PyTorch's
        assert all(same_bits(runs[0], run) for run in runs[1:])


@requires_cpp
@pytest.mark.parametrize("name", ["pkt", "rkd_distance", "rkd_angle", "info_nce"])
def test_compiled(name):
    loss = partial(LOSSES[name], within="tokens", backend="cpp")
    inputs, mask = tokens(3, 9, name), padding(3, 9)
    torch.compiler.reset()  # One function compiled for every loss of this process would be too many.
    compiled = torch.compile(loss, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs, mask=mask), loss(*inputs, mask=mask), rtol=1e-12, atol=1e-14)
    found, expected = (derived(partial(f, mask=mask), inputs) for f in (compiled, loss))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"within": "patches"}, "within must be one of"),
        ({"mask": torch.ones(3, 4)}, 'mask needs within="tokens"'),
        ({"within": "tokens", "mask": torch.ones(3, 5)}, r"mask must have shape \(3, 4\)"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        functional.pkt(*tokens(3, 4), **arguments)


def test_both_networks_have_as_many_tokens():
    x, y = tokens(3, 4)
    with pytest.raises(ValueError, match=r"teachers must have the samples and tokens of students \(3, 4\)"):
        functional.pkt(x, y[:, :2], within="tokens")
    with pytest.raises(ValueError, match="students must be .samples, tokens, width"):
        functional.pkt(x[0], y[0], within="tokens")
    with pytest.raises(ValueError, match="bank must be None within"):
        functional.info_nce(x, x, within="tokens", bank=x[0])


MODULES = {
    "sp": (losses.SimilarityPreserving, partial(functional.similarity_preserving, norm=2)),
    "cc": (losses.CorrelationCongruence, partial(functional.correlation_congruence, kernel="gaussian")),
    "pkt": (losses.PKT, functional.pkt),
    "rkd": (partial(losses.RKD, 2.0, 0.0), lambda s, t, **o: 2 * functional.rkd_distance(s, t, **o)),
    "rkd angles": (partial(losses.RKD, 0.0, 3.0), lambda s, t, **o: 3 * functional.rkd_angle(s, t, **o)),
    "info_nce": (partial(losses.InfoNCE, 6, 6), functional.info_nce),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name):
    make, function = MODULES[name]
    maps, sequence = torch.randn(4, 6, 3, 3).requires_grad_(), torch.randn(4, 9, 6)
    mask = padding(4, 9)
    loss = make(within="tokens")(maps, sequence, mask)
    torch.testing.assert_close(loss, function(maps.flatten(2).mT, sequence, within="tokens", mask=mask))
    loss.backward()
    assert maps.grad.abs().max() > 0
