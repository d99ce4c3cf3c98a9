"""PyTorch Geometric's dense graph convolution on the similarity graph, with the identity as its weight."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_geometric.nn import DenseGCNConv

from bench.cases import Case


def limitation(case: Case) -> str | None:
    if case.normalization != "symmetric":
        return "DenseGCNConv normalises symmetrically alone"
    return None


def graph_conv(nodes: Tensor, messages: Tensor, *, bandwidth: float, normalization: str) -> Tensor:
    e = F.normalize(nodes, dim=1)
    adjacency = torch.exp((e @ e.T - 1) / bandwidth**2)
    width = messages.shape[1]
    conv = DenseGCNConv(width, width, bias=False).to(messages)
    with torch.no_grad():
        conv.lin.weight.copy_(torch.eye(width))
    conv.requires_grad_(False)
    return conv(messages, adjacency)[0]
