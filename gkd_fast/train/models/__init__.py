"""Networks that show their stages, by name."""

import re

from gkd_fast.train.models.checkpoint import load_weights
from gkd_fast.train.models.named import own_network, timm_network
from gkd_fast.train.models.resnet import RESNETS, ResNet
from gkd_fast.train.models.small import SmallNetwork
from gkd_fast.train.models.staged import StagedNetwork, StageOutputs
from gkd_fast.train.models.wrn import WideResNet

__all__ = ["StageOutputs", "StagedNetwork", "available_networks", "build_network", "load_weights"]


def build_network(
    name: str,
    num_classes: int,
    sample_shape: tuple[int, int, int],
    *,
    stages: list[str] | None = None,
    auxiliary: bool = True,
    pretrained: bool = False,
) -> StagedNetwork:
    """A network with random weights, or those that its library has for it.

    Args:
        name: see :func:`available_networks`.
        num_classes: ≥ 1.
        sample_shape: (channels, height, width) of the images.
        stages: for networks of other libraries: module names, as in ``named_modules()``, whose outputs are the stages.
        auxiliary: gives every stage a branch with logits of its own. Networks of other libraries have none either way.
        pretrained: takes the library's own weights; for ``timm/…`` and ``torchvision/…``.

    Raises:
        ValueError: an unknown name, or arguments that do not go with it.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    if name.startswith("torchvision/"):
        from gkd_fast.train.models.torchvision import TorchvisionNetwork  # takes a second to import

        return TorchvisionNetwork(name.removeprefix("torchvision/"), num_classes, sample_shape, stages, pretrained)
    if name.startswith("timm/"):
        return timm_network(name.removeprefix("timm/"), num_classes, sample_shape, stages, pretrained)
    if pretrained:
        raise ValueError(f"pretrained weights are there for timm/ and torchvision/ networks only, not for {name}")
    if ":" in name:
        return own_network(name, num_classes, sample_shape, stages)
    if stages is not None:
        raise ValueError(f"stages can be chosen for networks of other libraries only, not for {name}")
    if match := re.fullmatch(r"wrn_(\d+)_(\d+)", name):
        return WideResNet(int(match[1]), int(match[2]), num_classes, sample_shape[0], auxiliary)
    if name in RESNETS:
        return ResNet(*RESNETS[name], num_classes, sample_shape[0], auxiliary)
    if match := re.fullmatch(r"small_(\d+)", name):
        return SmallNetwork(int(match[1]), num_classes, sample_shape, auxiliary)
    raise ValueError(f"there is no network {name!r}; there are {', '.join(available_networks())}")


def available_networks() -> list[str]:
    """The names that :func:`build_network` knows; capitals stand for what may be chosen."""
    return ["wrn_DEPTH_WIDTH", *RESNETS, "small_WIDTH", "timm/NAME", "torchvision/NAME", "MODULE:FUNCTION"]
