"""Graph knowledge distillation at any batch size."""

from gkd_fast import functional
from gkd_fast.features import StageFeatures
from gkd_fast.loss import GraphKDLoss
from gkd_fast.meta import UnrolledSGD
from gkd_fast.micro_batch import micro_batched
from gkd_fast.modules import BatchGCN, PairWeightNetwork

__version__ = "0.1.0"
__all__ = [
    "BatchGCN",
    "GraphKDLoss",
    "PairWeightNetwork",
    "StageFeatures",
    "UnrolledSGD",
    "__version__",
    "functional",
    "micro_batched",
]
