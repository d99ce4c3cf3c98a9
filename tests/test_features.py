import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gkd_fast import StageFeatures
from gkd_fast.features import pool_features


class Network(nn.Module):
    """Two stages, each followed by an activation in place, and one module that runs twice under two names."""

    def __init__(self, reentrant: bool | None = None):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3)
        self.stage = nn.Conv2d(4, 6, 3)
        self.shared = self.again = nn.Conv2d(6, 6, 1)
        self.idle = nn.Linear(1, 1)
        self.reentrant = reentrant

    def forward(self, x):
        x = self.stem(x).relu_()
        run = lambda y: self.stage(y).mul_(1)  # noqa: E731
        x = run(x) if self.reentrant is None else checkpoint(run, x, use_reentrant=self.reentrant)
        x = self.shared(x.relu_())
        return self.again(x).mean(dim=(2, 3))


IMAGES = torch.randn(3, 1, 8, 8)


def test_features_are_the_stages_outputs_before_anything_in_place():
    network = Network()
    output, (stem, stage) = StageFeatures(network, ["stem", "stage"])(IMAGES)
    expected = network.stem(IMAGES)
    assert (expected < 0).any()
    torch.testing.assert_close(stem, expected.mean((2, 3)))
    torch.testing.assert_close(stage, network.stage(expected.relu()).mean((2, 3)))
    torch.testing.assert_close(output, network(IMAGES))
    (stem.sum() + stage.sum()).backward()
    assert network.stem.weight.grad.abs().sum() > 0


def test_whole_outputs_and_identity_pooling_are_safe_from_changes_in_place():
    network = Network()
    for pool in (None, lambda x: x.view(len(x), -1)):
        _, (stem,) = StageFeatures(network, ["stem"], pool=pool)(IMAGES)
        torch.testing.assert_close(stem.flatten(1), network.stem(IMAGES).flatten(1))


def test_a_module_under_two_names_gives_its_outputs_in_order():
    network = Network()
    _, (first, second) = StageFeatures(network, ["shared", "again"])(IMAGES)
    _, (last,) = StageFeatures(network, ["again"])(IMAGES)
    x = network.stage(network.stem(IMAGES).relu()).relu()
    torch.testing.assert_close(first, network.shared(x).mean((2, 3)))
    torch.testing.assert_close(second, network.shared(network.shared(x)).mean((2, 3)))
    assert torch.equal(last, second)


def test_checkpointing_gives_the_same_gradients():
    torch.manual_seed(0)
    plain = Network()
    torch.manual_seed(0)
    saving = Network(reentrant=False)
    gradients = []
    for network in (plain, saving):
        output, (stage,) = StageFeatures(network, ["stage"])(IMAGES)
        (output.square().sum() + stage.square().sum()).backward()
        gradients.append([p.grad for p in (network.stem.weight, network.stage.weight)])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def test_a_reentrant_checkpoint_is_refused():
    stages = StageFeatures(Network(reentrant=True), ["stage"])
    with pytest.raises(RuntimeError, match="stage 'stage' runs without gradient; if checkpointed"):
        stages(IMAGES)


def test_frozen_models_and_no_grad_are_fine():
    network = Network().requires_grad_(False)
    _, (stage,) = StageFeatures(network, ["stage"])(IMAGES)
    assert not stage.requires_grad
    with torch.no_grad():
        StageFeatures(Network(), ["stage"])(IMAGES)


def test_wrappers_are_looked_through():
    network = Network()
    _, (expected,) = StageFeatures(network, ["stage"])(IMAGES)
    wrapped = nn.DataParallel(network)
    _, (found,) = StageFeatures(wrapped, ["stage"])(IMAGES)
    assert torch.equal(found, expected)


def test_ddp(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        network = Network()
        wrapped = nn.parallel.DistributedDataParallel(network, find_unused_parameters=True)
        output, (stage,) = StageFeatures(wrapped, ["stage"])(IMAGES)
        (output.sum() + stage.sum()).backward()
        assert network.stage.weight.grad.abs().sum() > 0
    finally:
        torch.distributed.destroy_process_group()


def test_remove_takes_the_hooks_off():
    network = Network()
    StageFeatures(network, ["stem", "stage"]).remove()
    assert not network.stem._forward_hooks and not network.stage._forward_hooks


def test_bad_stages_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"stages \['layer9'\] are no modules of the model, which has: stem, stage"):
        StageFeatures(Network(), ["stem", "layer9"])
    with pytest.raises(ValueError, match="stages must be a list of module names, got 'stem'"):
        StageFeatures(Network(), "stem")
    with pytest.raises(RuntimeError, match="stage 'idle' did not run"):
        StageFeatures(Network(), ["idle"])(IMAGES)
    network = nn.Sequential(nn.LSTM(2, 2))
    with pytest.raises(TypeError, match="stage '0' must return a Tensor, got tuple"):
        StageFeatures(network, ["0"])(torch.ones(1, 2))


def test_pooling():
    maps, tokens = torch.randn(2, 3, 4, 5), torch.randn(2, 6, 3)
    assert torch.equal(pool_features(maps), maps.mean((2, 3)))
    assert torch.equal(pool_features(tokens), tokens.mean(1))
    assert torch.equal(pool_features(tokens, "cls"), tokens[:, 0])
    assert torch.equal(pool_features(tokens[:, 0], "cls"), tokens[:, 0])
    for x, pool in ((maps, "cls"), (maps[0, 0, 0], "mean")):
        with pytest.raises(ValueError, match="features must be"):
            pool_features(x, pool)
    with pytest.raises(ValueError, match=r"pool must return a Tensor \[batch, width\]"):
        pool_features(maps, lambda x: x)
