"""What every network of the driver looks like: stages, each with a pooled feature and, if wanted, logits."""

from collections.abc import Sequence

from torch import Tensor, nn

from gkd_fast._distilled import StageOutputs


class StagedNetwork(nn.Module):
    """A network that shows its stages: ``network(images) -> StageOutputs``.

    ``feature_dims`` are the widths of the features. ``auxiliary`` says whether every stage has logits of its own;
    without, features are the globally averaged stage outputs and the logits are the network's alone.
    """

    feature_dims: list[int]
    auxiliary: bool = False
    # What the names of a plain checkpoint lack to be this module's.
    checkpoint_prefix: str = ""

    def forward(self, x: Tensor) -> StageOutputs:
        raise NotImplementedError


class ConvolutionalNetwork(StagedNetwork):
    """A network whose stages are feature maps, with an auxiliary branch on each but the last.

    A subclass sets its layers (``fc``, the classifier on the last pooled map, among them), then calls
    :meth:`add_branches`, and computes the maps in :meth:`stage_maps`.
    """

    fc: nn.Linear

    def add_branches(self, stage_dims: Sequence[int], num_classes: int, auxiliary: bool) -> None:
        """Call it last, so that a seed initialises the network alike with and without branches."""
        self.auxiliary = auxiliary
        self.feature_dims = list(stage_dims)
        if auxiliary:
            self.feature_dims = [stage_dims[-1]] * len(stage_dims)
            self.branches = nn.ModuleList(
                AuxiliaryBranch(stage_dims[stage:], num_classes) for stage in range(len(stage_dims) - 1)
            )

    def stage_maps(self, x: Tensor) -> list[Tensor]:
        """The stages' outputs ``[B, C_k, H_k, W_k]``; the last is what the classifier pools."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> StageOutputs:
        maps = self.stage_maps(x)
        last = maps[-1].mean(dim=(2, 3))
        logits = self.fc(last)
        if not self.auxiliary:
            return StageOutputs([stage.mean(dim=(2, 3)) for stage in maps[:-1]] + [last], [logits])
        early = [branch(stage) for branch, stage in zip(self.branches, maps)]
        return StageOutputs([feature for feature, _ in early] + [last], [own for _, own in early] + [logits])


class AuxiliaryBranch(nn.Module):
    """Leads a stage to logits of its own: a strided convolution for each stage still to come, pooling, a classifier."""

    def __init__(self, dims: Sequence[int], num_classes: int):
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip(dims[:-1], dims[1:]):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers)
        self.fc = nn.Linear(dims[-1], num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.convolutions(x).mean(dim=(2, 3))
        return feature, self.fc(feature)


def initialize(module: nn.Module) -> None:
    """Convolutions after He et al. (2015), by fan-out; the rest as PyTorch does."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
