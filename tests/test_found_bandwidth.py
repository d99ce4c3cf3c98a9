"""Modules whose bandwidth gives so many neighbours: from step to step, saved, resumed, and in the loss's report."""

import copy

import pytest
import torch

from gkd_fast import BatchGCN, GraphKDLoss
from gkd_fast._snapshot import Snapshot
from gkd_fast.functional import effective_neighbors
from tests.ops_cases import Calls


def head(**options) -> BatchGCN:
    torch.manual_seed(0)
    return BatchGCN(12, 5, neighbors=6, self_weight=0.8, **options)


def batch_of(size: int, step: int) -> torch.Tensor:
    return torch.randn(size, 12, generator=torch.Generator().manual_seed(step)).relu()


def passes(module: BatchGCN, nodes: torch.Tensor) -> int:
    """How often a call passes over the pairs for its bandwidth alone."""
    with Calls() as calls:
        module(nodes)
    return len(calls.arguments("neighbor_sums")) - len(calls.arguments("neighbor_conv"))


def test_the_bandwidth_of_a_step_is_the_next_ones_start():
    module = head()
    assert passes(module, batch_of(50, 0)) > 1
    assert passes(module, batch_of(50, 1)) == 1
    nodes = batch_of(50, 2)
    module(nodes)
    assert effective_neighbors(nodes, module.found_bandwidth, others=True).mean() == pytest.approx(6, rel=0.02)
    assert passes(module, batch_of(30, 3)) > 1, "another batch size is sought anew"
    assert passes(module, batch_of(30, 4)) == 1


def test_evaluation_and_diagnostics_leave_the_bandwidth_as_it_is():
    module = head()
    module(batch_of(50, 0))
    before = module.found_bandwidth.clone()
    assert passes(module.eval(), batch_of(50, 1)) == 1
    assert torch.equal(module.found_bandwidth, before)
    criterion = GraphKDLoss([12], [12], num_classes=3, neighbors=6)
    criterion([batch_of(50, 0)], [batch_of(50, 1)], torch.arange(50) % 3)
    before = [x.clone() for x in criterion.buffers()]
    criterion.diagnostics([batch_of(50, 2)], [batch_of(50, 3)])
    criterion.diagnostics([batch_of(30, 2)], [batch_of(30, 3)])
    assert len(before) == 4 and all(torch.equal(x, y) for x, y in zip(criterion.buffers(), before))
    assert passes(criterion.student_heads[0], batch_of(50, 4)) == 1


@pytest.mark.parametrize("how", ["state", "copy"])
def test_a_resumed_module_goes_on_with_the_same_bits(how):
    module = head()
    module(batch_of(50, 0))
    if how == "copy":
        resumed = copy.deepcopy(module)
    else:
        resumed = head()
        resumed.load_state_dict(module.state_dict())
    assert torch.equal(module(batch_of(50, 1)), resumed(batch_of(50, 1)))
    assert torch.equal(module.found_bandwidth, resumed.found_bandwidth)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_call_is_computed_again_as_it_was(reentrant):
    """Reentrant checkpointing makes the call itself without gradient."""
    plain, again = head(), head()
    for step in range(3):
        nodes = batch_of(50, step).requires_grad_()
        plain(nodes).square().sum().backward()
        torch.utils.checkpoint.checkpoint(again, nodes, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(plain.found_bandwidth, again.found_bandwidth)
    assert torch.equal(plain.linears[0].weight.grad, again.linears[0].weight.grad)


def test_without_neighbors_there_is_nothing_more_to_save():
    assert set(BatchGCN(3, 4, neighbors=None).state_dict()) == {"linears.0.weight", "linears.0.bias"}
    assert set(BatchGCN(3, 4, bandwidth=0.5).state_dict()) == {"linears.0.weight", "linears.0.bias"}


def test_a_state_of_a_graph_without_a_search_begins_with_one():
    """Such as one that was saved when the default was another."""
    trained = BatchGCN(12, 5, neighbors=None)
    module = head()
    module(batch_of(50, 0))
    module.load_state_dict(trained.state_dict())
    assert torch.equal(module.linears[0].weight, trained.linears[0].weight)
    fresh = head()
    fresh.load_state_dict(trained.state_dict())
    nodes = batch_of(50, 1)
    assert passes(module, nodes) > 1
    fresh(nodes)
    assert torch.equal(module.found_bandwidth, fresh.found_bandwidth)


@pytest.mark.parametrize("options", [{"neighbors": None}, {"bandwidth": 0.5}])
def test_a_state_of_a_graph_with_a_search_is_none_of_one_without(options):
    trained, module = head(), BatchGCN(12, 5, **options)
    with pytest.raises(RuntimeError, match='Unexpected key.*"found_bandwidth", "found_batch"'):
        module.load_state_dict(trained.state_dict())
    module.load_state_dict(trained.state_dict(), strict=False)
    assert torch.equal(module.linears[0].weight, trained.linears[0].weight)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_loss_finds_the_neighbors_that_it_wants(layers):
    torch.manual_seed(1)
    criterion = GraphKDLoss([12, 12], [12], num_classes=3, layers=layers, neighbors=4, self_weight=0.8)
    features = [batch_of(40, k).requires_grad_() for k in range(2)], [batch_of(40, 5)]
    criterion(*features, torch.arange(40) % 3).backward()
    assert all(x.grad.isfinite().all() and x.grad.any() for x in features[0])
    report = criterion.diagnostics()
    assert report["wanted_neighbors"] == 4
    assert [*report["student_neighbors"], *report["teacher_neighbors"]] == pytest.approx([4] * 3, rel=0.05)


def test_the_advice_is_about_the_neighbors():
    criterion = GraphKDLoss([12], [12], num_classes=3, neighbors=30, self_weight=0.5)
    with pytest.warns(UserWarning, match="neighbors=30 are nearly all of a batch of 16: try fewer, or a larger batch"):
        criterion([batch_of(16, 0)], [batch_of(16, 1)], torch.arange(16) % 3)


@pytest.mark.parametrize("last", [None, 5])
def test_a_look_that_is_undone_leaves_the_next_search_as_it_was(last):
    plain, looked_at = head(), head()
    for module in (plain, looked_at):
        if last is not None:
            module(batch_of(last, 7))  # an epoch's last batch, too small for six others: a bandwidth without bounds
    snapshot = Snapshot([looked_at])
    looked_at(batch_of(50, 0))
    with Snapshot([looked_at]).replay():
        looked_at(batch_of(50, 1))
    snapshot.restore()
    assert torch.equal(plain(batch_of(50, 0)), looked_at(batch_of(50, 0)))
    assert torch.equal(plain.found_bandwidth, looked_at.found_bandwidth)
