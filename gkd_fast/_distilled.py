"""A network as distillation sees it: features of its stages and logits."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gkd_fast._pooling import Select, StagePool, selected
from gkd_fast._probe import Sample, arguments_of
from gkd_fast._snapshot import Snapshot
from gkd_fast.features import StageFeatures


class StageOutputs(NamedTuple):
    """``features``: one per stage; ``logits``: ``[B, classes]`` of each branch, the network's own last."""

    features: list[Tensor]
    logits: list[Tensor]


class Network:
    """Runs a model on a batch.

    Args:
        model: any module.
        stages: module names; None: the model returns ``(features, logits)`` itself.
        pool, select: of the stages, as in :class:`gkd_fast.StageFeatures`.
        logits: which entry of the output they are; None: the output where it is a tensor, else its ``logits``.
        micro_batch: samples at a time, as in :func:`gkd_fast.micro_batched`; None: all.
    """

    def __init__(
        self,
        model: nn.Module,
        stages: Sequence[str] | None,
        pool: StagePool | Sequence[StagePool],
        select: Select | Sequence[Select],
        logits: Select,
        micro_batch: int | None,
    ):
        self.model = model
        self.collect = None if stages is None else StageFeatures(model, stages, pool=pool, select=select)
        self.logits = logits
        self.micro_batch = micro_batch

    def __call__(self, inputs: Sample) -> StageOutputs:
        args, kwargs = arguments_of(inputs)
        if self.micro_batch is None:
            return self._run(*args, **kwargs)
        from gkd_fast.micro_batch import micro_batched  # torch._dynamo takes two seconds to import

        return micro_batched(self._run, *args, micro_batch=self.micro_batch, modules=[self.model], **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> StageOutputs:
        if self.collect is None:
            features, logits = self.model(*args, **kwargs)
            return StageOutputs(list(features), [logits] if isinstance(logits, Tensor) else list(logits))
        output, features = self.collect(*args, **kwargs)
        return StageOutputs(features, [_logits_of(output, self.logits)])


def shown_widths(model: nn.Module, sample: Sample) -> list[int]:
    """The widths of the features ``[B, C]`` that a model returns itself, from a run that leaves no trace in it."""
    surroundings = Snapshot([model])
    try:
        model.eval()
        with torch.no_grad():
            features = Network(model, None, "mean", None, None, None)(sample).features
    finally:
        surroundings.restore()
    for k, x in enumerate(features):
        if x.dim() != 2:
            raise ValueError(f"features[{k}] that the model returns must be [batch, width], got shape {tuple(x.shape)}")
    return [x.shape[1] for x in features]


def _logits_of(output: Any, select: Select) -> Tensor:
    if select is None and not isinstance(output, Tensor):
        named = "logits" in output if isinstance(output, Mapping) else hasattr(output, "logits")
        select = "logits" if named else None
    found = selected(output, select)
    if not isinstance(found, Tensor):
        raise TypeError(f"logits must be a Tensor, got {type(found).__name__}; logits= chooses an entry of the output")
    return found
