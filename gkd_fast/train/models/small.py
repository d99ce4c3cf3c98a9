"""Small convolutional networks for small images, 8×8 and 28×28 among them: ``small_WIDTH``."""

from torch import Tensor, nn

from gkd_fast.train.models.staged import ConvolutionalNetwork, initialize

# From this height and width on, the first stage halves the image too.
STRIDE_FROM = 16


class SmallNetwork(ConvolutionalNetwork):
    """Three stages of two convolutions, width, 2·width and 4·width channels."""

    def __init__(self, width: int, num_classes: int, sample_shape: tuple[int, int, int], auxiliary: bool = True):
        super().__init__()
        if width < 1:
            raise ValueError(f"a small network needs a width ≥ 1, got {width}")
        channels, *size = sample_shape
        dims = [width, 2 * width, 4 * width]
        self.stage1 = _stage(channels, dims[0], stride=2 if min(size) >= STRIDE_FROM else 1)
        self.stage2 = _stage(dims[0], dims[1], stride=2)
        self.stage3 = _stage(dims[1], dims[2], stride=2)
        self.fc = nn.Linear(dims[2], num_classes)
        initialize(self)
        self.add_branches(dims, num_classes, auxiliary)

    def stage_maps(self, x: Tensor) -> list[Tensor]:
        first = self.stage1(x)
        second = self.stage2(first)
        return [first, second, self.stage3(second)]


def _stage(before: int, after: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(),
        nn.Conv2d(after, after, 3, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(),
    )
