"""node_contrast and relation_kl of the same stages, whose rows are normalised once, forward and backward."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gkd_fast.ops.autograd import refuse_forward_mode
from gkd_fast.ops.joined import on_unit_rows
from gkd_fast.ops.node_contrast import node_contrast_call
from gkd_fast.ops.relation_kl import relation_kl_call


def graph_losses(
    students: list[Tensor],
    teachers: list[Tensor],
    dtype: torch.dtype,
    node_temperature: float,
    relation_temperature: float,
    bandwidth: float,
    product_precision: str,
) -> Sequence[Tensor]:
    """Both losses ``[B, S, T]`` of all pairs of stages of one width."""
    stages = [*students, *teachers]
    refuse_forward_mode(stages)
    calls = [
        node_contrast_call(
            students, teachers, dtype, [True] * (len(students) * len(teachers)), node_temperature, product_precision
        ),
        relation_kl_call(students, teachers, relation_temperature, bandwidth, product_precision),
    ]
    return on_unit_rows(calls, stages, [], dtype)
