"""The Triton kernels of the ops, one folder per op, and their registration with PyTorch's dispatcher.

Triton takes long to import: whatever needs it is imported when it is first used.
"""

import os
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch

CATALOG = ("ARCHITECTURES", "Specialization", "compile", "specializations")
__all__ = [*CATALOG, "OPS", "REGISTERED", "register"]  # noqa: F822


def __getattr__(name: str) -> Any:
    if name in CATALOG:
        return getattr(import_module("gkd_fast.kernels.catalog"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_MODULES = {
    name: module
    for module, names in {
        "unit_rows.launches": ("unit_rows", "unit_rows_backward"),
        "graph_conv.launches": ("graph_degrees", "graph_conv", "graph_conv_backward"),
        "graph_conv.stages": ("graph_inverse_variances", "graph_conv_stages", "graph_conv_stages_backward"),
        "graph_conv.tangent": ("graph_degrees_tangent", "graph_conv_tangent", "graph_conv_double_backward"),
        "neighbor_conv.stages": (
            "neighbor_bandwidths_stages",
            "neighbor_conv_stages",
            "neighbor_conv_stages_backward",
            "neighbor_conv_gradients",
        ),
        "neighbor_conv.sums": ("neighbor_sums",),
        "neighbor_conv.launches": ("neighbor_conv", "neighbor_conv_backward", "neighbor_conv_terms"),
        "node_contrast.launches": ("node_contrast", "node_contrast_backward"),
        "node_contrast.tangent": ("node_contrast_tangent", "node_contrast_double_backward"),
        "pair_sums.launches": (
            "pair_sums",
            "pair_sums_backward",
            "pair_sums_tangent",
            "pair_sums_double_backward",
        ),
        "pair_sums.graphs": (
            "batched_pair_sums",
            "batched_pair_sums_backward",
            "batched_pair_sums_tangent",
            "batched_pair_sums_double_backward",
        ),
        "relation_kl.launches": ("relation_kl", "relation_kl_backward"),
        "relation_kl.tangent": ("relation_kl_tangent", "relation_kl_double_backward"),
        "rkd_angle.launches": (
            "rkd_angle",
            "rkd_angle_backward",
            "batched_rkd_angle",
            "batched_rkd_angle_backward",
        ),
    }.items()  # fmt: skip
    for name in names
}


@cache
def _launcher(name: str) -> Callable[..., Any]:
    launcher = getattr(import_module(f"gkd_fast.kernels.{_MODULES[name]}"), name)
    if os.environ.get("GKD_FAST_AUTOTUNE") != "1":
        return launcher
    return import_module("gkd_fast.kernels.common.autotune").autotuned(launcher)


def _importing(name: str) -> Callable[..., Any]:
    """The launcher of an op, whose module is imported with the first call."""
    return lambda *arguments, **named: _launcher(name)(*arguments, **named)


OPS = {name: _importing(name) for name in _MODULES}


@cache
def _prepared() -> Callable[..., Any]:
    return import_module("gkd_fast.kernels.common.operands").Prepared


class Launchers:
    """The launchers by their ops' names, for one call of some ops, whose unit rows are prepared for products once.

    Args:
        kept: in the backward pass, what :meth:`kept` gave in the forward pass.
    """

    def __init__(self, *kept: tuple):
        self._prepared = _prepared()(*kept)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        launcher = _launcher(name)
        return partial(launcher, prepared=self._prepared) if name in _PREPARING else launcher

    def kept(self) -> tuple:
        """Names and tensors of what was prepared."""
        return self._prepared.kept()


_PREPARING = frozenset((
    "graph_inverse_variances", "graph_conv", "graph_conv_backward", "graph_conv_stages", "graph_conv_stages_backward",
    "neighbor_bandwidths_stages", "neighbor_conv_stages", "neighbor_conv_stages_backward", "node_contrast",
    "node_contrast_backward", "relation_kl", "relation_kl_backward",
))  # fmt: skip


# The devices whose ops they are.
REGISTERED: set[str] = set()


def register(key: str) -> None:
    """Make the launchers the ops' implementation for a dispatch key, "CUDA" or "CPU"."""
    REGISTERED.add(key.lower())
    for name, launcher in OPS.items():
        torch.library.impl(f"gkd_fast::{name}", key, launcher)
