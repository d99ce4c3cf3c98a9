"""Losses over a batch's relations, one per paper; public in :mod:`gkd_fast.functional`.

Each compares the relations between a student's samples with those between a teacher's, whose width may differ. They
take raw features and return a scalar, or with ``reduction="none"`` the losses per sample whose mean it is.
"""

from gkd_fast.relations.angle import rkd_angle
from gkd_fast.relations.congruence import correlation_congruence
from gkd_fast.relations.contrast import info_nce
from gkd_fast.relations.distance import rkd_distance
from gkd_fast.relations.logits import kd_divergence
from gkd_fast.relations.preserving import similarity_preserving
from gkd_fast.relations.transfer import pkt

__all__ = [
    "correlation_congruence", "info_nce", "kd_divergence", "pkt", "rkd_angle", "rkd_distance", "similarity_preserving",
]  # fmt: skip
