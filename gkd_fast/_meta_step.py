"""The gradient that a distiller's meta-step takes, through unrolled steps which are then undone."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gkd_fast._distilled import StageOutputs
from gkd_fast._probe import Sample
from gkd_fast.meta import UnrolledSGD

if TYPE_CHECKING:
    from gkd_fast.distiller import GraphDistiller


def meta_gradient(
    distiller: "GraphDistiller", images: Sample, labels: Tensor, outer_batch: tuple[Sample, Tensor] | None
) -> list[Tensor]:
    """Gradient of the outer loss at the pair weights' parameters; what else it changes is for the caller to undo."""
    settings, criterion, pair_weights = distiller.meta, distiller.criterion, distiller.pair_weights
    assert settings is not None and criterion is not None and pair_weights is not None
    with _autocast_as_around(labels.device) as autocast:
        with autocast():
            teacher = distiller.teacher_outputs(images)
            outer_teacher = teacher if outer_batch is None else distiller.teacher_outputs(outer_batch[0])
        outer_images, outer_labels = outer_batch or (images, labels)

        def graph_objective() -> Tensor:
            return _graph_objective(distiller, images, labels, teacher, autocast)

        def label_objective(images: Sample, labels: Tensor, teacher: StageOutputs | None) -> Tensor:
            with autocast():
                terms = distiller.label_terms(distiller.student_outputs(images), teacher, labels)
                return torch.stack(list(terms.values())).sum()

        unrolled = UnrolledSGD(
            _unrolled_parameters(distiller),
            [distiller.student, criterion],
            lr=settings.inner_lr,
            momentum=settings.inner_momentum,
            weight_decay=settings.inner_weight_decay,
            nesterov=settings.inner_nesterov,
            second_derivatives=settings.second_derivatives,
            process_group=_process_group(distiller),
        )
        with distiller.weights_with_gradient(), unrolled:
            for _ in range(settings.graph_steps):
                unrolled.step(graph_objective)
            for _ in range(settings.label_steps):
                unrolled.step(lambda: label_objective(images, labels, teacher))
            return unrolled.hypergradient(
                lambda: label_objective(outer_images, outer_labels, outer_teacher), pair_weights.parameters()
            )


def _graph_objective(
    distiller: "GraphDistiller", images: Sample, labels: Tensor, teacher: StageOutputs | None, autocast: Any
) -> Tensor:
    """Node and relation terms, with gradient through the weights too, which are float32 as in a training step."""
    criterion = distiller.criterion
    assert criterion is not None and teacher is not None
    with autocast():
        embeddings = criterion.embed(distiller.student_outputs(images).features, teacher.features)
    weights = distiller.weights_of(embeddings)
    with autocast():
        terms = criterion.terms_from_embeddings(*embeddings, labels, weights=weights)
        return torch.stack([terms[name] for name in ("node", "relation") if name in terms]).sum()


def _unrolled_parameters(distiller: "GraphDistiller") -> list[nn.Parameter]:
    """What the unrolled steps move: the student and both sides' graph convolutions, not the classifier."""
    assert distiller.criterion is not None
    graph = [p for g in distiller.criterion.param_groups() if g["name"] != "classifier" for p in g["params"]]
    return [p for p in (*distiller.student.parameters(), *graph) if p.requires_grad]


def _process_group(distiller: "GraphDistiller") -> Any:
    """The ranks over whose mean the meta-step goes: the criterion's, else all, whose gradients DDP averages."""
    assert distiller.criterion is not None
    if distiller.criterion.process_group is not None:
        return distiller.criterion.process_group
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.group.WORLD if several and torch.distributed.get_world_size() > 1 else None


@contextlib.contextmanager
def _autocast_as_around(device: torch.device) -> Iterator[Any]:
    """No autocast within the block, and a context that is as it was around it, but for float16."""
    kind = device.type
    dtype = torch.get_autocast_dtype(kind)
    enabled = torch.is_autocast_enabled(kind) and dtype != torch.float16
    with torch.autocast(kind, enabled=False):
        yield lambda: torch.autocast(kind, dtype=dtype, enabled=enabled)
