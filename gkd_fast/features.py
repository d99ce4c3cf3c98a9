"""Stage features of any network: collected by module name, pooled to one row per sample.

What comes out of a stage is laid out in many ways. :func:`pool_features` lists the names by which ``pool=`` calls them;
:class:`StageFeatures` and :class:`gkd_fast.GraphKDLoss` take one for all stages or a list with one for each, and the
loss a dict ``{"student": …, "teacher": …}`` of these.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gkd_fast._pooling import (
    Pool,
    Pooling,
    Select,
    StagePool,
    per_stage,
    pool_features,
    resolved,
    selected,
    stage_pools,
    usual_mean,
)

__all__ = ["Pool", "Pooling", "Select", "StageFeatures", "StagePool", "pool_features"]


class StageFeatures:
    """Runs a model and collects the outputs of its stages, by module name. ::

        stages = StageFeatures(model, ["layer1", "layer2", "layer3"])
        output, features = stages(images)  # features: one [B, C] per stage

    The features are pooled on the spot, so activations that later run in place do not reach them. A module that runs
    several times, or is listed under several names, gives its last outputs, in order. Names are looked up inside DDP,
    DataParallel and ``torch.compile`` wrappers. Recomputation by activation checkpointing collects nothing twice;
    a stage within a *reentrant* checkpoint has no gradient and is refused.

    A stage must give one row for each sample of the model's tensor arguments, and rows of one width in every call: a
    layout that ``pool`` mistakes for another is an error where one of these tells.
    :meth:`gkd_fast.GraphKDLoss.from_models` finds out layouts; its ``student_pool`` and ``teacher_pool`` go here.

    Args:
        model: any module; its parameters, mode and outputs are left alone.
        stages: module names as in ``model.named_modules()``.
        pool: as in :func:`pool_features`, one or a list with one for each stage; None gives a copy of the whole output.
        select: which entry of a stage's output is meant, where that is a tuple, list, dict or object: its index, key or
            name, or a callable that takes the output; one or a list with one for each stage.

    Raises:
        ValueError: no stage, a name that the model does not have, or replicas of DataParallel on several devices.
    """

    def __init__(
        self,
        model: nn.Module,
        stages: Sequence[str],
        pool: StagePool | Sequence[StagePool] | None = "mean",
        select: Select | Sequence[Select] = None,
    ):
        if isinstance(stages, str) or not stages:
            raise ValueError(f"stages must be a list of module names, got {stages!r}")
        self.model = model
        self.stages = list(stages)
        self.pool = pool
        self._pools = None if pool is None else [resolved(p) for p in stage_pools(pool, len(self.stages))]
        self._select = per_stage("select", select, len(self.stages))
        self._outputs: dict[nn.Module, list[dict[int, Tensor]]] | None = None
        self._arguments: dict[str, Any] = {}
        self._batch_sizes: set[int] = set()
        self._widths: dict[int, int] = {}
        _refuse_replicas(model)
        modules = dict(_unwrap(model).named_modules(remove_duplicate=False))
        unknown = [name for name in self.stages if name not in modules]
        if unknown:
            known = ", ".join(name for name in modules if name)
            raise ValueError(f"stages {unknown} are no modules of the model, which has: {known}")
        self._modules = [modules[name] for name in self.stages]
        self._handles = [module.register_forward_hook(self._collect) for module in dict.fromkeys(self._modules)]

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Tensor]]:
        """The model's output and the list of stage features.

        Raises:
            RuntimeError: a stage did not run, or ran within a reentrant checkpoint.
            TypeError: what is selected of a stage's output is not a Tensor.
            ValueError: a stage's features are not one row per sample, or of another width than before.
        """
        self._outputs = {module: [] for module in self._modules}
        self._wants_gradient = torch.is_grad_enabled()
        self._arguments = kwargs
        self._batch_sizes = {x.shape[0] for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim()}
        try:
            output = self.model(*args, **kwargs)
            return output, self._in_order(self._outputs)
        finally:
            self._outputs = None
            self._arguments = {}

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def _collect(self, module: nn.Module, args: tuple, output: object) -> None:
        if self._outputs is None:
            return
        places = [k for k, m in enumerate(self._modules) if m is module]
        if self._wants_gradient and not torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
            raise RuntimeError(
                f"stage {self.stages[places[0]]!r} runs without gradient; if checkpointed, it needs use_reentrant=False"
            )
        self._outputs[module].append({k: self._features(k, output) for k in places})

    def _features(self, k: int, output: object) -> Tensor:
        """What is collected of a stage's output."""
        name = self.stages[k]
        try:
            x = selected(output, self._select[k])
            if not isinstance(x, Tensor):
                advice = "; select= chooses one of its entries" if isinstance(x, (tuple, list, Mapping)) else ""
                raise TypeError(f"stage {name!r} must return a Tensor, got {type(x).__name__}{advice}")
            if self._pools is None:
                return x.clone()
            pool = self._pools[k]
            pooled = pool_features(x, pool, self._mask(pool))
        except ValueError as error:
            raise ValueError(f"stage {name!r}: {error}") from None
        self._check_rows(name, pool, pooled, x)
        self._check_width(k, pool, pooled, x)
        is_mean = x.dim() > 2 and (pool is usual_mean or (isinstance(pool, Pooling) and pool.token is None))
        # A view would follow in-place changes of the output; a mean has memory of its own.
        return pooled if is_mean else pooled.clone()

    def _mask(self, pool: object) -> Tensor | None:
        """The mask that a pooling takes from the model's arguments."""
        if not isinstance(pool, Pooling) or pool.mask is None:
            return None
        mask = self._arguments.get(pool.mask)
        if not isinstance(mask, Tensor):
            raise ValueError(f"its pooling needs the model's keyword argument {pool.mask!r}, a Tensor, got {mask!r}")
        return mask

    def _check_rows(self, name: str, pool: object, pooled: Tensor, x: Tensor) -> None:
        """ValueError unless there is a row for each sample; a layout that puts them elsewhere is taken at its word."""
        if isinstance(pool, Pooling) and pool.layout[0] != "n":
            return
        if self._batch_sizes and pooled.shape[0] not in self._batch_sizes:
            raise ValueError(
                f"stage {name!r} must give one row per sample: {pooled.shape[0]} rows of an output of shape "
                f"{tuple(x.shape)}, where the arguments' first dimensions are {sorted(self._batch_sizes)}; "
                "one that runs sequence first needs pool='mean_lnc'"
            )

    def _check_width(self, k: int, pool: object, pooled: Tensor, x: Tensor) -> None:
        """ValueError where the mean was taken over the channels: what is left changes with the size of the images."""
        if torch.compiler.is_compiling() or not (pool is usual_mean or isinstance(pool, Pooling)):
            return
        width = self._widths.setdefault(k, pooled.shape[1])
        if pooled.shape[1] != width:
            raise ValueError(
                f"stage {self.stages[k]!r} must have one width: {width} before, {pooled.shape[1]} of an output of "
                f"shape {tuple(x.shape)}; pool= names the layout of others than [B, C, H, W] and [B, N, C]: "
                "'mean_nhwc', 'mean_ncl', 'mean_lnc'"
            )

    def _in_order(self, outputs: dict[nn.Module, list[dict[int, Tensor]]]) -> list[Tensor]:
        for name, module in zip(self.stages, self._modules):
            if len(outputs[module]) < self._modules.count(module):
                raise RuntimeError(f"stage {name!r} did not run in the model's forward pass")
        seen: Counter[nn.Module] = Counter()
        features = []
        for k, module in enumerate(self._modules):
            features.append(outputs[module][seen[module] - self._modules.count(module)][k])
            seen[module] += 1
        return features


def _refuse_replicas(model: nn.Module) -> None:
    """ValueError for DataParallel over several devices, whose copies of the modules run without our hooks' modules."""
    for module in model.modules():
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise ValueError(
                f"model must not run as replicas, got DataParallel on {len(module.device_ids)} devices, whose copies "
                "are made anew in each call: use DistributedDataParallel"
            )


def _unwrap(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        elif type(model).__name__ == "OptimizedModule":  # torch.compile's, whose import takes longer than torch's own
            inner = model._orig_mod
        else:
            return model
        assert isinstance(inner, nn.Module)
        model = inner
