"""The losses over a batch's relations as modules over features: pooled like those of :class:`gkd_fast.GraphKDLoss`.

Every module takes a student's and a teacher's features of one stage, whatever their layout, and returns a scalar. The
teacher's have no gradient. ::

    criterion = losses.PKT()
    loss = F.cross_entropy(logits, target) + 30_000 * criterion(student_features, teacher_features)
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from gkd_fast import functional
from gkd_fast._arguments import check_choice
from gkd_fast._pooling import Pool, pool_features, stage_pools
from gkd_fast.distributed import Group
from gkd_fast.relations.common import WITHIN

__all__ = ["CorrelationCongruence", "InfoNCE", "KDDivergence", "PKT", "RKD", "SimilarityPreserving"]


class _Relational(nn.Module):
    """Pools both sides' features and compares them.

    Args:
        pool: how features become one row per sample, as in :func:`gkd_fast.features.pool_features`; one for both sides
            or a dict ``{"student": …, "teacher": …}``.
        backend: as in :mod:`gkd_fast.functional`.
        process_group: the samples of all its ranks are the batch, see :mod:`gkd_fast.distributed`.
        within: ``"batch"``, or ``"tokens"``: the tokens ``[B, N, C]`` or positions ``[B, C, H, W]`` of each sample, as
            many in both networks, are a graph of their own, and nothing is pooled.
    """

    def __init__(
        self, *, pool: Pool = "mean", backend: str = "auto", process_group: Group = None, within: str = "batch"
    ):
        super().__init__()
        check_choice("within", within, WITHIN)
        self.pools = [stage_pools(pool, 1, side)[0] for side in ("student", "teacher")]
        self.options: dict[str, Any] = {"backend": backend, "process_group": process_group, "within": within}

    def forward(
        self,
        student_features: Tensor,
        teacher_features: Tensor,
        mask: Tensor | None = None,
        bank: tuple[Tensor, Tensor] | Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar, of features of one stage of each network.

        Args:
            student_features, teacher_features: of any layout.
            mask: the tokens that count, ``[B, N]``.
            bank: further rows of students and of teachers, or for :class:`InfoNCE` of teachers, as the function's.
        """
        features = student_features, teacher_features
        if self.options["within"] == "tokens":
            students, teachers = (x.flatten(2).mT if x.dim() > 3 else x for x in features)
        else:
            students, teachers = (pool_features(x, p) for x, p in zip(features, self.pools))
        return self.compare(students, teachers.detach(), **self.options, mask=mask, bank=bank)

    def compare(self, students: Tensor, teachers: Tensor, **options: Any) -> Tensor:
        """The loss of rows ``[B, D_s]`` and ``[B, D_t]``, or of tokens ``[B, N, D_s]`` and ``[B, N, D_t]``."""
        raise NotImplementedError


class SimilarityPreserving(_Relational):
    """:func:`gkd_fast.functional.similarity_preserving` with ``norm`` 1 or 2, 2 being the paper's."""

    def __init__(self, norm: int = 2, **options: Any):
        super().__init__(**options)
        self.norm = norm

    def compare(self, students: Tensor, teachers: Tensor, **options: Any) -> Tensor:
        return functional.similarity_preserving(students, teachers, norm=self.norm, **options)


class CorrelationCongruence(_Relational):
    """:func:`gkd_fast.functional.correlation_congruence` with its kernel, γ, order and ``squared``."""

    def __init__(
        self, kernel: str = "gaussian", *, gamma: float = 0.4, order: int = 2, squared: bool = False, **options: Any
    ):
        super().__init__(**options)
        self.kernel: dict[str, Any] = {"kernel": kernel, "gamma": gamma, "order": order, "squared": squared}

    def compare(self, students: Tensor, teachers: Tensor, **options: Any) -> Tensor:
        return functional.correlation_congruence(students, teachers, **self.kernel, **options)


class PKT(_Relational):
    """:func:`gkd_fast.functional.pkt`."""

    def __init__(self, eps: float = 1e-7, **options: Any):
        super().__init__(**options)
        self.eps = eps

    def compare(self, students: Tensor, teachers: Tensor, **options: Any) -> Tensor:
        return functional.pkt(students, teachers, eps=self.eps, **options)


class RKD(_Relational):
    """``distance`` · :func:`gkd_fast.functional.rkd_distance` + ``angle`` · :func:`gkd_fast.functional.rkd_angle`.

    The paper's weights are the defaults. A weight of 0 leaves the term out; angles are those of this process's samples
    alone, so that with a process group or a bank ``angle`` must be 0.
    """

    def __init__(self, distance: float = 25.0, angle: float = 50.0, **options: Any):
        super().__init__(**options)
        if distance < 0 or angle < 0:
            raise ValueError(f"distance and angle must not be negative, got {distance} and {angle}")
        if angle and self.options["process_group"] is not None:
            raise ValueError("angle must be 0 with a process_group: rkd_angle has none")
        self.distance = distance
        self.angle = angle

    def compare(self, students: Tensor, teachers: Tensor, **options: Any) -> Tensor:
        loss = students.new_zeros(())
        if self.distance:
            loss = loss + self.distance * functional.rkd_distance(students, teachers, **options)
        if self.angle:
            loss = loss + self.angle * functional.rkd_angle(students, teachers, **options)
        return loss


class InfoNCE(_Relational):
    """:func:`gkd_fast.functional.info_nce`, with a projection of the student's rows to the teacher's width.

    Args:
        student_dim: width of the student's rows.
        teacher_dim: width of the teacher's; where it is the same, nothing is projected.
        temperature: τ > 0.
        learn_temperature: whether −log τ is a parameter.
        symmetric: both directions.
        **options: as the other losses'.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        temperature: float = 0.07,
        *,
        learn_temperature: bool = False,
        symmetric: bool = True,
        **options: Any,
    ):
        super().__init__(**options)
        same = student_dim == teacher_dim
        self.projection = nn.Identity() if same else nn.Linear(student_dim, teacher_dim)
        self.temperature = temperature
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature))) if learn_temperature else None
        self.symmetric = symmetric

    def compare(self, students: Tensor, teachers: Tensor, **options: Any) -> Tensor:
        temperature = self.temperature if self.logit_scale is None else (-self.logit_scale).exp()
        rows = self.projection(students)
        return functional.info_nce(rows, teachers, temperature, symmetric=self.symmetric, **options)


class KDDivergence(nn.Module):
    """:func:`gkd_fast.functional.kd_divergence` of logits with its temperature and ``standardize``."""

    def __init__(self, temperature: float = 4.0, standardize: bool = False):
        super().__init__()
        self.temperature = temperature
        self.standardize = standardize

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """The loss, a scalar."""
        return functional.kd_divergence(
            student_logits, teacher_logits.detach(), temperature=self.temperature, standardize=self.standardize
        )
