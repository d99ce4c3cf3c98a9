"""Wide residual networks for 32×32 images (Zagoruyko and Komodakis, 2016): ``wrn_DEPTH_WIDTH``.

Parameters are named as in the field's common checkpoints: conv1, block1 to block3, bn1, fc.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from gkd_fast.train.models.staged import ConvolutionalNetwork, initialize


class WideResNet(ConvolutionalNetwork):
    """Three stages of (depth − 4)/6 pre-activation blocks, 16·width, 32·width and 64·width channels."""

    def __init__(self, depth: int, width: int, num_classes: int, channels: int = 3, auxiliary: bool = True):
        super().__init__()
        if depth < 10 or (depth - 4) % 6 or width < 1:
            raise ValueError(f"a WRN needs a depth of 6n + 4 ≥ 10 and a width ≥ 1, got depth {depth}, width {width}")
        blocks = (depth - 4) // 6
        dims = [16 * width, 32 * width, 64 * width]
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.block1 = _Stage(16, dims[0], blocks, stride=1)
        self.block2 = _Stage(dims[0], dims[1], blocks, stride=2)
        self.block3 = _Stage(dims[1], dims[2], blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(dims[2])
        self.fc = nn.Linear(dims[2], num_classes)
        nn.init.zeros_(self.fc.bias)
        initialize(self)
        self.add_branches(dims, num_classes, auxiliary)

    def stage_maps(self, x: Tensor) -> list[Tensor]:
        first = self.block1(self.conv1(x))
        second = self.block2(first)
        return [first, second, F.relu(self.bn1(self.block3(second)))]


class _Stage(nn.Module):
    def __init__(self, before: int, after: int, blocks: int, stride: int):
        super().__init__()
        self.layer = nn.Sequential(
            _Block(before, after, stride), *(_Block(after, after, stride=1) for _ in range(blocks - 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class _Block(nn.Module):
    """Norm and activation come before each convolution; a projected shortcut starts behind the first of them."""

    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.convShortcut = None
        if before != after or stride != 1:
            self.convShortcut = nn.Conv2d(before, after, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(active))))
