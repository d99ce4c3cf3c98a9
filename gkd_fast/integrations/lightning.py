"""Lightning: a module around :class:`gkd_fast.GraphDistiller`. ::

module = DistillationModule(GraphDistiller(student, teacher, ..., meta=True), lambda p: torch.optim.AdamW(p))
lightning.Trainer(max_epochs=10).fit(module, loader)
"""

from collections.abc import Callable, Iterable
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from gkd_fast import GraphDistiller


class DistillationModule(lightning.LightningModule):
    """Trains a distiller on batches ``(images, labels)``, and its pair weights by meta-steps.

    The loss, its terms and the accuracy on validation batches are logged (``train/loss``, ``train/node``, …,
    ``validation/accuracy``), and once an epoch the graphs' diagnostics. A checkpoint holds the student, the graph
    convolutions, the pair weights and the meta-optimizer's state; the teacher is not in it.

    Args:
        distiller: what is trained.
        optimizer: makes, of the parameters, what :meth:`configure_optimizers` returns. None: SGD as in the published
            recipe.
        meta_interval: a meta-step follows each training batch whose index is a multiple of it, where the distiller has
            ``meta``.
    """

    def __init__(
        self,
        distiller: GraphDistiller,
        optimizer: Callable[[Iterable[nn.Parameter]], Any] | None = None,
        meta_interval: int = 50,
    ):
        super().__init__()
        if meta_interval < 1:
            raise ValueError(f"meta_interval must be at least 1, got {meta_interval}")
        self.distiller = distiller
        self.make_optimizer = optimizer or _published_optimizer
        self.meta_interval = meta_interval

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(p for p in self.parameters() if p.requires_grad)

    def training_step(self, batch: tuple[Any, Tensor], batch_index: int) -> Tensor:
        images, labels = batch
        if batch_index == 0 and self.distiller.criterion is not None:
            report = self.distiller.diagnostics(images)
            scalars = {f"diagnostics/{name}": x for name, x in report.items() if isinstance(x, float)}
            for name, values in report.items():
                if isinstance(values, list):
                    scalars |= {f"diagnostics/{name}/{k}": x for k, x in enumerate(values)}
            self.log_dict(scalars, batch_size=len(labels))
        loss, terms, _ = self.distiller(images, labels)
        self.log_dict(
            {f"train/{name}": x for name, x in {"loss": loss.detach(), **terms}.items()}, batch_size=len(labels)
        )
        return loss

    def on_train_batch_end(self, outputs: Any, batch: tuple[Any, Tensor], batch_index: int) -> None:
        if self.distiller.meta is not None and batch_index % self.meta_interval == 0:
            with self.trainer.precision_plugin.forward_context():
                found = self.distiller.meta_step(*batch)
            self.log_dict({f"train/{name}": x for name, x in found.items()}, batch_size=len(batch[1]))

    def validation_step(self, batch: tuple[Any, Tensor], batch_index: int) -> None:
        images, labels = batch
        correct = self.distiller.student_outputs(images).logits[-1].argmax(dim=1) == labels
        self.log("validation/accuracy", correct.float().mean(), batch_size=len(labels), sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.distiller.meta_optimizer is not None:
            checkpoint["meta_optimizer"] = self.distiller.meta_optimizer.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.distiller.meta_optimizer is not None:
            self.distiller.meta_optimizer.load_state_dict(checkpoint["meta_optimizer"])


def _published_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
