"""What a distiller is made of where it is not given."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gkd_fast._distilled import shown_widths
from gkd_fast._probe import Sample
from gkd_fast.loss import GraphKDLoss
from gkd_fast.modules import PairWeightNetwork

if TYPE_CHECKING:
    from gkd_fast.distiller import MetaSettings


def made_criterion(
    criterion: GraphKDLoss | str | None,
    student: nn.Module,
    teacher: nn.Module | None,
    student_stages: Sequence[str] | None,
    teacher_stages: Sequence[str] | None,
    sample: Sample | None,
    select: Any,
    num_classes: int | None,
    options: dict[str, Any],
) -> GraphKDLoss | None:
    """The criterion; "graph" becomes one for both networks' stages, as the sample shows them."""
    if criterion is not None and not isinstance(criterion, (str, GraphKDLoss)):
        raise TypeError(f"criterion must be a GraphKDLoss, 'graph' or None, got {type(criterion).__name__}")
    if criterion is None or isinstance(criterion, GraphKDLoss):
        if options:
            raise TypeError(f"{', '.join(options)}: options of a criterion that is made here, which this one is not")
        return criterion
    if criterion != "graph":
        raise ValueError(f"criterion must be a GraphKDLoss, 'graph' or None, got {criterion!r}")
    assert teacher is not None
    if sample is None:
        raise ValueError(
            "sample is needed to make the criterion: a batch of inputs, off which the stages' widths are read; or "
            "pass criterion="
        )
    if (student_stages is None) != (teacher_stages is None):
        raise ValueError("student_stages and teacher_stages must be given together, got one of them")
    if student_stages is None or teacher_stages is None:
        widths = [shown_widths(network, sample) for network in (student, teacher)]
        own = next(student.parameters())
        return GraphKDLoss(*widths, num_classes=num_classes, **options).to(own.device, own.dtype)
    return GraphKDLoss.from_models(
        student,
        teacher,
        sample,
        student_stages=student_stages,
        teacher_stages=teacher_stages,
        select=select,
        num_classes=num_classes,
        **options,
    )


def made_weighing(
    meta: "MetaSettings | None", criterion: GraphKDLoss | None, pair_weights: PairWeightNetwork | None
) -> tuple[PairWeightNetwork | None, torch.optim.Optimizer | None]:
    """The meta-network, frozen but for meta-steps, and its optimizer."""
    if meta is None:
        if pair_weights is not None:
            raise ValueError("meta must be given with pair_weights: True or MetaSettings")
        return None, None
    if criterion is None:
        raise ValueError("criterion must be given with meta, whose stage pairs it weighs, got None")
    if pair_weights is None:
        first = next(criterion.parameters())
        students, teachers = criterion.embedding_widths
        if len({*students, *teachers}) > 1:
            raise ValueError(f"meta needs embeddings of one width, got {students} and {teachers}")
        pair_weights = PairWeightNetwork(students[0], len(students), len(teachers), meta.width)
        pair_weights.to(first.device, first.dtype)
    pair_weights.requires_grad_(False)
    optimizer = torch.optim.SGD(
        pair_weights.parameters(),
        lr=meta.lr,
        momentum=meta.momentum,
        nesterov=meta.nesterov,
        weight_decay=meta.weight_decay,
    )
    return pair_weights, optimizer
