"""Any classifier of torchvision as a staged network: ``torchvision/NAME``."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision import models

from gkd_fast.features import StageFeatures
from gkd_fast.train.models.staged import StagedNetwork, StageOutputs

# Stages where the architecture draws them itself: name pattern → module names.
DEFAULT_STAGES = {
    r"(wide_)?res(net|next).*": ["layer1", "layer2", "layer3", "layer4"],
    r"regnet_.*": [f"trunk_output.block{k}" for k in (1, 2, 3, 4)],
    r"densenet.*": [f"features.denseblock{k}" for k in (1, 2, 3, 4)],
    r"convnext_.*|swin_.*": [f"features.{k}" for k in (1, 3, 5, 7)],
    r"maxvit_.*": [f"blocks.{k}" for k in (0, 1, 2, 3)],
    r"shufflenet_.*": ["stage2", "stage3", "stage4"],
    r"efficientnet_b.": [f"features.{k}" for k in (2, 3, 5, 8)],
    r"mobilenet_v2": [f"features.{k}" for k in (3, 6, 13, 18)],
    r"googlenet": ["inception3b", "inception4e", "inception5b"],
    r"inception_v3": ["Mixed_5d", "Mixed_6e", "Mixed_7c"],
}


class TorchvisionNetwork(StagedNetwork):
    """A torchvision classifier with stages picked by module name; its logits are the network's alone.

    Images are averaged over positions and token sequences over tokens.
    """

    checkpoint_prefix = "model."

    def __init__(
        self,
        name: str,
        num_classes: int,
        sample_shape: tuple[int, int, int],
        stages: Sequence[str] | None = None,
        pretrained: bool = False,
    ):
        super().__init__()
        if name not in classifiers():
            raise ValueError(f"torchvision has no classifier {name!r}; it has {', '.join(classifiers())}")
        channels, *size = sample_shape
        if channels != 3:
            raise ValueError(f"torchvision/{name} needs images with 3 channels, got {channels}")
        self.model = models.get_model(name, weights=None, num_classes=num_classes, **_options(name, size))
        if pretrained:
            self._take_weights(name)
        if stages is None:
            stages = _default_stages(name, self.model)
        channels_last = isinstance(self.model, models.SwinTransformer)
        self._collect = StageFeatures(self.model, stages, pool="mean_nhwc" if channels_last else "mean")
        self.feature_dims = self._measure(name, sample_shape)

    def forward(self, x: Tensor) -> StageOutputs:
        output, features = self._collect(x)
        assert isinstance(output, Tensor)
        return StageOutputs(features, [output])

    def _take_weights(self, name: str) -> None:
        """The library's best weights, but for layers of another shape here: a classifier of other classes."""
        theirs = models.get_model_weights(name).DEFAULT.get_state_dict(progress=False)
        ours = self.model.state_dict()
        kept = {n: x for n, x in theirs.items() if n in ours and x.shape == ours[n].shape}
        self.model.load_state_dict(kept, strict=False)

    @torch.no_grad()
    def _measure(self, name: str, sample_shape: tuple[int, int, int]) -> list[int]:
        self.eval()
        try:
            features = self(torch.zeros(1, *sample_shape)).features
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"torchvision/{name} does not take images of shape {sample_shape}: {error}") from error
        self.train()
        return [feature.shape[1] for feature in features]


def classifiers() -> list[str]:
    """Names of torchvision's classifiers."""
    return models.list_models(module=models)


def _options(name: str, size: Sequence[int]) -> dict[str, object]:
    if name in ("googlenet", "inception_v3"):
        return {"aux_logits": False, "init_weights": True}
    if name.startswith("vit_"):
        return {"image_size": size[0]}
    if name.startswith("maxvit_"):
        return {"input_size": tuple(size)}
    return {}


def _default_stages(name: str, model: nn.Module) -> list[str]:
    for pattern, stages in DEFAULT_STAGES.items():
        if re.fullmatch(pattern, name):
            return stages
    if isinstance(model, (models.VGG, models.AlexNet)):
        return [f"features.{k}" for k, layer in model.features.named_children() if isinstance(layer, nn.MaxPool2d)]
    if isinstance(model, models.VisionTransformer):
        layers = len(model.encoder.layers)
        return [f"encoder.layers.encoder_layer_{layers * quarter // 4 - 1}" for quarter in (1, 2, 3, 4)]
    modules = ", ".join(module for module, _ in model.named_modules() if module and module.count(".") <= 1)
    raise ValueError(f"torchvision/{name} has no default stages: name some of its modules, among them {modules}")
