"""What a :class:`gkd_fast.GraphKDLoss` is called with: features, weights of the stage pairs, targets."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gkd_fast._arguments import autocast_disabled
from gkd_fast._pooling import StagePool, pool_features
from gkd_fast.modules import PairWeightNetwork

Features = Tensor | Sequence[Tensor]
Weights = Tensor | PairWeightNetwork | None


def nodes_of(name: str, features: Features, dims: Sequence[int], pools: Sequence[StagePool]) -> list[Tensor]:
    """The pooled features ``[B, dim]`` of one network's stages."""
    stages = [features] if isinstance(features, Tensor) else list(features)
    if len(stages) != len(dims):
        raise ValueError(f"{name} must hold {len(dims)} stages, got {len(stages)}")
    nodes: list[Tensor] = []
    for k, (x, dim, pool) in enumerate(zip(stages, dims, pools)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}[{k}] must be a Tensor, got {type(x).__name__}")
        try:
            # Rows of that width are what a pooling leads to.
            nodes.append(x if x.dim() == 2 and x.shape[1] == dim else pool_features(x, pool))
        except ValueError as error:
            raise ValueError(f"{name}[{k}]: {error}") from None
        if nodes[k].shape[1] != dim:
            raise ValueError(
                f"{name}[{k}] must have width {dim}, got shape {tuple(x.shape)} with pool={pool!r}"
                + ("" if x.dim() == 2 else "; pool= names other layouts, as 'mean_nhwc' and 'mean_ncl'")
            )
        if len(nodes[k]) != len(nodes[0]):
            raise ValueError(
                f"{name}[{k}] must have the batch size of {name}[0] ({len(nodes[0])}), got {len(nodes[k])}"
            )
    return nodes


def weights_of_pairs(weights: Weights, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor | None:
    """Weights ``[B, S, T]``, float32 at least; None where they are the default."""
    if weights is None:
        return None
    shape = (len(students[0]), len(students), len(teachers))
    if isinstance(weights, nn.Module):
        # Not within autocast: its cache would hand the copies made here, without gradient, to a later call with.
        with torch.no_grad(), autocast_disabled(students[0]):
            own = next(weights.parameters()).dtype
            weights = weights([x.to(own) for x in students], [x.to(own) for x in teachers])
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights must be a Tensor, a PairWeightNetwork or None, got {type(weights).__name__}")
    if weights.shape != shape:
        raise ValueError(f"weights must have shape {shape}, got {tuple(weights.shape)}")
    if weights.device != students[0].device:
        raise ValueError(f"weights must be on the device of the features ({students[0].device}), got {weights.device}")
    return weights.to(torch.promote_types(students[0].dtype, torch.float32))


def check_target(target: Tensor, embedding: Tensor, classes: int) -> None:
    """ValueError unless the target is one of the embeddings' batch, on their device."""
    batch = len(embedding)
    if target.shape != ((batch, classes) if target.is_floating_point() else (batch,)):
        raise ValueError(
            f"target must be {batch} integer labels or probabilities [{batch}, {classes}], "
            f"got {target.dtype} of shape {tuple(target.shape)}"
        )
    if target.device != embedding.device:
        raise ValueError(f"target must be on the device of the features ({embedding.device}), got {target.device}")
