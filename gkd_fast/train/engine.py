"""One iteration of the method: the training step and the meta-step."""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkd_fast import GraphKDLoss, PairWeightNetwork, UnrolledSGD, distributed, micro_batched
from gkd_fast._snapshot import Snapshot
from gkd_fast.train.config import DistillationConfig, MetaConfig
from gkd_fast.train.methods import METHODS, Method, PermutedWeights, batch_permutation


class Objective(nn.Module):
    """The terms of the training objective, and what is trained on them: the student and the criterion.

    One module, so that a wrapper for several processes sees every parameter that gets a gradient.
    """

    def __init__(
        self,
        student: nn.Module,
        criterion: GraphKDLoss | None,
        method: Method,
        distillation: DistillationConfig,
        micro_batch: int | None = None,
        relations: nn.Module | None = None,
    ):
        super().__init__()
        self.student = student
        self.criterion = criterion
        self.method = method
        self.distillation = distillation
        self.micro_batch = micro_batch
        self.relations = relations

    def forward(
        self, images: Tensor, labels: Tensor, teacher_outputs=None, pair_weights: nn.Module | None = None
    ) -> dict[str, Tensor]:
        outputs = self.student_outputs(images)
        terms = self.label_terms(outputs, teacher_outputs, labels)
        if self.relations is not None:
            terms["relations"] = self.relations(outputs.features, teacher_outputs.features)
        if self.method.graph:
            embeddings = self.criterion.embed(outputs.features, teacher_outputs.features)
            terms |= self.criterion.terms_from_embeddings(*embeddings, labels, weights=pair_weights)
            if self.training and self.criterion.bank is not None:
                self.criterion.remember(*embeddings)
        return terms

    def student_outputs(self, images: Tensor):
        """The student's StageOutputs, of micro-batches where they are wanted."""
        return micro_batched(self.student, images, micro_batch=self.micro_batch)

    def label_terms(self, outputs, teacher_outputs, labels: Tensor) -> dict[str, Tensor]:
        """Cross-entropy and, where the method has it, logit distillation; both averaged over the student's branches."""
        student_logits = [_at_least_float32(x) for x in outputs.logits]
        terms = {"cross_entropy": torch.stack([F.cross_entropy(x, labels) for x in student_logits]).mean()}
        if self.method.kd:
            terms["kd"] = self.distillation.kd_weight * self._logit_distillation(student_logits, teacher_outputs.logits)
        return terms

    def _logit_distillation(self, student_logits: list[Tensor], teacher_logits: list[Tensor]) -> Tensor:
        """KL(teacher ‖ student) at the temperature: branch to branch, or every branch to the teacher's own logits."""
        if len(teacher_logits) != len(student_logits):
            teacher_logits = [teacher_logits[-1]] * len(student_logits)
        temperature = self.distillation.temperature
        return torch.stack(
            [
                F.kl_div(
                    F.log_softmax(s / temperature, dim=1),
                    F.log_softmax(_at_least_float32(t) / temperature, dim=1),
                    reduction="batchmean",
                    log_target=True,
                )
                for s, t in zip(student_logits, teacher_logits)
            ]
        ).mean()


class Distiller:
    """Trains a student, by :meth:`train_step` on every batch and :meth:`meta_step` on some.

    Args:
        student: a network that returns StageOutputs.
        teacher: the same, frozen here; None for methods that need none.
        criterion: the graph terms; None for methods without.
        pair_weights: the meta-network; None where the weights are constant.
        optimizer: over the student's and the criterion's parameters.
        meta_optimizer: over the meta-network's; None where there is none.
        method: which terms there are.
        distillation: constants of the logit distillation.
        meta: constants of the meta-step.
        seed: of the permutation of weights, for the method that permutes them.
        micro_batch: images that the networks take at a time, as in gkd_fast.micro_batched; None: the whole batch.
        relations: the loss over relations; None for methods without.
        accelerator: places modules on devices, wraps them for several processes and scales gradients; without one,
            everything runs where and as it is.

    Attributes:
        step: training steps so far.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        criterion: GraphKDLoss | None,
        pair_weights: PairWeightNetwork | None,
        optimizer: torch.optim.Optimizer,
        meta_optimizer: torch.optim.Optimizer | None,
        *,
        method: Method = METHODS["gkd"],
        distillation: DistillationConfig = DistillationConfig(),
        meta: MetaConfig = MetaConfig(),
        seed: int = 0,
        micro_batch: int | None = None,
        relations: nn.Module | None = None,
        accelerator=None,
    ):
        self.student = student
        self.teacher = teacher
        self.criterion = criterion
        self.pair_weights = pair_weights
        self.optimizer = optimizer
        self.meta_optimizer = meta_optimizer
        self.method = method
        self.meta = meta
        self.seed = seed
        self.micro_batch = micro_batch
        self.step = 0
        self.accelerator = accelerator
        self.plain_objective = Objective(student, criterion, method, distillation, micro_batch, relations)
        self.objective: nn.Module = self.plain_objective
        if teacher is not None:
            teacher.eval().requires_grad_(False)
        if accelerator is not None:
            for module in (teacher, pair_weights):
                if module is not None:
                    module.to(accelerator.device)
            self.objective, self.optimizer = accelerator.prepare(self.objective, optimizer)

    def train_step(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """One step of the optimizer on the whole objective.

        Args:
            images: ``[B, C, H, W]``.
            labels: ``[B]``.

        Returns:
            The terms before the step, detached scalars; the objective is their sum.
        """
        self.objective.train()
        with self._autocast():
            teacher_outputs = self.teacher_outputs(images)
        terms = self.objective(images, labels, teacher_outputs, self._training_weights(len(images), images.device))
        loss = torch.stack(list(terms.values())).sum()
        if self.accelerator is None:
            loss.backward()
        else:
            self.accelerator.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return {name: term.detach() for name, term in terms.items()}

    def meta_due(self, batch_index: int) -> bool:
        """Whether a meta-step follows the training step on the batch of this index within the epoch."""
        return self.pair_weights is not None and batch_index % self.meta.interval == 0

    def meta_step(
        self, images: Tensor, labels: Tensor, outer_batch: tuple[Tensor, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """One step of the meta-network on the gradient through unrolled steps of the student, which are then undone.

        It follows the training's precision but for float16, whose second derivatives would need a loss scale of their
        own: then it runs without autocast. With several processes the steps are unrolled on the whole batch.

        Args:
            images: ``[B, C, H, W]``, of the unrolled steps.
            labels: ``[B]``.
            outer_batch: images and labels of the outer loss; those of the unrolled steps by default.

        Returns:
            ``meta_gradient_norm``, a scalar.
        """
        gradients = self.hypergradient(images, labels, outer_batch)
        for parameter, gradient in zip(self.pair_weights.parameters(), gradients):
            parameter.grad = gradient
        self.meta_optimizer.step()
        self.meta_optimizer.zero_grad()
        return {"meta_gradient_norm": torch.stack([g.norm() for g in gradients]).norm()}

    def hypergradient(
        self, images: Tensor, labels: Tensor, outer_batch: tuple[Tensor, Tensor] | None = None
    ) -> list[Tensor]:
        """Gradient of the outer loss at the meta-network's parameters, as in :meth:`meta_step`; changes nothing."""
        self.objective.train()
        with self._meta_autocast():
            teacher_outputs = self.teacher_outputs(images)
            outer_outputs = teacher_outputs if outer_batch is None else self.teacher_outputs(outer_batch[0])
        outer_images, outer_labels = outer_batch or (images, labels)
        with UnrolledSGD(
            self.unrolled_parameters(),
            [self.student, self.criterion],
            lr=self.meta.inner_lr,
            momentum=self.meta.inner_momentum,
            weight_decay=self.meta.inner_weight_decay,
            nesterov=self.meta.inner_nesterov,
            second_derivatives=self.meta.second_derivatives,
            process_group=self.criterion.process_group,
        ) as unrolled:
            for _ in range(self.meta.graph_steps):
                unrolled.step(lambda: self._graph_objective(images, labels, teacher_outputs))
            for _ in range(self.meta.label_steps):
                unrolled.step(lambda: self._label_objective(images, labels, teacher_outputs))
            return unrolled.hypergradient(
                lambda: self._label_objective(outer_images, outer_labels, outer_outputs),
                self.pair_weights.parameters(),
            )

    def gradient_shares(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Norm of each term's gradient at the student's parameters over the sum of these norms; changes nothing."""
        self.objective.train()
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        surroundings = Snapshot([self.plain_objective])
        with self._autocast():
            teacher_outputs = self.teacher_outputs(images)
        weights = self._training_weights(len(images), images.device)
        norms = {}
        for name, term in self.plain_objective(images, labels, teacher_outputs, weights).items():
            gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
            gradients = [g for g in gradients if g is not None]
            if self.criterion is not None and self.criterion.process_group is not None:
                gradients = distributed.average(gradients, self.criterion.process_group)
            norms[name] = torch.stack([g.norm() for g in gradients]).norm().item() if gradients else 0.0
        surroundings.restore()
        total = sum(norms.values())
        return {name: norm / total for name, norm in norms.items()} if total else norms

    @torch.no_grad()
    def diagnostics(self, images: Tensor) -> dict[str, float | list[float]]:
        """What the criterion says of a batch's graphs; changes nothing."""
        self.objective.train()
        surroundings = Snapshot([self.plain_objective])
        with self._autocast():
            features = (
                x.features for x in (self.plain_objective.student_outputs(images), self.teacher_outputs(images))
            )
            weights = self._training_weights(len(images), images.device)
            report = self.criterion.diagnostics(*features, weights=weights)
        surroundings.restore()
        return report

    def unrolled_parameters(self) -> list[nn.Parameter]:
        """What the unrolled steps move: the student and both sides' graph convolutions, not the classifier."""
        graph = [p for g in self.criterion.param_groups() if g["name"] != "classifier" for p in g["params"]]
        return [p for p in (*self.student.parameters(), *graph) if p.requires_grad]

    @torch.no_grad()
    def teacher_outputs(self, images: Tensor):
        """The teacher's StageOutputs, or None where the method has no teacher."""
        return None if self.teacher is None else micro_batched(self.teacher, images, micro_batch=self.micro_batch)

    def _graph_objective(self, images: Tensor, labels: Tensor, teacher_outputs) -> Tensor:
        """Node and relation terms, with gradient through the weights too, which are float32 as in a training step."""
        with self._meta_autocast():
            embeddings = self.criterion.embed(
                self.plain_objective.student_outputs(images).features, teacher_outputs.features
            )
        weights = self.pair_weights_of(embeddings)
        with self._meta_autocast():
            terms = self.criterion.terms_from_embeddings(*embeddings, labels, weights=weights)
            return torch.stack([terms[name] for name in ("node", "relation") if name in terms]).sum()

    def pair_weights_of(self, embeddings) -> Tensor:
        """The meta-network's weights of both sides' embeddings, with gradient."""
        return self.pair_weights(*([_at_least_float32(x) for x in side] for side in embeddings))

    def _label_objective(self, images: Tensor, labels: Tensor, teacher_outputs) -> Tensor:
        with self._meta_autocast():
            outputs = self.plain_objective.student_outputs(images)
            terms = self.plain_objective.label_terms(outputs, teacher_outputs, labels)
            return torch.stack(list(terms.values())).sum()

    def _training_weights(self, batch: int, device: torch.device) -> nn.Module | None:
        if self.method.weights == "permuted":
            return PermutedWeights(self.pair_weights, batch_permutation(batch, self.seed, self.step, device))
        return self.pair_weights

    def _autocast(self):
        return contextlib.nullcontext() if self.accelerator is None else self.accelerator.autocast()

    def _meta_autocast(self):
        scaled = self.accelerator is not None and self.accelerator.mixed_precision == "fp16"
        return contextlib.nullcontext() if scaled else self._autocast()


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
