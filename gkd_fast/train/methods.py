"""The arms of a comparison: what each trains on, and what the control arms replace."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gkd_fast import PairWeightNetwork, losses
from gkd_fast.distributed import Group
from gkd_fast.train.config import RELATION_NAMES


@dataclass(frozen=True)
class Method:
    """An arm.

    Attributes:
        teacher: whether it looks at the teacher at all.
        kd: logit distillation.
        graph: the node and relation terms are there.
        convolution: they look at graph embeddings; else at the plain features.
        weights: of the stage pairs: "meta", "permuted" (meta weights of another sample of the batch) or "constant".
        relations: the loss over the batch's relations in the last stage, by its name; None: there is none.
    """

    teacher: bool = True
    kd: bool = True
    graph: bool = True
    convolution: bool = True
    weights: str = "meta"
    relations: str | None = None

    @property
    def meta(self) -> bool:
        """Whether there is a meta-network to train."""
        return self.graph and self.weights != "constant"


METHODS = {
    "ce": Method(teacher=False, kd=False, graph=False),
    "kd": Method(graph=False),
    "gkd": Method(),
    "gkd-constant": Method(weights="constant"),
    "gkd-permuted": Method(weights="permuted"),
    "gkd-nograph": Method(convolution=False),
    "gkd-nokd": Method(kd=False),
    **{name: Method(kd=False, graph=False, relations=name) for name in RELATION_NAMES},
    **{f"kd+{name}": Method(graph=False, relations=name) for name in RELATION_NAMES},
}


class Relations(nn.Module):
    """The weighted loss over the batch's relations in the last stage of both networks.

    Args:
        name: one of RELATION_NAMES.
        weight: factor of the loss.
        student_dim: width of the student's last stage.
        teacher_dim: of the teacher's.
        backend: as in :mod:`gkd_fast.functional`.
        process_group: the samples of all its ranks are the batch; angles know none.
    """

    def __init__(
        self,
        name: str,
        weight: float,
        student_dim: int,
        teacher_dim: int,
        backend: str,
        process_group: Group = None,
    ):
        super().__init__()
        options = {"backend": backend, "process_group": process_group}
        make = {
            "sp": lambda: losses.SimilarityPreserving(norm=2, **options),
            "cc": lambda: losses.CorrelationCongruence("gaussian", **options),
            "pkt": lambda: losses.PKT(**options),
            "rkd": lambda: losses.RKD(**options),
            "info-nce": lambda: losses.InfoNCE(student_dim, teacher_dim, **options),
        }
        self.loss = make[name]()
        self.weight = weight

    def forward(self, student_features: list[Tensor], teacher_features: list[Tensor]) -> Tensor:
        """The loss of the stages' features."""
        return self.weight * self.loss(student_features[-1], teacher_features[-1])


class PermutedWeights(nn.Module):
    """Pair weights of a meta-network, dealt out to the batch's samples in another order.

    What is left of the weights is their distribution; what a sample's own embeddings say about its weights is lost.
    """

    def __init__(self, network: PairWeightNetwork, permutation: Tensor):
        super().__init__()
        self.network = network
        self.permutation = permutation

    def forward(self, student_embeddings: list[Tensor], teacher_embeddings: list[Tensor]) -> Tensor:
        return self.network(student_embeddings, teacher_embeddings)[self.permutation]


def batch_permutation(size: int, seed: int, step: int, device: torch.device) -> Tensor:
    """A permutation that depends on nothing but its arguments, so that a resumed run draws it again."""
    generator = torch.Generator().manual_seed(stream_seed(seed, "permutation", step))
    return torch.randperm(size, generator=generator).to(device)


def held_out(images: int, batch: list[int], seed: int) -> list[int]:
    """As many of the training images as the batch has (fewer where there are not as many), none of them in it."""
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed)).tolist()
    taken = set(batch)
    return [k for k in order if k not in taken][: len(batch)]


def stream_seed(seed: int, purpose: str, index: int = 0) -> int:
    """The seed of one of a run's independent random streams.

    Each purpose has its own, so that an arm which draws more for one thing draws the same for all others.
    """
    digest = hashlib.sha256(f"{purpose}/{seed}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
