"""Models of timm, and one's own by import path, as staged networks: ``timm/NAME``, ``package.module:function``."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gkd_fast._probe import pools_and_widths
from gkd_fast.features import StageFeatures
from gkd_fast.train.models.staged import StagedNetwork, StageOutputs
from gkd_fast.train.own import imported

# As many stages as the usual pyramids have.
STAGES = 4


class NamedNetwork(StagedNetwork):
    """A classifier with stages picked by module name, whose layouts are found out; its logits are its own alone.

    Args:
        name: for messages.
        model: gives logits ``[B, classes]``.
        sample_shape: (channels, height, width) of the images.
        stages: module names.
    """

    checkpoint_prefix = "model."

    def __init__(self, name: str, model: nn.Module, sample_shape: tuple[int, int, int], stages: Sequence[str]):
        super().__init__()
        self.model = model
        sample = torch.zeros(2, *sample_shape)
        try:
            pools, self.feature_dims = pools_and_widths("network", model, stages, sample, None, None)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"{name} does not take images of shape {sample_shape}: {error}") from error
        self._collect = StageFeatures(model, stages, pool=pools)

    def forward(self, x: Tensor) -> StageOutputs:
        output, features = self._collect(x)
        assert isinstance(output, Tensor)
        return StageOutputs(features, [output])


def timm_network(
    name: str, num_classes: int, sample_shape: tuple[int, int, int], stages: Sequence[str] | None, pretrained: bool
) -> NamedNetwork:
    """A model of timm; by default the last of its feature stages, or its blocks at the quarters of its depth."""
    try:
        import timm
    except ImportError:
        raise ValueError(f"timm/{name} needs the package timm: pip install timm") from None
    if not timm.is_model(name.split(".")[0]):
        raise ValueError(f"timm has no model {name!r}; timm.list_models() names them")
    options = {"num_classes": num_classes, "in_chans": sample_shape[0], "pretrained": pretrained}
    try:
        model = timm.create_model(name, img_size=sample_shape[1:], **options)
    except TypeError:  # convolutional networks have no size of their own
        model = timm.create_model(name, **options)
    if stages is None:
        known = [info["module"] for info in getattr(model, "feature_info", [])]
        if not known:
            raise ValueError(f"timm/{name} has no default stages: name some of its modules with stages")
        quarters = [known[len(known) * k // STAGES - 1] for k in range(1, STAGES + 1)]
        stages = quarters if len(known) > 2 * STAGES else known[-STAGES:]
    return NamedNetwork(f"timm/{name}", model, sample_shape, stages)


def own_network(
    path: str, num_classes: int, sample_shape: tuple[int, int, int], stages: Sequence[str] | None
) -> NamedNetwork:
    """What ``module:function`` makes when called with ``num_classes``."""
    if stages is None:
        raise ValueError(f"{path} has no default stages: name some of its modules with stages")
    return NamedNetwork(path, imported(path)(num_classes=num_classes), sample_shape, stages)
