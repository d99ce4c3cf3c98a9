"""Stage features of any network: collected by module name, pooled to one row per sample."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Pool = str | Callable[[Tensor], Tensor]


def pool_features(x: Tensor, pool: Pool = "mean") -> Tensor:
    """One row per sample: ``[B, C]`` stays, ``[B, C, H, W]`` and tokens ``[B, N, C]`` are pooled.

    Args:
        x: features.
        pool: ``"mean"`` over positions or tokens, ``"cls"`` (the first token, of token features only), or a callable
            that returns ``[B, C]``.

    Raises:
        ValueError: the shape or the name is not one of these.
    """
    if callable(pool):
        pooled = pool(x)
        if not isinstance(pooled, Tensor) or pooled.dim() != 2:
            raise ValueError(f"pool must return a Tensor [batch, width], got {getattr(pooled, 'shape', type(pooled))}")
        return pooled
    check_pool(pool)
    if x.dim() == 2:
        return x
    if x.dim() == 3:
        return x[:, 0] if pool == "cls" else x.mean(dim=1)
    if x.dim() == 4 and pool == "mean":
        return x.mean(dim=(2, 3))
    raise ValueError(f"features must be [B, C], [B, N, C] or (pool='mean') [B, C, H, W], got shape {tuple(x.shape)}")


def check_pool(pool: Pool) -> None:
    """Raises ValueError for a pooling that :func:`pool_features` does not know."""
    if not callable(pool) and pool not in ("mean", "cls"):
        raise ValueError(f"pool must be 'mean', 'cls' or a callable, got {pool!r}")


class StageFeatures:
    """Runs a model and collects the outputs of its stages, by module name. ::

        stages = StageFeatures(model, ["layer1", "layer2", "layer3"])
        output, features = stages(images)  # features: one [B, C] per stage

    The features are pooled on the spot, so activations that later run in place do not reach them. A module that runs
    several times, or is listed under several names, gives its last outputs, in order. Names are looked up inside DDP,
    DataParallel and ``torch.compile`` wrappers. Recomputation by activation checkpointing collects nothing twice;
    a stage within a *reentrant* checkpoint has no gradient and is refused.

    Args:
        model: any module; its parameters, mode and outputs are left alone.
        stages: module names as in ``model.named_modules()``.
        pool: as in :func:`pool_features`; None gives a copy of the whole output.

    Raises:
        ValueError: no stage, or a name that the model does not have.
    """

    def __init__(self, model: nn.Module, stages: Sequence[str], pool: Pool | None = "mean"):
        if isinstance(stages, str) or not stages:
            raise ValueError(f"stages must be a list of module names, got {stages!r}")
        if pool is not None:
            check_pool(pool)
        self.model = model
        self.stages = list(stages)
        self.pool = pool
        self._outputs: dict[nn.Module, list[Tensor]] | None = None
        modules = dict(_unwrap(model).named_modules(remove_duplicate=False))
        unknown = [name for name in self.stages if name not in modules]
        if unknown:
            known = ", ".join(name for name in modules if name)
            raise ValueError(f"stages {unknown} are no modules of the model, which has: {known}")
        self._modules = [modules[name] for name in self.stages]
        self._handles = [module.register_forward_hook(self._collect) for module in dict.fromkeys(self._modules)]

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[object, list[Tensor]]:
        """The model's output and the list of stage features.

        Raises:
            RuntimeError: a stage did not run, or ran within a reentrant checkpoint.
            TypeError: a stage's output is not a Tensor.
        """
        self._outputs = {module: [] for module in self._modules}
        self._wants_gradient = torch.is_grad_enabled()
        try:
            output = self.model(*args, **kwargs)
            return output, self._in_order(self._outputs)
        finally:
            self._outputs = None

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def _collect(self, module: nn.Module, args: tuple, output: object) -> None:
        if self._outputs is None:
            return
        if not isinstance(output, Tensor):
            name = self.stages[self._modules.index(module)]
            raise TypeError(f"stage {name!r} must return a Tensor, got {type(output).__name__}")
        if self._wants_gradient and not torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
            name = self.stages[self._modules.index(module)]
            raise RuntimeError(f"stage {name!r} runs without gradient; if checkpointed, it needs use_reentrant=False")
        self._outputs[module].append(
            output.clone() if self.pool is None else _own(pool_features(output, self.pool), output)
        )

    def _in_order(self, outputs: dict[nn.Module, list[Tensor]]) -> list[Tensor]:
        for name, module in zip(self.stages, self._modules):
            if len(outputs[module]) < self._modules.count(module):
                raise RuntimeError(f"stage {name!r} did not run in the model's forward pass")
        seen: Counter[nn.Module] = Counter()
        features = []
        for module in self._modules:
            features.append(outputs[module][seen[module] - self._modules.count(module)])
            seen[module] += 1
        return features


def _own(pooled: Tensor, output: Tensor) -> Tensor:
    """The pooled features in memory of their own: a view would follow in-place changes of the output."""
    shares = pooled.untyped_storage().data_ptr() == output.untyped_storage().data_ptr()
    return pooled.clone() if shares else pooled


def _unwrap(model: nn.Module) -> nn.Module:
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel, torch._dynamo.eval_frame.OptimizedModule)
    while isinstance(model, wrappers):
        inner = model._orig_mod if hasattr(model, "_orig_mod") else model.module
        assert isinstance(inner, nn.Module)
        model = inner
    return model
