"""The bandwidth at which nodes have so many neighbours: on data of many kinds, at any batch size, on all backends."""

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gkd_fast import functional
from gkd_fast.functional import effective_neighbors, graph_conv, neighbor_bandwidth
from tests.ops_cases import D64, FUSED, requires_fused, rows

WANTED = (4, 8, 16)  # of a batch of more than four times as many


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)


def pixels(batch: int) -> Tensor:
    """Of digits drawn with replacement, for a batch may be larger than all, and made different by noise."""
    images, generator = digits()[0], torch.Generator().manual_seed(batch)
    drawn = images[torch.randint(len(images), (batch,), generator=generator)]
    return drawn + torch.rand(batch, 64, generator=generator) / 16


@functools.cache
def trained() -> nn.Sequential:
    """A network that knows the digits it has seen: half a second's training, 99 % of them."""
    images, labels = digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        widths = (64, 128), (128, 64)
        network = nn.Sequential(*[part for w in widths for part in (nn.Linear(*w), nn.ReLU())], nn.Linear(64, 10))
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        for _ in range(20):
            for rows in torch.randperm(len(images)).split(128):
                optimizer.zero_grad()
                nn.functional.cross_entropy(network(images[rows]), labels[rows]).backward()
                optimizer.step()
    assert (network(images).argmax(dim=1) == labels).float().mean() > 0.95
    return network


def features(stage: int) -> Callable[[int], Tensor]:
    """Of a stage of the trained network, after its ReLU; those of the last are classes that hardly touch."""
    return lambda batch: trained()[: 2 * stage](pixels(batch)).detach()


def noise(width: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randn(batch, width, generator=torch.Generator().manual_seed(width)).relu()


def two_classes(spread: float) -> Callable[[int], Tensor]:
    """Around two directions at right angles, as far from these as ``spread`` says."""

    def data(batch: int) -> Tensor:
        centres = torch.eye(2, 32)[torch.arange(batch) % 2]
        return centres + spread * torch.randn(batch, 32, generator=torch.Generator().manual_seed(3)) / math.sqrt(32)

    return data


DATA = {"pixels": pixels, "first stage": features(1), "last stage": features(2)}
DATA |= {f"noise of width {width}": noise(width) for width in (16, 32, 64, 128, 256, 512)}
DATA |= {"two classes": two_classes(0.3), "two tight classes": two_classes(0.1)}
every_data = pytest.mark.parametrize("data", DATA.values(), ids=DATA)


def mean_neighbors(nodes: Tensor, bandwidth: Tensor, backend: str) -> float:
    return effective_neighbors(nodes, bandwidth, others=True, backend=backend).mean().item()


@every_data
@pytest.mark.parametrize(
    ("batch", "backend"),
    [
        *((batch, "reference") for batch in (64, 256)),
        *(pytest.param(batch, FUSED, marks=requires_fused) for batch in (64, 256, 1024, 4096)),
    ],
)
def test_neighbors_are_as_many_as_wanted(data, batch, backend):
    nodes = data(batch)
    for k in WANTED:
        if k < batch / 4:
            sigma = neighbor_bandwidth(nodes, k, backend=backend)
            assert mean_neighbors(nodes, sigma, backend) == pytest.approx(k, rel=0.15)


@requires_fused
@every_data
@pytest.mark.parametrize("batch", [64, 1024])
@pytest.mark.parametrize("off", [0.97, 1.03])
def test_one_pass_is_enough_from_a_bandwidth_that_is_nearly_right(data, batch, off):
    nodes = data(batch)
    for k in WANTED:
        if k < batch / 4:
            sigma = neighbor_bandwidth(nodes, k, start=off * neighbor_bandwidth(nodes, k, backend=FUSED), backend=FUSED)
            assert mean_neighbors(nodes, sigma, FUSED) == pytest.approx(k, rel=0.03)


@requires_fused
@every_data
def test_what_is_found_to_the_last_digit_is_kept(data):
    """In float64 the search arrives before its last pass."""
    nodes = data(256).double()
    for k in WANTED:
        sigma = neighbor_bandwidth(nodes, k, backend=FUSED)
        assert mean_neighbors(nodes, sigma, FUSED) == pytest.approx(k, rel=1e-3)
        for start in (sigma, 1.01 * sigma):
            again = neighbor_bandwidth(nodes, k, start=start, backend=FUSED)
            assert again.item() == pytest.approx(sigma.item(), rel=1e-3)


@requires_fused
@pytest.mark.parametrize("start", [None, 0.05])
def test_as_many_at_every_bandwidth(start):
    """Five rows alike have four others, whatever σ is, and the search does not leave them."""
    nodes = torch.eye(16).repeat_interleave(5, dim=0)
    sigma = neighbor_bandwidth(nodes, 4, start=start, backend=FUSED)
    assert mean_neighbors(nodes, sigma, FUSED) == pytest.approx(4, rel=0.01)


@requires_fused
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_of_rounded_products_there_are_as_many(dtype):
    """The neighbours that count are those of the graph that is made: of the rows as their products take them."""
    nodes = pixels(256).to(dtype)
    for k in WANTED:
        assert mean_neighbors(nodes, neighbor_bandwidth(nodes, k, backend=FUSED), FUSED) == pytest.approx(k, rel=0.15)
        exact = neighbor_bandwidth(nodes.double(), k, backend="reference")
        assert mean_neighbors(nodes, exact, FUSED) == pytest.approx(k, rel=0.15)


@requires_fused
def test_backends_find_the_same_bandwidth():
    nodes = rows(40, 6)[0]
    found = [neighbor_bandwidth(nodes, 5.5, backend=backend) for backend in ("reference", FUSED)]
    assert found[0].dtype == D64 and not found[0].requires_grad
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=0)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_the_nearest_where_nodes_cannot_have_so_many(backend):
    """All rows alike, zero rows, and as many neighbours as there are others."""
    same = torch.ones(12, 3)
    assert neighbor_bandwidth(same, 4, backend=backend) == pytest.approx(functional.MIN_BANDWIDTH)
    assert effective_neighbors(same, 0.01, others=True, backend=backend).tolist() == pytest.approx([11.0] * 12)
    zeros = torch.zeros(12, 3)
    assert neighbor_bandwidth(zeros, 4, backend=backend).isfinite()
    for batch in (1, 2, 9):
        nodes = torch.randn(batch, 3)
        messages = torch.randn(batch, 2)
        output = graph_conv(nodes, messages, neighbors=8, self_weight=0.0, normalization="row", backend=backend)
        uniform = (messages.sum(dim=0) - messages) / max(batch - 1, 1) if batch > 1 else messages
        torch.testing.assert_close(output, uniform, rtol=1e-4, atol=1e-5)
        assert effective_neighbors(nodes, 0.5, others=True, backend=backend).isfinite().all()


@requires_fused
@pytest.mark.parametrize("batch", [64, 256, 1024, 4096])
@pytest.mark.parametrize("spread", [0.0, 0.01])
def test_of_two_classes_that_are_points_all_of_the_own_class(batch, spread):
    """No bandwidth from 0.01 on tells their members apart; the other class has no part in either."""
    nodes = two_classes(spread)(batch)
    sigma = neighbor_bandwidth(nodes, 4, backend=FUSED)
    assert sigma.item() == pytest.approx(functional.MIN_BANDWIDTH)
    found = effective_neighbors(nodes, sigma, others=True, backend=FUSED)
    assert found.isfinite().all() and found.max() <= 1.001 * (batch / 2 - 1)
    messages = torch.eye(2)[torch.arange(batch) % 2].requires_grad_()
    nodes.requires_grad_()
    output = graph_conv(nodes, messages, neighbors=4, self_weight=0.2, backend=FUSED)
    torch.testing.assert_close(output.argmax(dim=1), messages.argmax(dim=1))
    for gradient in torch.autograd.grad(output.square().sum(), [nodes, messages]):
        assert gradient.isfinite().all()


@requires_fused
def test_a_row_of_zeros_listens_to_all_and_leaves_the_others_theirs():
    nodes = pixels(256)
    nodes[7] = 0
    sigma = neighbor_bandwidth(nodes, 8, backend=FUSED)
    found = effective_neighbors(nodes, sigma, others=True, backend=FUSED)
    assert found[7] == pytest.approx(255, rel=1e-3) and found.mean() == pytest.approx(8, rel=0.15)
