import argparse
import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from gkd_fast.train.models import available_networks, build_network, load_weights

RESNETS = [f"resnet{size}" for size in ("8", "14", "20", "32", "44", "56", "110", "8x4", "32x4", "8x0.25")]


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def check_forward_and_backward(network, sample_shape, num_classes, stages):
    outputs = network(torch.randn(3, *sample_shape, generator=torch.Generator().manual_seed(0)))
    assert [tuple(feature.shape) for feature in outputs.features] == [(3, dim) for dim in network.feature_dims]
    assert len(outputs.features) == stages
    assert len(outputs.logits) == (stages if network.auxiliary else 1)
    assert {tuple(logits.shape) for logits in outputs.logits} == {(3, num_classes)}
    torch.stack([logits.square().sum() for logits in outputs.logits]).sum().backward()
    untouched = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert not untouched
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


@pytest.mark.parametrize("auxiliary", [False, True])
@pytest.mark.parametrize(
    ("name", "sample_shape"),
    [
        *((name, (3, 32, 32)) for name in ["wrn_16_2", "wrn_10_1", "resnet20", "resnet8x4"]),
        *((name, (3, 16, 16)) for name in ["wrn_40_2", *RESNETS]),
        ("small_4", (1, 8, 8)),
        ("small_8", (1, 28, 28)),
        ("wrn_10_1", (1, 28, 28)),
        ("resnet8", (1, 8, 8)),
        ("small_8", (3, 32, 32)),
    ],
)
def test_networks_show_features_and_logits_of_every_stage(name, sample_shape, auxiliary):
    network = build_network(name, 7, sample_shape, auxiliary=auxiliary)
    assert network.auxiliary == auxiliary
    check_forward_and_backward(network, sample_shape, 7, stages=3)


@pytest.mark.parametrize(
    ("name", "parameters"),
    # As published with the field's CIFAR-100 checkpoints: 2.26, 0.70, 0.57, 0.28, 0.86, 7.43 million and so on.
    [
        ("wrn_40_2", 2_255_156),
        ("wrn_16_2", 703_284),
        ("wrn_40_1", 569_780),
        ("resnet20", 278_324),
        ("resnet32", 472_756),
        ("resnet56", 861_620),
        ("resnet110", 1_736_564),
        ("resnet8x4", 1_233_540),
        ("resnet32x4", 7_433_860),
    ],
)
def test_plain_networks_have_the_published_size(name, parameters):
    assert count(build_network(name, 100, (3, 32, 32), auxiliary=False)) == parameters


def test_features_without_branches_are_the_averaged_stage_outputs():
    network = build_network("wrn_16_2", 10, (3, 32, 32), auxiliary=False).eval()
    seen = {}
    for name in ("block1", "block2"):
        network.get_submodule(name).register_forward_hook(lambda *call, name=name: seen.update({name: call[2]}))
    network.fc.register_forward_hook(lambda *call: seen.update({"pooled": call[1][0]}))
    features, logits = network(torch.randn(2, 3, 32, 32))
    assert network.feature_dims == [32, 64, 128]
    assert [seen[name].shape[2] for name in ("block1", "block2")] == [32, 16]
    torch.testing.assert_close(features[0], seen["block1"].mean((2, 3)))
    torch.testing.assert_close(features[1], seen["block2"].mean((2, 3)))
    assert torch.equal(features[2], seen["pooled"]) and torch.equal(logits[0], network.fc(features[2]))


@pytest.mark.parametrize("name", ["wrn_16_2", "resnet20", "small_8"])
def test_branches_change_neither_initialisation_nor_output_of_the_network(name):
    networks = []
    for auxiliary in (False, True):
        torch.manual_seed(5)
        networks.append(build_network(name, 10, (3, 32, 32), auxiliary=auxiliary).eval())
    x = torch.randn(2, 3, 32, 32)
    plain, branched = (network(x) for network in networks)
    assert torch.equal(plain.logits[-1], branched.logits[-1])
    assert torch.equal(plain.features[-1], branched.features[-1])


@pytest.mark.parametrize(
    ("name", "shape", "names"),
    [
        (
            "wrn_16_2",
            (3, 32, 32),
            ["conv1.weight", "block1.layer.0.convShortcut.weight", "block2.layer.1.bn2.bias", "bn1.weight", "fc.bias"],
        ),
        (
            "resnet20",
            (3, 32, 32),
            ["conv1.weight", "bn1.bias", "layer1.2.conv2.weight", "layer2.0.downsample.0.weight", "fc.weight"],
        ),
    ],
)
def test_parameters_have_the_fields_names(name, shape, names):
    assert set(names) <= set(build_network(name, 100, shape, auxiliary=False).state_dict())


def older(state):
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


CHECKPOINTS = {
    "bare": lambda state: state,
    "model": lambda state: {"epoch": 240, "model": state, "accuracy": torch.tensor(75.6), "optimizer": {"state": {}}},
    "net": lambda state: {"net": state, "acc": 75.6},
    "network": lambda state: {"network": state},
    "state_dict": lambda state: {"state_dict": state, "best": np.float64(0.756), "arch": "wrn"},
    "options": lambda state: {"opt": argparse.Namespace(epochs=240), "model": state},
    "module prefix": lambda state: {"model": {f"module.{name}": value for name, value in state.items()}},
    "compiled": lambda state: {f"_orig_mod.{name}": value for name, value in state.items()},
    "linear": lambda state: {name.replace("fc.", "linear."): value for name, value in state.items()},
    "no batch count": older,
}


@pytest.mark.parametrize("name", ["wrn_10_1", "resnet8"])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_the_fields_checkpoints_load(kind, name, tmp_path):
    source = build_network(name, 10, (3, 32, 32), auxiliary=False)
    with torch.no_grad():
        for value in source.state_dict().values():
            value.add_(1)
    torch.save(CHECKPOINTS[kind](source.state_dict()), tmp_path / "checkpoint.pth")
    plain = build_network(name, 10, (3, 32, 32), auxiliary=False)
    assert load_weights(plain, tmp_path / "checkpoint.pth") == []
    loaded = older(plain.state_dict()) if kind == "no batch count" else plain.state_dict()
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in loaded.items())


def test_a_plain_checkpoint_leaves_the_branches_and_tells(tmp_path):
    plain, branched = (build_network("resnet8", 10, (3, 32, 32), auxiliary=auxiliary) for auxiliary in (False, True))
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    torch.save(branched.state_dict(), tmp_path / "branched.pth")
    branches = {name: value.clone() for name, value in branched.state_dict().items() if name.startswith("branches.")}
    told = load_weights(branched, tmp_path / "plain.pth")
    assert set(told) == {name for name in branches if not name.endswith("num_batches_tracked")} and told
    assert torch.equal(branched.conv1.weight, plain.conv1.weight)
    assert all(torch.equal(branched.state_dict()[name], value) for name, value in branches.items())
    assert set(load_weights(plain, tmp_path / "branched.pth")) == set(branches)
    assert load_weights(branched, tmp_path / "branched.pth") == []


def without(state, *names):
    return {name: value for name, value in state.items() if name not in names}


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda s: without(s, "fc.weight", "fc.bias"), r"does not fit the network, missing: fc\.weight, fc\.bias"),
        (lambda s: {**s, "extra.weight": torch.zeros(1)}, r"unexpected: extra\.weight"),
        (lambda s: {**s, "fc.bias": torch.zeros(4)}, r"of another shape: fc\.bias \(\[4\], the network's is \[10\]\)"),
        (lambda s: {"epoch": 3}, "holds no state_dict"),
        (lambda s: [1, 2], "holds no state_dict"),
        (lambda s: {}, "holds no state_dict"),
        (lambda s: build_network("resnet14", 10, (3, 32, 32)).state_dict(), r"unexpected: layer1\.1\.conv1.* more"),
    ],
)
def test_a_wrong_checkpoint_is_refused_and_changes_nothing(spoil, expected, tmp_path):
    network = build_network("resnet8", 10, (3, 32, 32))
    before = copy.deepcopy(network.state_dict())
    other = build_network("resnet8", 10, (3, 32, 32), auxiliary=False)
    torch.save(spoil(other.state_dict()), tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match=expected):
        load_weights(network, tmp_path / "wrong.pth")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


class Command:
    def __reduce__(self):
        return print, ("this code must not run",)


def test_files_that_are_no_checkpoints_are_refused(tmp_path, capsys):
    network = build_network("resnet8", 10, (3, 32, 32))
    path = tmp_path / "file.pth"
    with pytest.raises(ValueError, match="there is no checkpoint .*file.pth"):
        load_weights(network, path)
    torch.save(network.state_dict(), path)
    whole = path.read_bytes()
    code = pickle.dumps(Command(), protocol=2)
    for content in (b"", b"hello", whole[: len(whole) // 2], code):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="file.pth cannot be read as a checkpoint: "):
            load_weights(network, path)
    torch.save({"model": network.state_dict(), "hook": Command()}, path)
    with pytest.raises(ValueError, match="file.pth cannot be read as a checkpoint: "):
        load_weights(network, path)
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "size", "dims"),
    [
        ("resnet18", 32, [64, 128, 256, 512]),
        ("wide_resnet50_2", 32, [256, 512, 1024, 2048]),
        ("resnext50_32x4d", 32, [256, 512, 1024, 2048]),
        ("densenet121", 32, [256, 512, 1024, 1024]),
        ("convnext_tiny", 32, [96, 192, 384, 768]),
        ("swin_t", 64, [96, 192, 384, 768]),
        ("swin_v2_t", 64, [96, 192, 384, 768]),
        ("maxvit_t", 224, [64, 128, 256, 512]),
        ("efficientnet_b0", 32, [24, 40, 112, 1280]),
        ("mobilenet_v2", 32, [24, 32, 96, 1280]),
        ("alexnet", 64, [64, 192, 256]),
        ("vgg11_bn", 32, [64, 128, 256, 512, 512]),
        ("vit_b_16", 32, [768] * 4),
        ("googlenet", 64, [480, 832, 1024]),
        ("inception_v3", 96, [288, 768, 2048]),
    ],
)
def test_torchvision_families_have_default_stages(name, size, dims):
    with torch.device("meta"):  # shapes without arithmetic
        network = build_network(f"torchvision/{name}", 5, (3, size, size))
    assert network.feature_dims == dims


@pytest.mark.parametrize(
    ("name", "dims"), [("shufflenet_v2_x0_5", [48, 96, 192]), ("regnet_y_400mf", [48, 104, 208, 440])]
)
def test_torchvision_networks_train(name, dims):
    network = build_network(f"torchvision/{name}", 5, (3, 32, 32))
    assert network.feature_dims == dims and network.training and not network.auxiliary
    check_forward_and_backward(network, (3, 32, 32), 5, stages=len(dims))


def test_torchvision_stages_are_picked_by_name_and_survive_copies():
    stages = ["features.3", "features.6"]
    network = build_network("torchvision/squeezenet1_1", 5, (3, 64, 64), stages=stages).eval()
    x = torch.randn(2, 3, 64, 64)
    features, logits = network(x)
    expected = [network.model.features[:last](x).mean((2, 3)) for last in (4, 7)]
    assert all(torch.allclose(feature, other) for feature, other in zip(features, expected))
    assert torch.equal(logits[0], network.model(x))
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        nn.init.zeros_(network.model.features[0].weight)
        assert all(torch.equal(feature, again) for feature, again in zip(features, other(x).features))
        network.load_state_dict(other.state_dict())


def test_torchvision_checkpoints_load_plain_and_as_saved_here(tmp_path):
    source, target = (build_network("torchvision/shufflenet_v2_x0_5", 5, (3, 32, 32)) for _ in range(2))
    for state in (source.model.state_dict(), source.state_dict()):
        nn.init.zeros_(target.model.fc.weight)
        torch.save(state, tmp_path / "checkpoint.pth")
        assert load_weights(target, tmp_path / "checkpoint.pth") == []
        assert all(torch.equal(value, source.state_dict()[name]) for name, value in target.state_dict().items())


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        (
            "resnet50",
            {},
            r"there is no network 'resnet50'; there are wrn_DEPTH_WIDTH, resnet8, .*torchvision/NAME, MODULE:FUNCTION",
        ),
        ("wrn_17_2", {}, "depth of 6n \\+ 4 ≥ 10 .* got depth 17, width 2"),
        ("wrn_16_0", {}, "got depth 16, width 0"),
        ("small_0", {}, "width ≥ 1, got 0"),
        ("resnet8", {"stages": ["layer1"]}, "stages can be chosen for networks of other libraries only"),
        ("resnet8", {"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ("torchvision/resnet9", {}, "torchvision has no classifier 'resnet9'; it has alexnet, "),
        ("torchvision/squeezenet1_1", {}, "no default stages: name some of its modules, among them features, feat"),
        ("torchvision/resnet18", {"stages": ["layer9"]}, "layer9.*layer1"),
        ("torchvision/resnet18", {"sample_shape": (1, 28, 28)}, "needs images with 3 channels, got 1"),
        ("torchvision/alexnet", {"sample_shape": (3, 8, 8)}, r"does not take images of shape \(3, 8, 8\)"),
    ],
)
def test_bad_arguments_are_named(name, arguments, expected):
    with pytest.raises(ValueError, match=expected):
        build_network(name, **{"num_classes": 10, "sample_shape": (3, 32, 32), **arguments})


def test_available_networks_are_names_to_build():
    choices = {"DEPTH": "10", "WIDTH": "1", "NAME": "mnasnet0_5"}
    for name in available_networks():
        if name in ("timm/NAME", "MODULE:FUNCTION"):  # tests/train/test_driver_options.py has them
            continue
        for placeholder, choice in choices.items():
            name = name.replace(placeholder, choice)
        stages = ["layers.8"] if "/" in name else None
        assert build_network(name, 3, (3, 32, 32), stages=stages).feature_dims


def test_branches_have_the_documented_size():
    sizes = {name: count(build_network(name, 100, (3, 32, 32))) for name in ("wrn_16_2", "resnet20", "resnet8x4")}
    assert sizes == {"wrn_16_2": 895_612, "resnet20": 333_116, "resnet8x4": 1_949_772}
