"""Residual networks for 32×32 images (He et al., 2016), four times wider variants, and one that is four times narrower.

Parameters are named as in the field's common checkpoints: conv1, bn1, layer1 to layer3, fc.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from gkd_fast.train.models.staged import ConvolutionalNetwork, initialize

# name: (depth, channels of the first convolution and of the three stages)
RESNETS = {f"resnet{depth}": (depth, (16, 16, 32, 64)) for depth in (8, 14, 20, 32, 44, 56, 110)}
RESNETS |= {f"resnet{depth}x4": (depth, (32, 64, 128, 256)) for depth in (8, 32)}
RESNETS["resnet8x0.25"] = (8, (4, 4, 8, 16))


class ResNet(ConvolutionalNetwork):
    """Three stages of (depth − 2)/6 blocks."""

    def __init__(
        self,
        depth: int,
        dims: tuple[int, int, int, int],
        num_classes: int,
        channels: int = 3,
        auxiliary: bool = True,
    ):
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(channels, dims[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(dims[0])
        self.layer1 = _stage(dims[0], dims[1], blocks, stride=1)
        self.layer2 = _stage(dims[1], dims[2], blocks, stride=2)
        self.layer3 = _stage(dims[2], dims[3], blocks, stride=2)
        self.fc = nn.Linear(dims[3], num_classes)
        initialize(self)
        self.add_branches(dims[1:], num_classes, auxiliary)

    def stage_maps(self, x: Tensor) -> list[Tensor]:
        maps = [F.relu(self.bn1(self.conv1(x)))]
        for stage in (self.layer1, self.layer2, self.layer3):
            maps.append(stage(maps[-1]))
        return maps[1:]


def _stage(before: int, after: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(_Block(before, after, stride), *(_Block(after, after, stride=1) for _ in range(blocks - 1)))


class _Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.downsample = None
        if before != after or stride != 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(before, after, 1, stride=stride, bias=False), nn.BatchNorm2d(after)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(shortcut + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
