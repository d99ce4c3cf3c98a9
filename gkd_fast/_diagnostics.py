"""Whether a graph says anything."""

import math
from typing import Any

import torch
from torch import Tensor

from gkd_fast import functional
from gkd_fast._terms import DEFAULT_WEIGHT, select_pairs
from gkd_fast.distributed import Shards
from gkd_fast.reference import unit_rows

# A graph says nothing when every node listens to nearly everybody, or when all embeddings point one way.
VACUOUS_NEIGHBORS = 0.9
VACUOUS_COSINE = 0.99
VACUOUS_MIN_BATCH = 8


def graph_report(criterion: Any, last: dict) -> tuple[dict[str, float | list[float]], int]:
    """What :meth:`gkd_fast.GraphKDLoss.diagnostics` returns, of what its last call left, and the batch size."""
    shards = last["shards"] and last["shards"].fresh()
    names = [name for name in ("weights", "node_losses") if last.get(name) is not None]
    rows = [select_pairs(last[name], criterion.pairs) for name in names]
    numbers = dict(zip(names, rows if shards is None else shards.gather(rows)))
    batch = len(last["student_embeddings"][0]) if shards is None else shards.total
    report: dict[str, float | list[float]] = {"weight_mean": DEFAULT_WEIGHT, "weight_std": 0.0}
    if "weights" in numbers:
        report["weight_mean"] = numbers["weights"].mean().item()
        report["weight_std"] = numbers["weights"].std(correction=0).item()
    if "node_losses" in numbers:
        report["node_loss_minus_log_batch"] = numbers["node_losses"].mean().item() - math.log(batch)
    for side, heads in (("student", criterion.student_heads), ("teacher", criterion.teacher_heads)):
        report[f"{side}_cosine"] = [mean_cosine(e, shards) for e in last[f"{side}_embeddings"]]
        if heads is not None and f"{side}_nodes" in last:
            report[f"{side}_neighbors"] = [
                mean_neighbors(x, criterion.bandwidth, criterion.backend, shards) for x in last[f"{side}_nodes"]
            ]
    return report, batch


def mean_neighbors(nodes: Tensor, bandwidth: float | str, backend: str, shards: Shards | None) -> float:
    """Effective neighbours, mean over the batch, that of all ranks with ``shards``."""
    neighbors = functional.effective_neighbors(nodes, bandwidth, backend=backend, process_group=shards).sum()
    return neighbors.item() / len(nodes) if shards is None else shards.sum(neighbors).item() / shards.total


def mean_cosine(x: Tensor, shards: Shards | None) -> float:
    """Mean of c_ij over i ≠ j, from (‖Σ e‖² − Σ ‖e‖²) / (B (B − 1)); 0 for one row."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    e = unit_rows(x) if len(x) else x
    sums = torch.cat([e.sum(dim=0), e.square().sum()[None]])
    batch = len(e)
    if shards is not None:
        sums, batch = shards.sum(sums), shards.total
    return ((sums[:-1].square().sum() - sums[-1]) / max(batch * (batch - 1), 1)).item()


def vacuous_reasons(report: dict, batch: int, judges_embeddings: bool) -> list[str]:
    """Why the graphs of a report of :meth:`gkd_fast.GraphKDLoss.diagnostics` say nothing; empty if they do.

    An untrained network's embeddings are alike anyway: ``judges_embeddings`` says whether to look at them.
    """
    reasons: list[str] = []
    if batch < VACUOUS_MIN_BATCH:
        return reasons
    for side in ("student", "teacher"):
        for k, neighbors in enumerate(report.get(f"{side}_neighbors", [])):
            if neighbors > VACUOUS_NEIGHBORS * batch:
                reasons.append(f"{side} stage {k} has {neighbors:.0f} effective neighbours of {batch}")
        for k, cosine in enumerate(report[f"{side}_cosine"]):
            if cosine > VACUOUS_COSINE and judges_embeddings:
                reasons.append(f"{side} stage {k} has embeddings of mean cosine {cosine:.4f}")
    return reasons
