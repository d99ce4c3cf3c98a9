"""One iteration: a step of the optimizer on a distiller's loss, and its meta-step, where and in what precision the run
has them."""

import contextlib

import torch
from torch import Tensor, nn

from gkd_fast import GraphDistiller
from gkd_fast.train.graphs import CapturedStep
from gkd_fast.train.methods import PermutedWeights, batch_permutation


class Distiller:
    """Trains a student, by :meth:`train_step` on every batch and :meth:`meta_step` on some.

    Args:
        module: the networks and what is distilled.
        optimizer: over the module's parameters.
        interval: a meta-step is due after each training step whose batch index is a multiple of it.
        permuted: deals each batch's pair weights out to its samples in another order.
        seed: of the permutation.
        accelerator: places the module on devices, wraps it for several processes and scales gradients; without one,
            everything runs where and as it is.
        cuda_graphs: forward and backward pass of a step in a CUDA graph, see :mod:`gkd_fast.train.graphs`.

    Attributes:
        module: the plain one, its ``student``, ``teacher``, ``criterion``, ``pair_weights`` and ``meta_optimizer``.
        step: training steps so far.
    """

    def __init__(
        self,
        module: GraphDistiller,
        optimizer: torch.optim.Optimizer,
        *,
        interval: int = 50,
        permuted: bool = False,
        seed: int = 0,
        accelerator=None,
        cuda_graphs: bool = False,
    ):
        self.module = module
        self.optimizer = optimizer
        self.interval = interval
        self.permuted = permuted
        self.seed = seed
        self.step = 0
        self.accelerator = accelerator
        self._wrapped: nn.Module = module
        if accelerator is not None:
            self._wrapped, self.optimizer = accelerator.prepare(module, optimizer)
        self._pass = CapturedStep(self._forward_and_backward, module) if cuda_graphs else self._forward_and_backward

    student = property(lambda self: self.module.student)
    teacher = property(lambda self: self.module.teacher)
    criterion = property(lambda self: self.module.criterion)
    pair_weights = property(lambda self: self.module.pair_weights)
    meta_optimizer = property(lambda self: self.module.meta_optimizer)

    def train_step(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """One step of the optimizer on the whole objective.

        Args:
            images: ``[B, C, H, W]``.
            labels: ``[B]``.

        Returns:
            The terms before the step, detached scalars; the objective is their sum.
        """
        self._wrapped.train()
        terms = self._pass(images, labels)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return terms

    def _forward_and_backward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        loss, terms, _ = self._wrapped(images, labels, weights=self._weights(len(images), images.device))
        if self.accelerator is None:
            loss.backward()
        else:
            self.accelerator.backward(loss)
        return terms

    def meta_due(self, batch_index: int) -> bool:
        """Whether a meta-step follows the training step on the batch of this index within the epoch."""
        return self.pair_weights is not None and batch_index % self.interval == 0

    def meta_step(
        self, images: Tensor, labels: Tensor, outer_batch: tuple[Tensor, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """:meth:`gkd_fast.GraphDistiller.meta_step` in the run's precision."""
        with self._autocast():
            return self.module.meta_step(images, labels, outer_batch)

    def gradient_shares(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """:meth:`gkd_fast.GraphDistiller.gradient_shares` in training mode and the run's precision."""
        self._wrapped.train()
        with self._autocast():
            weights = self._weights(len(images), images.device)
            return self.module.gradient_shares(images, labels, weights=weights)

    def diagnostics(self, images: Tensor) -> dict[str, float | list[float]]:
        """:meth:`gkd_fast.GraphDistiller.diagnostics` likewise."""
        self._wrapped.train()
        with self._autocast():
            return self.module.diagnostics(images, weights=self._weights(len(images), images.device))

    def _weights(self, batch: int, device: torch.device) -> nn.Module | None:
        """What stands in the place of the pair weights."""
        if not self.permuted:
            return None
        return PermutedWeights(self.pair_weights, batch_permutation(batch, self.seed, self.step, device))

    def _autocast(self):
        return contextlib.nullcontext() if self.accelerator is None else self.accelerator.autocast()
