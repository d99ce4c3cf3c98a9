"""The terms of :class:`gkd_fast.GraphKDLoss`, before their factors."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkd_fast import functional
from gkd_fast.distributed import Group

# What an untrained PairWeightNetwork gives, so that turning meta-learning on or off does not rescale the losses.
DEFAULT_WEIGHT = 0.5

Pairs = Sequence[tuple[int, int]]


def select_pairs(x: Tensor, pairs: Pairs) -> Tensor:
    """The wanted pairs ``[B, P]`` of a tensor ``[B, S, T]``; what the others hold, NaN too, has no part in them."""
    if len(pairs) == x.shape[1] * x.shape[2]:
        return x.flatten(1)
    return torch.stack([x[:, s, t] for s, t in pairs], dim=1)


def weighted_sum(losses: Tensor, weights: Tensor | None, pairs: Pairs, factor: float) -> Tensor:
    """factor × the sum of weighted losses ``[B, S, T]``, 0 where a pair is not wanted, over samples and pairs."""
    if weights is None:
        return losses.sum() * (factor * DEFAULT_WEIGHT)
    return (select_pairs(losses, pairs) * select_pairs(weights, pairs)).sum() * factor


def pair_losses(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    pairs: Pairs,
    bank: tuple[list[Tensor], list[Tensor]] | None,
    temperatures: tuple[float | None, float | None],
    backend: str,
    process_group: Group,
) -> tuple[Tensor | None, Tensor | None]:
    """Node and relation losses ``[B, S, T]``, 0 where a pair is not wanted; None for the loss without a temperature."""
    of_nodes, of_relations = temperatures
    together = bank is None and process_group is None and len(pairs) == len(students) * len(teachers)
    if of_nodes is not None and of_relations is not None and together and _one_width(students, teachers):
        return functional.graph_losses(
            students, teachers, node_temperature=of_nodes, relation_temperature=of_relations, backend=backend
        )
    options: Any = {"backend": backend, "process_group": process_group}
    nodes = relations = None
    if of_nodes is not None:
        nodes = node_losses(students, teachers, pairs, temperature=of_nodes, bank=bank and bank[1], **options)
    if of_relations is not None:
        relations = functional.relation_kl(
            students, teachers, temperature=of_relations, pairs=pairs, bank=bank, **options
        )
    return nodes, relations


def _one_width(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> bool:
    return len({x.shape[1] for x in (*students, *teachers)}) == 1


def node_losses(
    students: Sequence[Tensor], teachers: Sequence[Tensor], pairs: Pairs, bank: Sequence[Tensor] | None, **options: Any
) -> Tensor:
    """Node losses ``[B, S, T]``, 0 where a pair is not wanted; stages of one width go together."""
    if _one_width(students, teachers):
        return functional.node_contrast(students, teachers, pairs=pairs, bank=bank, **options)
    losses: dict[tuple[int, int], Tensor] = {}
    for width in sorted({students[s].shape[1] for s, _ in pairs}):
        members = [(s, t) for s, t in pairs if students[s].shape[1] == width]
        rows, columns = sorted({s for s, _ in members}), sorted({t for _, t in members})
        group = functional.node_contrast(
            [students[s] for s in rows],
            [teachers[t] for t in columns],
            pairs=[(rows.index(s), columns.index(t)) for s, t in members],
            bank=None if bank is None else [bank[t] for t in columns],
            **options,
        )
        losses |= zip(product(rows, columns), group.flatten(1).unbind(1), strict=True)
    nothing = torch.zeros_like(next(iter(losses.values())))
    every = product(range(len(students)), range(len(teachers)))
    placed = torch.stack([losses.get(pair, nothing) for pair in every], dim=1)
    return placed.unflatten(1, (len(students), len(teachers)))


def teacher_graph_loss(classifier: nn.Linear, embeddings: Sequence[Tensor], target: Tensor) -> Tensor:
    """Cross-entropy, summed over samples and stages, which are one batch for the classifier that they share."""
    logits = classifier(torch.cat(list(embeddings)))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    repeats = (len(embeddings),) + (1,) * (target.dim() - 1)
    return F.cross_entropy(logits, target.repeat(repeats), reduction="sum")
