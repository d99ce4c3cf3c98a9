"""The losses in torchdistill's configurations; importing this module registers them.

A configuration names this module in ``dependencies``, puts a trainable criterion beside the student with the auxiliary
wrapper ``GKDStudent`` and uses it with the loss ``GKDLoss``; ``examples/torchdistill.yaml`` is a whole one. It
trains what belongs to the student, moves it to the device and saves it, and nothing that a loss brings with
it. So parameters live in the wrapper, and a loss that would have to bring its own raises.

Losses without parameters need no wrapper: ``gkd_fast.SimilarityPreserving``, ``gkd_fast.CorrelationCongruence``,
``gkd_fast.PKT``, ``gkd_fast.RKD``, ``gkd_fast.KDDivergence``, and ``gkd_fast.InfoNCE`` between features of one width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchdistill.losses.registry import register_mid_level_loss
from torchdistill.models.registry import register_auxiliary_model_wrapper
from torchdistill.models.util import wrap_if_distributed
from torchdistill.models.wrapper import AuxiliaryModelWrapper

from gkd_fast import losses
from gkd_fast.loss import GraphKDLoss

__all__ = ["GKDLoss", "GKDStudent"]

HANDED_OVER = "gkd_fast"  # under which a step's record of student features holds the criterion
CRITERIA: dict[str, type[nn.Module]] = {"GraphKDLoss": GraphKDLoss, "InfoNCE": losses.InfoNCE}

Record = Mapping[str, Mapping[str, Any]]


@register_auxiliary_model_wrapper
class GKDStudent(AuxiliaryModelWrapper):
    """A student and a criterion with parameters, as one model: one optimizer, one device, one checkpoint.

    Modules of the student are ``student_model.NAME`` in the paths of hooks and losses.

    Args:
        student_model: the student; torchdistill gives it, as it does ``device``, ``device_ids`` and ``distributed``.
        criterion: ``{"key": …, "kwargs": {…}}`` with the key ``"GraphKDLoss"`` (the default) or ``"InfoNCE"``, and the
            arguments of :class:`gkd_fast.GraphKDLoss` or :class:`gkd_fast.losses.InfoNCE`.
        global_batch: whether the samples of all processes are one batch in the loss, see :mod:`gkd_fast.distributed`.

    Raises:
        ValueError, TypeError: the criterion is not known, or its arguments are wrong.
    """

    def __init__(
        self,
        student_model: nn.Module,
        criterion: Mapping[str, Any],
        device: torch.device,
        device_ids: list[int] | None = None,
        distributed: bool = False,
        global_batch: bool = False,
        find_unused_parameters: bool | None = None,
    ):
        super().__init__()
        key = criterion.get("key", "GraphKDLoss")
        if key not in CRITERIA:
            raise ValueError(f"criterion's key must be one of {sorted(CRITERIA)}, got {key!r}")
        options = dict(criterion.get("kwargs") or {})
        if global_batch and distributed:
            options["process_group"] = torch.distributed.group.WORLD
        own = device, device_ids, distributed
        self.student_model = wrap_if_distributed(student_model, *own, find_unused_parameters)
        # Its forward call is in the loss, where both networks' features and the labels are at hand.
        self.criterion = wrap_if_distributed(CRITERIA[key](**options), *own)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """The student's output."""
        return self.student_model(*arguments, **options)

    def secondary_forward(self, io_dict: dict[str, dict[str, Any]]) -> None:
        """Hands the criterion over to the step's :class:`GKDLoss`."""
        io_dict[HANDED_OVER] = {"criterion": self.criterion}


class _Stages(nn.Module):
    """Finds stages' outputs in what torchdistill's hooks have recorded in a step."""

    def __init__(self, student_stages: Sequence[str], teacher_stages: Sequence[str]):
        super().__init__()
        for name, stages in (("student_stages", student_stages), ("teacher_stages", teacher_stages)):
            if isinstance(stages, str) or not stages:
                raise ValueError(f"{name} must be a list of module paths, got {stages!r}")
        self.stages = {"student": list(student_stages), "teacher": list(teacher_stages)}

    def features(self, side: str, record: Record) -> list[Tensor]:
        for path in self.stages[side]:
            if "output" not in record.get(path, {}):
                hooked = sorted(name for name in record if name not in (".", HANDED_OVER))
                raise ValueError(
                    f"{side}_stages names {path!r}, whose output is not recorded: list it under {side}: forward_hook: "
                    f"output; recorded are {hooked}"
                )
        return [record[path]["output"] for path in self.stages[side]]


@register_mid_level_loss
class GKDLoss(_Stages):
    """The loss of the criterion that :class:`GKDStudent` holds.

    Args:
        student_stages: paths of the student's stages, ``student_model.NAME``, all in its ``forward_hook: output``.
        teacher_stages: the same of the teacher, ``NAME``.

    Raises:
        ValueError: there is no such wrapper around the student, or a stage's output is not recorded.
    """

    def __init__(self, student_stages: Sequence[str], teacher_stages: Sequence[str]):
        super().__init__(student_stages, teacher_stages)

    def forward(self, student_io_dict: Record, teacher_io_dict: Record, targets: Any = None, *_: Any, **__: Any):
        """The scalar loss of a step."""
        if HANDED_OVER not in student_io_dict:
            raise ValueError(
                "GKDLoss needs the criterion's parameters beside the student's, or they are never trained: give the "
                "student's configuration auxiliary_model_wrapper: {key: GKDStudent, kwargs: {criterion: …}}, and no "
                "wrapper: of its own, since GKDStudent puts its parts into DistributedDataParallel itself"
            )
        criterion = student_io_dict[HANDED_OVER]["criterion"]
        students, teachers = self.features("student", student_io_dict), self.features("teacher", teacher_io_dict)
        if isinstance(getattr(criterion, "module", criterion), GraphKDLoss):
            return criterion(students, teachers, targets)
        if len(students) != 1 or len(teachers) != 1:
            raise ValueError(f"this criterion compares one stage of each network, got {self.stages}")
        return criterion(students[0], teachers[0])


def _register(name: str) -> None:
    class Loss(_Stages):
        def __init__(self, student_stage: str, teacher_stage: str, **options: Any):
            super().__init__([student_stage], [teacher_stage])
            self.criterion = getattr(losses, name)(**options)
            if any(True for _ in self.criterion.parameters()):
                raise ValueError(
                    f"gkd_fast.{name} has parameters with these arguments, which torchdistill would not train: hold it "
                    f"in the auxiliary wrapper GKDStudent, with criterion: {{key: {name}, kwargs: …}}, and use GKDLoss"
                )

        def forward(self, student_io_dict: Record, teacher_io_dict: Record, *_: Any, **__: Any) -> Tensor:
            (student,), (teacher,) = (
                self.features("student", student_io_dict),
                self.features("teacher", teacher_io_dict),
            )
            return self.criterion(student, teacher)

    Loss.__name__ = Loss.__qualname__ = name
    register_mid_level_loss(Loss, key=f"gkd_fast.{name}")


for _name in losses.__all__:
    _register(_name)
