"""A distiller for mdistiller; importing this module registers it as ``GKD``, with its settings.

Put ``import gkd_fast.integrations.mdistiller`` into ``tools/train.py``, below the other imports, and choose it with
``DISTILLER.TYPE GKD``; settings are ``GKD.…`` in the configuration, see :data:`DEFAULTS`.
"""

from typing import Any

import torch
from mdistiller import distillers
from mdistiller.distillers._base import Distiller
from mdistiller.engine.cfg import CFG
from torch import Tensor, nn
from torch.nn import functional

from gkd_fast.functional import kd_divergence
from gkd_fast.loss import GraphKDLoss

__all__ = ["DEFAULTS", "GKD"]

# CE_WEIGHT, KD_WEIGHT, GRAPH_WEIGHT: factors of cross-entropy, logit distillation at TEMPERATURE, and the graph loss.
# STAGES: which of the networks' feature maps ("feats") are its stages, counted from the end.
DEFAULTS = {
    "CE_WEIGHT": 1.0,
    "KD_WEIGHT": 1.0,
    "GRAPH_WEIGHT": 1.0,
    "TEMPERATURE": 4.0,
    "STAGES": [-3, -2, -1],
    "EMBED_DIM": 128,
    "INPUT_SIZE": (32, 32),
}

CFG.GKD = type(CFG)()
for _name, _value in DEFAULTS.items():
    setattr(CFG.GKD, _name, _value)


class GKD(Distiller):
    """:class:`gkd_fast.GraphKDLoss` over the networks' feature maps, cross-entropy and logit distillation.

    The terms are ``loss_ce`` and ``loss_kd``, the latter with all that comes from the teacher.

    Args:
        student, teacher: networks of mdistiller, which return logits and a dict with ``"feats"``.
        cfg: a configuration with a node ``GKD``.

    Raises:
        ValueError: a stage that a network has not.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any):
        super().__init__(student, teacher)
        self.settings = {name: getattr(cfg.GKD, name) for name in DEFAULTS}
        (students, classes), (teachers, _) = self._widths(student), self._widths(teacher)
        self.criterion = GraphKDLoss(
            students, teachers, num_classes=classes, embed_dim=self.settings["EMBED_DIM"], pool="mean"
        )

    def _stages(self, feats: list[Tensor]) -> list[Tensor]:
        wanted = self.settings["STAGES"]
        if not all(-len(feats) <= stage < len(feats) for stage in wanted):
            raise ValueError(f"GKD.STAGES must be among {len(feats)} feature maps, got {list(wanted)}")
        return [feats[stage] for stage in wanted]

    def _widths(self, network: nn.Module) -> tuple[list[int], int]:
        """Channels of the stages and the number of classes, of a forward pass that leaves no trace."""
        parameter = next(network.parameters())
        modes = {module: module.training for module in network.modules()}
        network.eval()
        with torch.no_grad():
            logits, features = network(parameter.new_zeros(2, 3, *self.settings["INPUT_SIZE"]))
        for module, mode in modes.items():
            module.training = mode
        return [feature.shape[1] for feature in self._stages(features["feats"])], logits.shape[1]

    def get_learnable_parameters(self) -> list[nn.Parameter]:
        """What the trainer's optimizer takes: the student's parameters and the criterion's."""
        return [*super().get_learnable_parameters(), *self.criterion.parameters()]

    def get_extra_parameters(self) -> int:
        """How many numbers the criterion adds."""
        return sum(parameter.numel() for parameter in self.criterion.parameters())

    def forward_train(self, image: Tensor, target: Tensor, **_: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's logits, and the losses by name."""
        logits, student = self.student(image)
        with torch.no_grad():
            teacher_logits, teacher = self.teacher(image)
        settings = self.settings
        graph = self.criterion(self._stages(student["feats"]), self._stages(teacher["feats"]), target)
        kd = kd_divergence(logits, teacher_logits, temperature=settings["TEMPERATURE"])
        return logits, {
            "loss_ce": settings["CE_WEIGHT"] * functional.cross_entropy(logits, target),
            "loss_kd": settings["KD_WEIGHT"] * kd + settings["GRAPH_WEIGHT"] * graph,
        }


distillers.distiller_dict["GKD"] = GKD
