"""The public API on interpreted kernels: registration, unit rows, finite differences, whole losses."""

import pytest
import torch
from torch.autograd import gradcheck

from gkd_fast import GraphKDLoss, functional, ops, reference
from gkd_fast.kernels.common import autotune, table
from gkd_fast.kernels.relation_kl.launches import relation_kl
from tests.ops_cases import GRAPHS

from .judge import features

D64 = torch.float64


def test_the_cpu_belongs_to_triton_here():
    x = torch.randn(4, 3)
    assert ops.missing("triton", x.device) is None
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 gives the CPU to the interpreted Triton kernels"):
        functional.relation_kl(x, x, backend="cpp")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, D64])
def test_unit_rows_of_any_stride_and_width(dtype):
    matrices = [torch.randn(11, 300).to(dtype), torch.randn(5, 11).to(dtype).T, torch.randn(11, 8).to(dtype)[:, ::2]]
    matrices[1][4] = 0
    matrices[0][2] *= 1e4 if dtype == torch.float16 else 1e18
    sums = D64 if dtype == D64 else torch.float32
    inputs = [x.clone().as_strided(x.shape, x.stride()) if x.is_contiguous() else x for x in matrices]
    inputs = [x.detach().requires_grad_() for x in inputs]
    units = ops.unit_rows(inputs, sums)
    upstream = [torch.randn(x.shape, dtype=sums) for x in inputs]
    found = torch.autograd.grad(units, inputs, upstream)
    truth_inputs = [x.detach().double().requires_grad_() for x in inputs]
    truth = [reference.unit_rows(x) for x in truth_inputs]
    expected = torch.autograd.grad(truth, truth_inputs, [g.double() for g in upstream])
    for unit, exact in zip(units, truth):
        torch.testing.assert_close(unit.double(), exact, rtol=0, atol=1e-12 if dtype == D64 else 1e-6)
    for gradient, exact in zip(found, expected):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps + 1e-6, atol=1e-6)


LOSSES = {
    "relation_kl": lambda a, b, t: functional.relation_kl([a, b], t, temperature=0.4, backend="triton"),
    "relation_kl own shift": lambda a, b, t: functional.relation_kl([a, b], t, temperature=0.012, backend="triton"),
    "node_contrast": lambda a, b, t: functional.node_contrast([a, b], t, temperature=0.4, backend="triton"),
    "graph_conv symmetric": lambda a, b, t: functional.graph_conv(a, b, bandwidth=0.7, backend="triton"),
    "graph_conv row": lambda a, b, t: functional.graph_conv(a, t, bandwidth=0.7, normalization="row", backend="triton"),
    "neighbor_conv symmetric": lambda a, b, t: functional.graph_conv(
        a, b, bandwidth=0.7, self_weight=0.3, backend="triton"
    ),
    "neighbor_conv row": lambda a, b, t: functional.graph_conv(
        a, t, bandwidth=0.7, self_weight=0.3, normalization="row", backend="triton"
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_against_finite_differences(name):
    inputs = [x.detach().clone().requires_grad_() for x in features(18, 2, 2, 2)]
    with table.forced(16, 16):
        assert gradcheck(LOSSES[name], inputs, fast_mode=True)


def test_autotuning_prints_the_fastest_tiles(monkeypatch, capsys, division):
    division("whole")
    monkeypatch.setattr(autotune, "CANDIDATES", [table.Tiles(16, 16, 4, 1), table.Tiles(32, 32, 4, 1)])
    monkeypatch.setattr(table, "overrides", {})
    rows = ops.unit_rows(features(20, 9, 9, dtype=torch.float32), torch.float32)
    arguments = ([rows[0].detach()], [rows[1].detach()], 0.1, 1.0, "float32")
    expected = relation_kl(*arguments)
    torch.testing.assert_close(autotune.autotuned(relation_kl)(*arguments), expected)
    ((key, chosen),) = table.overrides.items()
    assert key[0] == "relation_sums" and table.tiles(*key) == chosen
    assert f"relation_sums {chosen}" in capsys.readouterr().out


def test_same_bits_every_time():
    inputs = features(40, 9, 9, dtype=torch.float32)
    results = []
    for _ in range(2):
        with table.forced(16, 16):
            loss = functional.relation_kl(*inputs, backend="triton")
            results.append((loss, *torch.autograd.grad(loss.sum(), inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_nan_in_gives_nan_out():
    x, y = (t.detach().float() for t in features(20, 9, 9))
    x[1, 2] = torch.nan
    with table.forced(16, 16):
        assert functional.node_contrast(x, y, backend="triton")[1].isnan().all()
        assert functional.relation_kl(x, y, backend="triton").isnan().all()
        assert functional.graph_conv(x, y, bandwidth=0.5, backend="triton")[1].isnan().all()


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_a_whole_loss_on_interpreted_kernels(graph):
    losses = []
    for backend in ("reference", "triton"):
        torch.manual_seed(0)
        criterion = GraphKDLoss([6, 5], [7, 7], num_classes=3, embed_dim=8, backend=backend, **graph)
        students, teachers = [torch.randn(20, d) for d in (6, 5)], [torch.randn(20, 7) for _ in range(2)]
        loss = criterion(students, teachers, torch.randint(3, (20,)))
        losses.append([loss, *torch.autograd.grad(loss, list(criterion.parameters()))])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
