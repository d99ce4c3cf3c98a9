"""What is measured: one op at one size, its inputs, and one run of it forward and backward."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

OPS = ("relation_kl", "node_contrast", "graph_conv")
STEP = "graph_kd_loss"  # the whole loss, measured like an op
NORMALIZATIONS = ("symmetric", "row")
DTYPES = ("float32", "float64", "bfloat16", "float16")
TEMPERATURE = 0.1
RELATION_BANDWIDTH = 1.0
CLASSES = 100
STEP_WIDTHS = (64, 128, 256)  # of a whole step's features, repeated where there are more stages


@dataclass(frozen=True)
class Case:
    """One op at one size. ``stages`` is S = T (1 for graph_conv), ``dim`` the features' width (in a whole step: the
    embeddings'), and ``order`` 2 times the double backward alone. ``self_weight`` (of graph_conv and of a whole step)
    makes the graph one over the others, ``neighbors`` (of a whole step) finds its bandwidth.
    """

    op: str
    batch: int
    dim: int = 128
    stages: int = 1
    normalization: str | None = None
    dtype: str = "float32"
    device: str = "cpu"
    order: int = 1
    precision: str = "highest"
    neighbors: float | None = None
    self_weight: float | None = None

    def __post_init__(self):
        if self.op not in (*OPS, STEP):
            raise ValueError(f"op must be one of {(*OPS, STEP)}, got {self.op!r}")
        if (self.normalization in NORMALIZATIONS) != (self.op == "graph_conv"):
            raise ValueError(f"normalization must be one of {NORMALIZATIONS} for graph_conv and None for the others")
        if (self.neighbors is not None and self.op != STEP) or (
            self.self_weight is not None and self.op not in ("graph_conv", STEP)
        ):
            raise ValueError(f"{self.op} has no graph of that form")

    def name(self) -> str:
        parts = [self.op, self.normalization, f"B={self.batch}", f"D={self.dim}"]
        parts.append(f"S=T={self.stages}" if self.op != "graph_conv" else None)
        parts.append(self.dtype)
        parts.append(self.precision if self.precision != "highest" else None)
        parts.append(None if self.neighbors is None else f"neighbors={self.neighbors:g}")
        parts.append(None if self.self_weight is None else f"self_weight={self.self_weight:g}")
        parts.append(self.device if self.device != "cpu" else None)
        parts.append("second order" if self.order == 2 else None)
        return " ".join(part for part in parts if part)

    def base(self) -> str:
        """The backend that speed-ups are relative to."""
        return "reference" if self.op == STEP else "eager"

    def at(self, batch: int) -> "Case":
        return replace(self, batch=batch)

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass
class Problem:
    """The tensors of a case: ``function(*arguments, **options)`` is the op; ``wanted`` are the inputs with gradient."""

    arguments: tuple
    options: dict
    wanted: dict[str, Tensor]
    upstream: Tensor
    cotangents: list[Tensor] = field(default_factory=list)

    def forward(self, function: Callable[..., Tensor]) -> Tensor:
        return function(*self.arguments, **self.options)

    def backward(self, output: Tensor, create_graph: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, list(self.wanted.values()), self.upstream, create_graph=create_graph)

    def double_backward(self, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Gradients of Σ ⟨gradient, cotangent⟩ with respect to the wanted inputs and the upstream."""
        return torch.autograd.grad(gradients, [*self.wanted.values(), self.upstream], self.cotangents)

    def results(self, function: Callable[..., Tensor]) -> dict[str, Tensor]:
        """Everything that the op hands back, by name: what is checked against float64."""
        output = self.forward(function)
        if not self.cotangents:
            gradients = self.backward(output)
            return {"output": output.detach()} | {f"d {name}": g for name, g in zip(self.wanted, gradients)}
        second = self.double_backward(self.backward(output, create_graph=True))
        return {f"dd {name}": g for name, g in zip([*self.wanted, "upstream"], second)}


def features(batch: int, dim: int, generator: torch.Generator) -> Tensor:
    """Rows around one of 100 class centres, so that a row has near neighbours as well as far ones."""
    centres = torch.randn(CLASSES, dim, generator=generator)
    labels = torch.arange(batch) % CLASSES
    return centres[labels] + torch.randn(batch, dim, generator=generator)


def problem(case: Case) -> Problem:
    """The case's inputs and random upstream (and cotangents at order 2), the same at every call."""
    if case.op == STEP:
        return _whole_loss(case)
    generator = torch.Generator().manual_seed(case.batch + case.dim)

    def tensor(x: Tensor, requires_grad: bool = False) -> Tensor:
        return x.to(case.device, getattr(torch, case.dtype)).requires_grad_(requires_grad)

    def stage(requires_grad: bool) -> Tensor:
        return tensor(features(case.batch, case.dim, generator), requires_grad)

    if case.op == "graph_conv":
        nodes = stage(True)
        messages = tensor(torch.randn(case.batch, case.dim, generator=generator), True)
        arguments, wanted = (nodes, messages), {"nodes": nodes, "messages": messages}
        options = {"bandwidth": _bandwidth(nodes), "normalization": case.normalization}
        if case.self_weight is not None:
            options["self_weight"] = case.self_weight
        upstream = tensor(torch.randn(case.batch, case.dim, generator=generator))
    else:
        students = [stage(True) for _ in range(case.stages)]
        teachers = [stage(False) for _ in range(case.stages)]
        arguments, wanted = (students, teachers), {f"students[{k}]": x for k, x in enumerate(students)}
        options = {"temperature": TEMPERATURE}
        if case.op == "relation_kl":
            options["bandwidth"] = RELATION_BANDWIDTH
        loss_type = torch.float64 if case.dtype == "float64" else torch.float32
        upstream = torch.rand(case.batch, case.stages, case.stages, generator=generator).to(case.device, loss_type)
    cotangents = []
    if case.order == 2:
        upstream.requires_grad_(True)
        cotangents = [tensor(torch.randn(x.shape, generator=generator)) for x in wanted.values()]
    return Problem(arguments, options, wanted, upstream, cotangents)


def criterion(widths: list[int], case: Case, backend: str) -> torch.nn.Module:
    """The loss of a whole step."""
    from gkd_fast import GraphKDLoss

    graph = {"neighbors": case.neighbors, "self_weight": case.self_weight}
    return GraphKDLoss(widths, widths, num_classes=CLASSES, embed_dim=case.dim, backend=backend, **graph)


def _whole_loss(case: Case) -> Problem:
    """Its parameters and the student's features are the inputs with gradient."""
    generator = torch.Generator().manual_seed(case.batch + case.dim)
    dtype = getattr(torch, case.dtype)
    widths = [STEP_WIDTHS[k % len(STEP_WIDTHS)] for k in range(case.stages)]

    def stages(requires_grad: bool) -> list[Tensor]:
        made = [features(case.batch, width, generator).to(case.device, dtype) for width in widths]
        return [x.requires_grad_(requires_grad) for x in made]

    torch.manual_seed(0)
    loss = criterion(widths, case, "reference").to(case.device, dtype)
    parameters = {name: p.detach().clone().requires_grad_(True) for name, p in loss.named_parameters()}
    students, teachers = stages(True), stages(False)
    target = (torch.arange(case.batch) % CLASSES).to(case.device)
    weights = torch.rand(case.batch, case.stages, case.stages, generator=generator).to(case.device, dtype)
    wanted = {f"students[{k}]": x for k, x in enumerate(students)} | parameters
    upstream = torch.rand((), generator=generator).to(case.device, dtype)
    return Problem((parameters, students, teachers, target, weights), {}, wanted, upstream)


def _bandwidth(nodes: Tensor) -> float:
    """σ with σ² half the mean of 1 − c_ij: a graph in which neighbours differ from strangers."""
    with torch.no_grad():
        mean_row = F.normalize(nodes.double(), dim=1).mean(dim=0)
        return max(float(0.5 * (1 - mean_row.square().sum())) ** 0.5, 0.01)
