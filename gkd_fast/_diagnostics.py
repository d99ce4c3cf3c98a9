"""Whether a graph says anything."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from gkd_fast import functional
from gkd_fast._inputs import nodes_of
from gkd_fast._terms import DEFAULT_WEIGHT, select_pairs
from gkd_fast.distributed import Shards
from gkd_fast.modules import graph_bandwidths
from gkd_fast.reference import unit_rows

# A graph says nothing when every node listens to nearly everybody, or when all embeddings point one way.
VACUOUS_NEIGHBORS = 0.9
VACUOUS_COSINE = 0.99
VACUOUS_MIN_BATCH = 8
# The neighbours of graphs of up to so many nodes, 16 MiB a matrix, are counted in plain PyTorch: a first step would
# compile kernels for this count alone.
PLAIN_NODES = 2048

Report = dict[str, float | list[float]]
Sides = tuple[list[Tensor], list[Tensor]]
Features = tuple[Sequence[Tensor], Sequence[Tensor]] | None


class LastCall:
    """What the diagnostics of a call need: its numbers per sample and pair, and, while others hold them, its features.

    Features and embeddings are referred to weakly. Copies and pickles of a loss start afresh.

    Args:
        features: both networks'.
        embeddings: both networks', where the features are not known.

    Attributes:
        weights, node_losses: ``[B, S, T]``; None: the default, and none.
        shards: how the samples lie on the ranks.
        batch: samples, of all ranks.
    """

    def __init__(self, features: Features = None, embeddings: Features = None) -> None:
        self.batch = 0
        self.weights: Tensor | None = None
        self.node_losses: Tensor | None = None
        self.shards: Shards | None = None
        self._features, self._embeddings = _references(features), _references(embeddings)

    @property
    def has_features(self) -> bool:
        return self._features is not None

    def features(self) -> Sides | None:
        """Both networks' features, None where one is gone on any rank."""
        return self._alive(self._features)

    def embeddings(self) -> Sides | None:
        """The same of embeddings."""
        return self._alive(self._embeddings)

    def _alive(self, references: list[list[TensorWeakRef]] | None) -> Sides | None:
        if references is None:
            return None
        students, teachers = ([ref() for ref in side] for side in references)
        here = all(x is not None for x in (*students, *teachers))
        if self.shards is not None:
            # What follows is done by all ranks together.
            here = self.shards.sum(torch.tensor(float(here), device=self.shards.device)).item() == self.shards.size
        return (students, teachers) if here else None

    def __reduce__(self):
        return LastCall, ()


def _references(sides: Features) -> list[list[TensorWeakRef]] | None:
    """Weak references, of which a compiled call makes none."""
    if sides is None or torch.compiler.is_compiling():
        return None
    return [[TensorWeakRef(x) for x in side] for side in sides]


def graph_report(criterion: Any, last: LastCall) -> Report:
    """What :meth:`gkd_fast.GraphKDLoss.diagnostics` returns of a call."""
    shards = last.shards and last.shards.fresh()
    numbers = {name: getattr(last, name) for name in ("weights", "node_losses")}
    numbers = {name: select_pairs(x, criterion.pairs) for name, x in numbers.items() if x is not None}
    if shards is not None:
        numbers = dict(zip(numbers, shards.gather(list(numbers.values()))))
    report: dict[str, Any] = {"weight_mean": DEFAULT_WEIGHT, "weight_std": 0.0}
    if "weights" in numbers:
        report["weight_mean"] = numbers["weights"].mean()
        report["weight_std"] = numbers["weights"].std(correction=0)
    if "node_losses" in numbers:
        report["node_loss_minus_log_batch"] = numbers["node_losses"].mean() - math.log(last.batch)
    features = last.features()
    embeddings = last.embeddings() if features is None else criterion.embed(*features)
    if embeddings is not None:
        for side, stages in zip(("student", "teacher"), embeddings):
            report[f"{side}_cosine"] = [mean_cosine(e, shards) for e in stages]
    if features is not None and criterion.graph == "batch":
        sides: dict[str, list[Tensor]] = {}
        heads: list[Any] = []
        for side, stages in zip(("student", "teacher"), features):
            if (of_side := getattr(criterion, f"{side}_heads")) is not None:
                pools, dims = (getattr(criterion, f"{side}_{name}") for name in ("pool", "dims"))
                sides[side] = nodes_of(f"{side}_feats", stages, dims, pools)
                heads += of_side
        bandwidths = iter(graph_bandwidths(heads, [x for nodes in sides.values() for x in nodes], shards))
        for side, nodes in sides.items():
            found = [next(bandwidths) for _ in nodes]
            report[f"{side}_bandwidth"] = found
            report[f"{side}_neighbors"] = [
                mean_neighbors(x, sigma, criterion, shards) for x, sigma in zip(nodes, found)
            ]
        if criterion.neighbors is not None:
            report["wanted_neighbors"] = criterion.neighbors
    return _numbers_of(report)


def _numbers_of(report: dict[str, Any]) -> Report:
    """The report with numbers in the place of its tensors, for all of which the device is waited for once."""
    values = [x for value in report.values() for x in (value if isinstance(value, list) else [value])]
    tensors = [x for x in values if isinstance(x, Tensor)]
    numbers = iter(torch.stack(tensors).tolist() if tensors else [])

    def number(x: Any) -> float:
        return next(numbers) if isinstance(x, Tensor) else x

    return {
        name: [number(x) for x in value] if isinstance(value, list) else number(value) for name, value in report.items()
    }


def mean_neighbors(nodes: Tensor, bandwidth: float | Tensor, criterion: Any, shards: Shards | None) -> Tensor:
    """Effective neighbours, mean over the batch, that of all ranks with ``shards``."""
    is_plain = shards is None and len(nodes) <= PLAIN_NODES
    backend = "reference" if is_plain else criterion.backend
    options: Any = {"others": criterion.self_weight is not None, "backend": backend}
    neighbors = functional.effective_neighbors(nodes, bandwidth, process_group=shards, **options).sum()
    return neighbors / len(nodes) if shards is None else shards.sum(neighbors) / shards.total


def mean_cosine(x: Tensor, shards: Shards | None) -> Tensor:
    """Mean of c_ij over i ≠ j, from (‖Σ e‖² − Σ ‖e‖²) / (B (B − 1)); 0 for one row."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    e = unit_rows(x) if len(x) else x
    sums = torch.cat([e.sum(dim=0), e.square().sum()[None]])
    batch = len(e)
    if shards is not None:
        sums, batch = shards.sum(sums), shards.total
    return (sums[:-1].square().sum() - sums[-1]) / max(batch * (batch - 1), 1)


def vacuous(report: dict[str, Any], batch: int, criterion: Any, judges_embeddings: bool) -> str | None:
    """Why the graphs of a :class:`gkd_fast.GraphKDLoss`'s report say nothing, and what to do; None if they do.

    An untrained network's embeddings are alike anyway: ``judges_embeddings`` says whether to look at them.
    """
    reasons: list[str] = []
    advice: list[str] = []
    if batch < VACUOUS_MIN_BATCH:
        return None
    for side in ("student", "teacher"):
        for k, neighbors in enumerate(report.get(f"{side}_neighbors", [])):
            if neighbors > VACUOUS_NEIGHBORS * batch:
                reasons.append(f"{side} stage {k} has {neighbors:.0f} effective neighbours of {batch}")
                advice.append(_bandwidth_advice(criterion, report[f"{side}_bandwidth"][k], batch))
        for k, cosine in enumerate(report.get(f"{side}_cosine", [])):
            if cosine > VACUOUS_COSINE and judges_embeddings:
                reasons.append(f"{side} stage {k} has embeddings of mean cosine {cosine:.4f}")
                advice.append(f"embeddings stay apart with {_apart(criterion)} and fewer layers")
    if not reasons:
        return None
    return f"the batch's graph says next to nothing: {'; '.join(reasons)}; {'; '.join(dict.fromkeys(advice))}"


def _apart(criterion: Any) -> str:
    """What keeps embeddings apart."""
    if criterion.self_weight is not None:
        return "a larger self_weight, fewer neighbors" if criterion.neighbors is not None else "a larger self_weight"
    return "a smaller bandwidth" if criterion.neighbors is None else "fewer neighbors"


def _bandwidth_advice(criterion: Any, sigma: float, batch: int) -> str:
    if not isinstance(criterion.bandwidth, str):
        return "try bandwidth='auto' or a smaller one"
    if sigma <= 1.001 * functional.MIN_BANDWIDTH:
        return "its features coincide, which no bandwidth helps: choose another stage or pool"
    if criterion.neighbors is not None:
        return f"neighbors={criterion.neighbors:g} are nearly all of a batch of {batch}: try fewer, or a larger batch"
    return f"the automatic bandwidth {sigma:.2g} is too wide for it: try a number, such as bandwidth={sigma / 2:.2g}"
