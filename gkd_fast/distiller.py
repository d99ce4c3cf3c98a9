"""The whole method as one module: both networks, the graph terms, logit distillation and the meta-step."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from gkd_fast import distributed
from gkd_fast._arguments import check_factor, check_positive
from gkd_fast._distilled import Network, StageOutputs
from gkd_fast._distiller_parts import made_criterion, made_weighing
from gkd_fast._inputs import Weights, is_sharded
from gkd_fast._label_terms import at_least_float32, label_terms
from gkd_fast._meta_step import meta_gradient
from gkd_fast._pooling import of_side
from gkd_fast._probe import Sample
from gkd_fast._snapshot import Snapshot
from gkd_fast._training import repeats_or_is_undone
from gkd_fast.loss import GraphKDLoss
from gkd_fast.modules import PairWeightNetwork

# Training calls after which pair weights that no meta-step has trained are told of.
CALLS_WITHOUT_META_STEP = 1000
UNTRAINED_WEIGHTS = (
    "in {} training calls meta_step was never called: the pair weights are those of an untrained network; call "
    "meta_step(images, labels) every so many steps (50 in the published recipe), or leave out meta="
)


@dataclass
class MetaSettings:
    """The meta-network that weighs stage pairs, and its optimisation; the published recipe's by default.

    Args:
        width: of its projections.
        graph_steps: unrolled steps on the node and relation terms.
        label_steps: unrolled steps on cross-entropy and logit distillation that follow.
        inner_lr: learning rate of the unrolled steps.
        inner_momentum: of the unrolled steps, starting at zero.
        inner_nesterov: Nesterov momentum in the unrolled steps.
        inner_weight_decay: of the unrolled steps.
        lr: learning rate of the meta-network's SGD.
        momentum: of the meta-network's SGD.
        nesterov: Nesterov momentum of the meta-network's SGD.
        weight_decay: of the meta-network's SGD.
        second_derivatives: exact, or differences: estimated from two gradients per unrolled step.
    """

    width: int = 128
    graph_steps: int = 2
    label_steps: int = 1
    inner_lr: float = 0.05
    inner_momentum: float = 0.9
    inner_nesterov: bool = False
    inner_weight_decay: float = 5e-4
    lr: float = 0.05
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    second_derivatives: Literal["exact", "differences"] = "exact"


class Distilled(NamedTuple):
    """What a call of :class:`GraphDistiller` returns: the scalar ``loss``, its ``terms`` (detached scalars, whose sum
    it is) and the student's ``logits``."""

    loss: Tensor
    terms: dict[str, Tensor]
    logits: Tensor


class GraphDistiller(nn.Module):
    """A student, a frozen teacher and everything that is distilled from one to the other, in one module. ::

        distiller = GraphDistiller(student, teacher, names, teacher_names, num_classes, sample=images, meta=True)
        optimizer = torch.optim.SGD(distiller.parameters(), lr=0.05, momentum=0.9)
        for step, (images, labels) in enumerate(loader):
            loss, terms, logits = distiller(images, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 50 == 0:
                distiller.meta_step(images, labels)

    The loss is the sum of ``cross_entropy``, ``kd`` (KL(teacher ‖ student) of the softened class probabilities times
    ``kd_weight``), the ``extra_losses``, and the ``node``, ``relation`` and ``teacher_graph`` of a
    :class:`gkd_fast.GraphKDLoss`. Wrap the module as it is: by DDP, ``fully_shard``, ``accelerator.prepare`` or
    ``torch.compile``; call :meth:`meta_step` on the module itself (``ddp.module``).

    The teacher is in eval mode and without gradient, whatever the mode of this module. It is no submodule: its
    parameters are neither in ``parameters()`` nor in the ``state_dict``, but it moves with ``.to()``. The pair weights
    are in the ``state_dict``, and require gradient in :meth:`meta_step` alone; the state of ``meta_optimizer`` is the
    caller's to save, as that of any optimizer.

    Args:
        student: a module. Trained, with the graph convolutions, by whoever takes ``parameters()``.
        teacher: a module, put in eval mode and frozen here; None: cross-entropy alone.
        student_stages: module names, as in ``student.named_modules()``. None: the student returns
            ``(features, logits)`` itself, a list of one tensor per stage and its logits, or a list of those of several
            branches, its own last, over which cross-entropy and ``kd`` are means.
        teacher_stages: the same of the teacher.
        num_classes: of the labels.
        sample: an input batch, from which the stages' widths and layouts are read, as in
            :meth:`gkd_fast.GraphKDLoss.from_models`; needed where ``criterion`` is to be made.
        criterion: ``"graph"``: made of ``sample`` and the options; a :class:`gkd_fast.GraphKDLoss`; None: no graph
            terms.
        meta: True or :class:`gkd_fast.distiller.MetaSettings`: a :class:`gkd_fast.PairWeightNetwork` weighs the stage
            pairs, which :meth:`meta_step` trains. None: all weigh 0.5.
        pair_weights: the network that weighs them, where it is not to be made; goes with ``meta``.
        kd_weight: factor of ``kd``, ≥ 0; at 0 the term is left out. 9 keeps the gradient's size at temperature 3.
        temperature: > 0, of the softened class probabilities.
        label_smoothing: of the cross-entropy, in [0, 1].
        extra_losses: further terms by their names: modules that take both networks' lists of features, as
            :mod:`gkd_fast.losses` do those of one stage.
        micro_batch: samples that the networks take at a time, as in :func:`gkd_fast.micro_batched`; None: all.
        select: which entry of a stage's output is meant, as in :class:`gkd_fast.StageFeatures`; a dict of that for
            ``"student"`` and ``"teacher"``.
        logits: which entry of a model's output are its logits, in the same way. None: the output where it is a tensor,
            else its ``logits``.
        **options: of :class:`gkd_fast.GraphKDLoss`: ``graph="none"``, ``embed_dim``, ``pairs``, ``process_group``, …

    Attributes:
        student, teacher, criterion, pair_weights: as given or made.
        meta_optimizer: SGD over the pair weights; None without ``meta``.

    Raises:
        ValueError, TypeError: an argument is missing, or has a wrong shape, type or value.
    """

    teacher: nn.Module | None

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        student_stages: Sequence[str] | None = None,
        teacher_stages: Sequence[str] | None = None,
        num_classes: int | None = None,
        *,
        sample: Sample | None = None,
        criterion: GraphKDLoss | str | None = "graph",
        meta: MetaSettings | bool | None = None,
        pair_weights: PairWeightNetwork | None = None,
        kd_weight: float = 9.0,
        temperature: float = 3.0,
        label_smoothing: float = 0.0,
        extra_losses: Mapping[str, nn.Module] | None = None,
        micro_batch: int | None = None,
        select: Any = None,
        logits: Any = None,
        **options: Any,
    ):
        super().__init__()
        self.kd_weight = check_factor("kd_weight", kd_weight)
        self.temperature = check_positive("temperature", temperature)
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing!r}")
        self.label_smoothing = label_smoothing
        if teacher is None and (criterion is not None or extra_losses):
            raise ValueError("teacher must be a module for a criterion or extra_losses, got None")
        self.student = student
        # No submodule: neither trained, nor saved, nor put in training mode.
        self.__dict__["teacher"] = None if teacher is None else teacher.eval().requires_grad_(False)
        self.criterion = made_criterion(
            criterion, student, teacher, student_stages, teacher_stages, sample, select, num_classes, options
        )
        self.extra_losses = nn.ModuleDict(extra_losses)
        self.meta: MetaSettings | None = (MetaSettings() if meta is True else meta) or None
        self.pair_weights, self.meta_optimizer = made_weighing(self.meta, self.criterion, pair_weights)

        def network(side: str, model: nn.Module, stages: Sequence[str] | None) -> Network:
            pool: Any = "mean" if self.criterion is None else getattr(self.criterion, f"{side}_pool")
            entries = of_side("select", select, side), of_side("logits", logits, side)
            return Network(model, stages, pool, *entries, micro_batch)

        self._student_network = network("student", student, student_stages)
        self._teacher_network = None if teacher is None else network("teacher", teacher, teacher_stages)
        self._training_calls = self._meta_steps = 0

    def forward(self, images: Sample, labels: Tensor, *, weights: Weights = None) -> Distilled:
        """The loss of a batch.

        Args:
            images: what both networks take: a tensor, a sequence of arguments or a mapping of keyword arguments.
            labels: ``[B]`` integers, or ``[B, num_classes]`` probabilities.
            weights: in the place of the pair weights, as :class:`gkd_fast.GraphKDLoss` takes them.

        Returns:
            ``(loss, terms, logits)``, see :class:`Distilled`.
        """
        terms, logits = self.terms(images, labels, weights=weights)
        loss = torch.stack(list(terms.values())).sum()
        if self.criterion is not None:
            self.criterion._count_training_call(loss, self.pair_weights)
        if self.training and not torch.compiler.is_compiling() and not repeats_or_is_undone():
            self._training_calls += 1
            if self._training_calls == CALLS_WITHOUT_META_STEP and self.meta is not None and not self._meta_steps:
                warnings.warn(UNTRAINED_WEIGHTS.format(self._training_calls), UserWarning, stacklevel=2)
        return Distilled(loss, {name: term.detach() for name, term in terms.items()}, logits)

    def terms(self, images: Sample, labels: Tensor, *, weights: Weights = None) -> tuple[dict[str, Tensor], Tensor]:
        """The terms of the loss, with gradient, and the student's logits; arguments as in a call."""
        teacher = self.teacher_outputs(images)
        student = self.student_outputs(images)
        terms = self.label_terms(student, teacher, labels)
        if teacher is not None:
            terms |= {name: loss(student.features, teacher.features) for name, loss in self.extra_losses.items()}
            if self.criterion is not None:
                embeddings = self.criterion.embed(student.features, teacher.features)
                chosen = self.pair_weights if weights is None else weights
                terms |= self.criterion.terms_from_embeddings(*embeddings, labels, weights=chosen)
                if self.training and self.criterion.bank is not None:
                    self.criterion.remember(*embeddings)
        return terms, student.logits[-1]

    def meta_step(
        self, images: Sample, labels: Tensor, outer_batch: tuple[Sample, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """One step of ``meta_optimizer`` on the gradient through unrolled steps of the student, which are then undone.

        It follows autocast around it but for float16, whose second derivatives would need a loss scale of their own:
        then it runs without. Where ``torch.distributed`` is initialised all ranks call it together, and take the same
        step.

        Args:
            images, labels: of the unrolled steps, as in a call.
            outer_batch: images and labels of the outer loss; those of the unrolled steps by default.

        Returns:
            ``meta_gradient_norm``, a scalar.

        Raises:
            ValueError: there is no ``meta``.
            NotImplementedError: the parameters are sharded.
        """
        gradients = self.hypergradient(images, labels, outer_batch)
        assert self.pair_weights is not None and self.meta_optimizer is not None
        for parameter, gradient in zip(self.pair_weights.parameters(), gradients):
            parameter.grad = gradient
        self.meta_optimizer.step()
        self.meta_optimizer.zero_grad()
        self._meta_steps += 1
        return {"meta_gradient_norm": torch.stack([g.norm() for g in gradients]).norm()}

    def hypergradient(
        self, images: Sample, labels: Tensor, outer_batch: tuple[Sample, Tensor] | None = None
    ) -> list[Tensor]:
        """Gradient of the outer loss at the pair weights' parameters, as in :meth:`meta_step`; changes nothing."""
        if self.meta is None or self.criterion is None or self.pair_weights is None:
            raise ValueError("meta must be True or MetaSettings for a meta-step, got None")
        if any(is_sharded(p) for p in self.parameters()):
            raise NotImplementedError(
                "meta_step needs whole parameters, got sharded ones: unrolled steps go with DDP, not with fully_shard"
            )
        with self._undone():
            return meta_gradient(self, images, labels, outer_batch)

    @contextlib.contextmanager
    def weights_with_gradient(self) -> Iterator[None]:
        """Within the block the pair weights' parameters require gradient, as in a meta-step."""
        if self.pair_weights is None:
            yield
            return
        self.pair_weights.requires_grad_(True)
        try:
            yield
        finally:
            self.pair_weights.requires_grad_(False)

    def gradient_shares(self, images: Sample, labels: Tensor, *, weights: Weights = None) -> dict[str, float]:
        """Norm of each term's gradient at the student's parameters over the sum of these norms; changes nothing."""
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        group = None if self.criterion is None else self.criterion.process_group
        norms = {}
        with self._undone():
            for name, term in self.terms(images, labels, weights=weights)[0].items():
                found = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
                gradients = [g for g in found if g is not None]
                if group is not None:
                    gradients = distributed.average(gradients, group)
                norms[name] = torch.stack([g.norm() for g in gradients]).norm().item() if gradients else 0.0
        total = sum(norms.values())
        return {name: norm / total for name, norm in norms.items()} if total else norms

    @torch.no_grad()
    def diagnostics(self, images: Sample, *, weights: Weights = None) -> dict[str, float | list[float]]:
        """What :meth:`gkd_fast.GraphKDLoss.diagnostics` says of a batch's graphs; changes nothing.

        Raises:
            ValueError: there is no criterion.
        """
        teacher = self.teacher_outputs(images)
        if self.criterion is None or teacher is None:
            raise ValueError("criterion must be a GraphKDLoss for diagnostics, got None")
        chosen = self.pair_weights if weights is None else weights
        with self._undone():
            features = self.student_outputs(images).features
            return self.criterion.diagnostics(features, teacher.features, weights=chosen)

    def student_outputs(self, images: Sample) -> StageOutputs:
        """The student's features and logits, of micro-batches where they are wanted."""
        return self._student_network(images)

    @torch.no_grad()
    def teacher_outputs(self, images: Sample) -> StageOutputs | None:
        """The teacher's; None where there is none."""
        return None if self._teacher_network is None else self._teacher_network(images)

    def label_terms(self, student: StageOutputs, teacher: StageOutputs | None, labels: Tensor) -> dict[str, Tensor]:
        """Cross-entropy and, where there is a teacher, logit distillation; both means over the student's branches."""
        return label_terms(student, teacher, labels, self.kd_weight, self.temperature, self.label_smoothing)

    def weights_of(self, embeddings: tuple[list[Tensor], list[Tensor]]) -> Tensor:
        """The pair weights of both sides' embeddings, float32 at least and, in :meth:`weights_with_gradient`, with
        gradient."""
        assert self.pair_weights is not None
        students, teachers = ([at_least_float32(x) for x in side] for side in embeddings)
        return self.pair_weights(students, teachers)

    @contextlib.contextmanager
    def _undone(self) -> Iterator[None]:
        """Training mode within the block; buffers, modes and random state are put back after it."""
        surroundings = Snapshot([self])
        if not self.training:  # else single modules may be in eval mode on purpose
            self.train()
        try:
            yield
        finally:
            surroundings.restore()

    def _apply(self, fn: Any, recurse: bool = True) -> "GraphDistiller":
        super()._apply(fn, recurse)
        if self.teacher is not None and recurse:
            self.teacher._apply(fn)
        return self
