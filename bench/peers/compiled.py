"""torch.compile of the eager peer, specialised to the sizes it is called with."""

import warnings

import torch

from bench.peers import eager

warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\._inductor")

graph_conv = torch.compile(eager.graph_conv, dynamic=False)
node_contrast = torch.compile(eager.node_contrast, dynamic=False)
relation_kl = torch.compile(eager.relation_kl, dynamic=False)
