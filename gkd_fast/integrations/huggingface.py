"""Hugging Face: a Trainer for :class:`gkd_fast.GraphDistiller`, and models whose hidden states are the stages. ::

    networks = HiddenStates(student, [3, 6]), HiddenStates(teacher, [6, 12])
    distiller = GraphDistiller(*networks, num_classes=10, sample=inputs, meta=True)  # inputs: without labels
    DistillationTrainer(distiller, args=TrainingArguments(...), train_dataset=data).train()

With plain accelerate no adapter is needed: ``distiller, optimizer = accelerator.prepare(distiller, optimizer)``, and
meta-steps on ``accelerator.unwrap_model(distiller)``.
"""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from gkd_fast import GraphDistiller
from gkd_fast.features import Pooling, pool_features

META_OPTIMIZER = "meta_optimizer.pt"
TOKENS = Pooling("nlc", mask="attention_mask")


class HiddenStates(nn.Module):
    """A classifier of transformers as a network that shows its stages: a call gives ``(features, logits)``.

    Args:
        model: with ``hidden_states`` and ``logits`` in its outputs.
        layers: which hidden states are the stages; 0 is what goes into the first layer.

    Hidden states become rows by their mean over positions; that over the tokens that ``attention_mask`` keeps, where it
    is among the inputs.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int]):
        super().__init__()
        if not layers:
            raise ValueError("layers must name at least one hidden state, got none")
        self.model = model
        self.layers = list(layers)

    def forward(self, **inputs: Any) -> tuple[list[Tensor], Tensor]:
        outputs = self.model(**inputs, output_hidden_states=True)
        states, mask = outputs.hidden_states, inputs.get("attention_mask")
        return [TOKENS(states[k], mask) if mask is not None else pool_features(states[k]) for k in self.layers], (
            outputs.logits
        )


class DistillationTrainer(transformers.Trainer):
    """A Trainer whose model is a distiller, on batches that are dicts with ``labels``.

    Its optimizer has the graph convolutions' parameters beside the student's. The terms are logged beside the loss;
    evaluation predicts the student's logits. Checkpoints hold the pair weights and the meta-optimizer's state too.

    Args:
        distiller: what is trained.
        meta_interval: a meta-step follows every so many steps, where the distiller has ``meta``.
        **options: of transformers.Trainer.
    """

    def __init__(self, distiller: GraphDistiller, *, meta_interval: int = 50, **options: Any):
        if meta_interval < 1:
            raise ValueError(f"meta_interval must be at least 1, got {meta_interval}")
        self.distiller = distiller
        self.meta_interval = meta_interval
        self._batch: tuple[dict[str, Any], Tensor] | None = None
        self._terms: dict[str, Tensor] = {}
        super().__init__(distiller, **options)
        self.add_callback(_MetaSteps(self))

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        images = {name: x for name, x in inputs.items() if name != "labels"}
        loss, terms, logits = model(images, inputs["labels"])
        if model.training:
            self._batch, self._terms = (images, inputs["labels"]), terms
        return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs = logs | {name: term.item() for name, term in self._terms.items()}
        super().log(logs, *args, **kwargs)

    def meta_step(self) -> None:
        """A meta-step on the last training batch."""
        assert self._batch is not None
        with self.accelerator.autocast():
            self.distiller.meta_step(*self._batch)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            model = self.distiller.student
            model = model.model if isinstance(model, HiddenStates) else model
            self._signature_columns = [*inspect.signature(model.forward).parameters, "labels", "label", "label_ids"]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.distiller.meta_optimizer is not None and self.args.should_save:
            torch.save(self.distiller.meta_optimizer.state_dict(), Path(output_dir) / META_OPTIMIZER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.distiller.meta_optimizer is not None:
            state = torch.load(Path(checkpoint) / META_OPTIMIZER, weights_only=True, map_location="cpu")
            self.distiller.meta_optimizer.load_state_dict(state)


class _MetaSteps(transformers.TrainerCallback):
    def __init__(self, trainer: DistillationTrainer):
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.distiller.meta is not None and state.global_step % self.trainer.meta_interval == 0:
            self.trainer.meta_step()
