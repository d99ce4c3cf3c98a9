"""The fused ops ``torch.ops.gkd_fast.*``: schemas, fakes and autograd, one file per op.

An op takes unit rows in float32 or float64 and ``product_precision``, the type in which tiles of similarities are
multiplied: "float64" for float64 rows, else "float32", "tf32" (float32 products may be rounded as PyTorch's "high"
matmul precision allows), "bfloat16" or "float16". Sums, exponentials and results stay in the rows' type; a backend
without units for a type multiplies in a wider one. What multiplies in a short type first subtracts one vector of its
choice from rows and columns, call by call (on CPUs the columns' mean). Every backward is an op of its own. The row set
and the column set of an op are the same unless a column set is given; then gradients are the row set's, and the caller
brings the columns' statistics and upstream.
"""

import torch

from gkd_fast.ops.autograd import refuse_forward_mode, register_loop
from gkd_fast.ops.backends import HOW_TO_BUILD, has_kernels, missing
from gkd_fast.ops.graph_conv import graph_conv
from gkd_fast.ops.graph_conv_columns import graph_degrees, node_terms
from gkd_fast.ops.graph_conv_stages import UnitStages, graph_conv_stages
from gkd_fast.ops.graph_losses import graph_losses
from gkd_fast.ops.info_nce import info_nce, one_sided
from gkd_fast.ops.neighbor_conv import neighbor_conv
from gkd_fast.ops.neighbor_conv_columns import merged, neighbor_sums
from gkd_fast.ops.node_contrast import node_contrast
from gkd_fast.ops.pair_sums import Fixed, MeanDistances, pair_losses
from gkd_fast.ops.relation_kl import relation_kl
from gkd_fast.ops.rkd_angle import rkd_angle
from gkd_fast.ops.unit_rows import unit_rows, unit_rows_and_norms

__all__ = [
    "HOW_TO_BUILD", "Fixed", "MeanDistances", "UnitStages", "graph_conv", "graph_conv_stages", "graph_degrees",
    "graph_losses", "has_kernels", "info_nce", "merged", "missing", "neighbor_conv", "neighbor_sums", "node_contrast",
    "node_terms", "one_sided", "pair_losses", "refuse_forward_mode", "relation_kl", "rkd_angle", "unit_rows",
    "unit_rows_and_norms",
]  # fmt: skip

for _name in torch._C._dispatch_get_all_op_names():
    if _name.startswith("gkd_fast::"):
        register_loop(_name.removeprefix("gkd_fast::"))
