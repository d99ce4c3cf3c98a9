"""Graph knowledge distillation at any batch size."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gkd_fast import functional, losses
from gkd_fast.distiller import GraphDistiller
from gkd_fast.features import StageFeatures
from gkd_fast.loss import GraphKDLoss
from gkd_fast.meta import UnrolledSGD
from gkd_fast.modules import BatchGCN, PairWeightNetwork

if TYPE_CHECKING:
    from gkd_fast.micro_batch import micro_batched

__version__ = "0.2.0"
__all__ = [
    "BatchGCN",
    "GraphDistiller",
    "GraphKDLoss",
    "PairWeightNetwork",
    "StageFeatures",
    "UnrolledSGD",
    "__version__",
    "functional",
    "losses",
    "micro_batched",
]


def __getattr__(name: str) -> Any:
    # It imports torch._dynamo, which takes two seconds.
    if name in ("micro_batch", "micro_batched"):
        module = import_module("gkd_fast.micro_batch")
        return module if name == "micro_batch" else module.micro_batched
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
