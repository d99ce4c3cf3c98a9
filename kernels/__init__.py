"""The Triton kernels of the ops, one folder per op, and their registration with PyTorch's dispatcher."""

import os

import torch

from gkd_fast.kernels.catalog import ARCHITECTURES, Specialization, compile, specializations
from gkd_fast.kernels.common.autotune import autotuned
from gkd_fast.kernels.graph_conv import launches as graph_conv
from gkd_fast.kernels.graph_conv import tangent as graph_conv_tangent
from gkd_fast.kernels.node_contrast import launches as node_contrast
from gkd_fast.kernels.node_contrast import tangent as node_contrast_tangent
from gkd_fast.kernels.relation_kl import launches as relation_kl
from gkd_fast.kernels.relation_kl import tangent as relation_kl_tangent
from gkd_fast.kernels.unit_rows import launches as unit_rows

__all__ = ["ARCHITECTURES", "Specialization", "compile", "register", "specializations"]

OPS = {
    "unit_rows": unit_rows.unit_rows,
    "unit_rows_backward": unit_rows.unit_rows_backward,
    "graph_degrees": graph_conv.graph_degrees,
    "graph_conv": graph_conv.graph_conv,
    "graph_conv_backward": graph_conv.graph_conv_backward,
    "graph_degrees_tangent": graph_conv_tangent.graph_degrees_tangent,
    "graph_conv_tangent": graph_conv_tangent.graph_conv_tangent,
    "graph_conv_double_backward": graph_conv_tangent.graph_conv_double_backward,
    "node_contrast": node_contrast.node_contrast,
    "node_contrast_backward": node_contrast.node_contrast_backward,
    "node_contrast_tangent": node_contrast_tangent.node_contrast_tangent,
    "node_contrast_double_backward": node_contrast_tangent.node_contrast_double_backward,
    "relation_kl": relation_kl.relation_kl,
    "relation_kl_backward": relation_kl.relation_kl_backward,
    "relation_kl_tangent": relation_kl_tangent.relation_kl_tangent,
    "relation_kl_double_backward": relation_kl_tangent.relation_kl_double_backward,
}


def register(key: str) -> str | None:
    """Make the launchers the ops' implementation for a dispatch key, "CUDA" or "CPU"; the reason if that cannot be."""
    explore = os.environ.get("GKD_FAST_AUTOTUNE") == "1"
    for name, launcher in OPS.items():
        torch.library.impl(f"gkd_fast::{name}", key, autotuned(launcher) if explore else launcher)
    return None
