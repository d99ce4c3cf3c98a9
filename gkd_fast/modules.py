"""The trainable parts: a graph convolution head and the network that weighs the stage pairs."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gkd_fast import functional, reference
from gkd_fast._arguments import autocast_enabled, check_graph_options
from gkd_fast.distributed import Group


class BatchGCN(nn.Module):
    """Graph convolutions over the batch: ``act(Â (X W + b))``, ReLU between the layers, none after the last.

    The graph is that of the input features (:func:`gkd_fast.functional.graph_conv`), one for all layers. The adjacency,
    its bandwidth and its normalisation are this library's own choice: the paper leaves them open.

    Args:
        in_dim: width D of the features.
        embed_dim: width of every layer's output.
        layers: number of convolutions, at least 1.
        bandwidth: σ > 0, or ``"auto"``: adapted to each batch.
        normalization: ``"symmetric"`` or ``"row"``.
        backend: as in :mod:`gkd_fast.functional`.

    Raises:
        ValueError: a width or the number of layers is not positive, or a name is unknown.
    """

    def __init__(
        self,
        in_dim: int,
        embed_dim: int = 128,
        *,
        layers: int = 1,
        bandwidth: float | str = "auto",
        normalization: str = "symmetric",
        backend: str = "auto",
    ):
        super().__init__()
        for name, value in (("in_dim", in_dim), ("embed_dim", embed_dim), ("layers", layers)):
            _check_count(name, value)
        check_graph_options(bandwidth, normalization, backend)
        widths = [in_dim] + [embed_dim] * layers
        self.linears = nn.ModuleList(nn.Linear(before, after) for before, after in zip(widths, widths[1:]))
        self.bandwidth = bandwidth
        self.normalization = normalization
        self.backend = backend

    def forward(self, nodes: Tensor, process_group: Group = None) -> Tensor:
        """Graph embeddings ``[B, embed_dim]`` of the nodes ``[B, in_dim]``.

        With ``process_group`` the graph is that of all its ranks' nodes (:mod:`gkd_fast.distributed`).

        Raises:
            ValueError: the nodes are not a matrix of that width.
        """
        first = self.linears[0]
        if nodes.dim() != 2 or nodes.shape[1] != first.in_features:
            raise ValueError(f"nodes must have shape [batch, {first.in_features}], got {tuple(nodes.shape)}")
        if not autocast_enabled(nodes):
            nodes = nodes.to(next(first.parameters()).dtype)
        automatic = self.bandwidth == "auto"
        bandwidth = functional.adaptive_bandwidth(nodes, process_group=process_group) if automatic else self.bandwidth
        hidden = nodes
        for depth, linear in enumerate(self.linears):
            hidden = functional.graph_conv(
                nodes,
                linear(hidden.relu() if depth else hidden),
                bandwidth=bandwidth,
                normalization=self.normalization,
                backend=self.backend,
                process_group=process_group,
            )
        return hidden

    def extra_repr(self) -> str:
        return f"bandwidth={self.bandwidth!r}, normalization={self.normalization!r}"


class PairWeightNetwork(nn.Module):
    """The meta-network: how much each sample's student stage s should listen to teacher stage t.

    w[b,s,t] = sigmoid(cos(proj_s(student embedding), proj_t(teacher embedding))), one linear projection per stage.

    Args:
        embed_dim: width of the graph embeddings.
        num_student_stages: S.
        num_teacher_stages: T.
        width: width of the projections.

    Raises:
        ValueError: a number is not positive.
    """

    def __init__(self, embed_dim: int, num_student_stages: int, num_teacher_stages: int, width: int = 128):
        super().__init__()
        for name, value in (
            ("embed_dim", embed_dim),
            ("num_student_stages", num_student_stages),
            ("num_teacher_stages", num_teacher_stages),
            ("width", width),
        ):
            _check_count(name, value)
        self.student_projections = nn.ModuleList(nn.Linear(embed_dim, width) for _ in range(num_student_stages))
        self.teacher_projections = nn.ModuleList(nn.Linear(embed_dim, width) for _ in range(num_teacher_stages))

    def forward(self, student_embeddings: Sequence[Tensor], teacher_embeddings: Sequence[Tensor]) -> Tensor:
        """Weights ``[B, S, T]`` in (0.26, 0.74), of lists of embeddings ``[B, embed_dim]``.

        Raises:
            ValueError: the number of embeddings is not that of the stages.
        """
        students = _project("student", self.student_projections, student_embeddings)
        teachers = _project("teacher", self.teacher_projections, teacher_embeddings)
        return torch.einsum("bsd,btd->bst", students, teachers).sigmoid()


def _project(side: str, projections: nn.ModuleList, embeddings: Sequence[Tensor]) -> Tensor:
    """Unit rows of the projections, ``[B, stages, width]``."""
    if len(embeddings) != len(projections):
        raise ValueError(f"{side}_embeddings must hold {len(projections)} stages, got {len(embeddings)}")
    return torch.stack([reference.unit_rows(p(e)) for p, e in zip(projections, embeddings)], dim=1)


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
