"""Row-normalised graph convolution as attention: Q = K = unit rows, V = messages, scale 1/σ²."""

import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case


def limitation(case: Case) -> str | None:
    if case.normalization != "row":
        return "attention normalises by rows alone"
    return None


def graph_conv(nodes: Tensor, messages: Tensor, *, bandwidth: float, normalization: str) -> Tensor:
    e = F.normalize(nodes, dim=1)[None, None]  # [1, 1, B, D]
    return F.scaled_dot_product_attention(e, e, messages[None, None], scale=1 / bandwidth**2)[0, 0]
