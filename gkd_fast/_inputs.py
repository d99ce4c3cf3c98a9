"""What a :class:`gkd_fast.GraphKDLoss` is called with: features, weights of the stage pairs, targets."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gkd_fast._arguments import stages_of
from gkd_fast._autocast import autocast_disabled
from gkd_fast._pooling import StagePool, pool_features
from gkd_fast.modules import PairWeightNetwork, first_parameter

Features = Tensor | Sequence[Tensor]
Weights = Tensor | PairWeightNetwork | None


def tensors_of(name: str, features: Features) -> list[Tensor]:
    """The features as a list of tensors; TypeError where they are none."""
    stages = stages_of(name, features)
    for k, x in enumerate(stages):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}[{k}] must be a Tensor, got {type(x).__name__}")
    return stages


def nodes_of(name: str, features: Features, dims: Sequence[int], pools: Sequence[StagePool]) -> list[Tensor]:
    """The pooled features ``[B, dim]`` of one network's stages."""
    stages = tensors_of(name, features)
    if len(stages) != len(dims):
        raise ValueError(f"{name} must hold {len(dims)} stages, got {len(stages)}")
    nodes: list[Tensor] = []
    for k, (x, dim, pool) in enumerate(zip(stages, dims, pools)):
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
        if nodes[k].shape[0] != nodes[0].shape[0]:
            raise ValueError(
                f"{name}[{k}] must have the batch size of {name}[0] ({nodes[0].shape[0]}), got {nodes[k].shape[0]}"
            )
    return nodes


def weights_of_pairs(weights: Weights, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor | None:
    """Weights ``[B, S, T]``, float32 at least; None where they are the default."""
    if weights is None:
        return None
    shape = (len(students[0]), len(students), len(teachers))
    if isinstance(weights, nn.Module):
        own = first_parameter(weights)
        if own is None:
            raise TypeError(
                f"weights must be a Tensor, a PairWeightNetwork or None, got {type(weights).__name__} of no parameters"
            )
        if own.device != students[0].device and not is_sharded(own):
            raise ValueError(
                f"weights must be on the device of the features ({students[0].device}), got a module on {own.device}"
            )
        # Not within autocast: its cache would hand the copies made here, without gradient, to a later call with.
        with torch.no_grad(), autocast_disabled(students[0]):
            try:
                weights = weights([x.to(own.dtype) for x in students], [x.to(own.dtype) for x in teachers])
            except ValueError as error:
                raise ValueError(f"weights must fit the embeddings: {error}") from error
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights must be a Tensor, a PairWeightNetwork or None, got {type(weights).__name__}")
    if weights.shape != shape:
        raise ValueError(f"weights must have shape {shape}, got {tuple(weights.shape)}")
    if weights.device != students[0].device:
        raise ValueError(f"weights must be on the device of the features ({students[0].device}), got {weights.device}")
    return weights.to(torch.promote_types(students[0].dtype, torch.float32))


# A label that F.cross_entropy leaves out.
IGNORED = -100


def target_of(target: Tensor, embedding: Tensor, classes: int) -> Tensor:
    """The target as F.cross_entropy takes it; TypeError or ValueError unless it is one of the embeddings' batch.

    Labels are compared with the number of classes on CPUs; elsewhere that would wait for the device.
    """
    batch = len(embedding)
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a Tensor, got {type(target).__name__}")
    is_labels = not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)
    if not (is_labels or target.is_floating_point()) or target.shape != ((batch,) if is_labels else (batch, classes)):
        raise ValueError(
            f"target must be {batch} integer labels or probabilities [{batch}, {classes}], "
            f"got {target.dtype} of shape {tuple(target.shape)}"
        )
    if target.device != embedding.device:
        raise ValueError(f"target must be on the device of the features ({embedding.device}), got {target.device}")
    if not is_labels:
        return target
    labels = target.long()
    if labels.device.type == "cpu" and batch and not torch.compiler.is_compiling():
        least, largest = labels.aminmax()
        if least.item() < 0 or largest.item() >= classes:
            _check_labels(labels, classes)
    return labels


def _check_labels(labels: Tensor, classes: int) -> None:
    wrong = labels[((labels < 0) | (labels >= classes)) & (labels != IGNORED)]
    if len(wrong):
        raise ValueError(f"target must hold labels from 0 to {classes - 1}, got {wrong[0].item()}")


def check_devices(criterion: Any, student_feats: Features, teacher_feats: Features) -> None:
    """ValueError unless both networks' features are where the loss's parameters are."""
    own = first_parameter(criterion.student_heads)
    if own is None or is_sharded(own):
        return
    for name, features in (("student_feats", student_feats), ("teacher_feats", teacher_feats)):
        for k, x in enumerate(tensors_of(name, features)):
            if x.device != own.device:
                raise ValueError(
                    f"{name}[{k}] must be on the device of the loss ({own.device}), got {x.device}: move the loss, "
                    f"criterion.to({str(x.device)!r}), or the features"
                )


def is_sharded(parameter: Tensor) -> bool:
    """Whether what a parameter shows of itself is not what a call computes with (FSDP)."""
    return hasattr(parameter, "device_mesh") or parameter.numel() == 0
