"""One iteration of the method, written down straight from its description, with nothing of the library in it.

Everything is a function of dicts of tensors and goes through one autograd graph; every B×B matrix is built.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

LR, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 5e-4
NODE_TEMPERATURE = RELATION_TEMPERATURE = 0.1
KD_TEMPERATURE, KD_FACTOR = 3.0, 9.0


def cosines(x: Tensor, y: Tensor) -> Tensor:
    return F.normalize(x, dim=1) @ F.normalize(y, dim=1).T


def embedding(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """D^-1/2 A D^-1/2 (X W + b), A_ij = exp((c_ij − 1)/σ²), A_ii = 1, σ² half the mean of 1 − c_ij over i ≠ j."""
    c = cosines(features, features)
    others = ~torch.eye(len(c), dtype=torch.bool)
    variance = 0.5 * (1 - c.detach())[others].mean()
    adjacency = torch.where(others, torch.exp((c - 1) / variance), torch.ones_like(c))
    scale = torch.diag(adjacency.sum(dim=1) ** -0.5)
    return scale @ adjacency @ scale @ (features @ weight.T + bias)


def node_loss(student: Tensor, teacher: Tensor) -> Tensor:
    p = torch.softmax(cosines(student, teacher) / NODE_TEMPERATURE, dim=1)
    return -torch.log(torch.diagonal(p))


def relation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    def p(x):
        c = cosines(x, x)
        relations = torch.exp(c - 1) * (1 - torch.eye(len(c), dtype=c.dtype))
        return torch.softmax(relations / RELATION_TEMPERATURE, dim=1)

    return (p(teacher) * torch.log(p(teacher) / p(student))).sum(dim=1)


def pair_weights(meta: dict[str, Tensor], es: list[Tensor], et: list[Tensor]) -> dict[tuple[int, int], Tensor]:
    def project(side, k, x):
        return x @ meta[f"{side}_projections.{k}.weight"].T + meta[f"{side}_projections.{k}.bias"]

    return {
        (s, t): torch.sigmoid(F.cosine_similarity(project("student", s, x), project("teacher", t, y), dim=1))
        for s, x in enumerate(es)
        for t, y in enumerate(et)
    }


def embeddings(params: dict[str, Tensor], side: str, features: list[Tensor]) -> list[Tensor]:
    name = "criterion.{}_heads.{}.linears.0.{}"
    return [
        embedding(x, params[name.format(side, k, "weight")], params[name.format(side, k, "bias")])
        for k, x in enumerate(features)
    ]


def graph_terms(es: list[Tensor], et: list[Tensor], weights: dict) -> tuple[Tensor, Tensor]:
    node = sum((w * node_loss(es[s], et[t].detach())).mean() for (s, t), w in weights.items()) / len(es)
    relation = sum((w * relation_loss(es[s], et[t].detach())).mean() for (s, t), w in weights.items()) / len(es)
    return node, relation


def label_terms(student_logits: list[Tensor], teacher_logits: list[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    cross_entropy = sum(-torch.log_softmax(x, dim=1)[range(len(x)), labels].mean() for x in student_logits)
    kd = 0
    for s, t in zip(student_logits, teacher_logits, strict=True):
        p, q = torch.softmax(t / KD_TEMPERATURE, dim=1), torch.softmax(s / KD_TEMPERATURE, dim=1)
        kd = kd + KD_FACTOR * (p * (p.log() - q.log())).sum(dim=1).mean()
    return cross_entropy / len(student_logits), kd / len(student_logits)


def run_student(student, params: dict[str, Tensor], images: Tensor):
    own = {k.removeprefix("student."): v for k, v in params.items() if k.startswith("student.")}
    return functional_call(student, own, (images,))


def train_objective(student, params, meta, teacher_outputs, images, labels) -> dict[str, Tensor]:
    outputs = run_student(student, params, images)
    es = embeddings(params, "student", outputs.features)
    et = embeddings(params, "teacher", teacher_outputs.features)
    with torch.no_grad():
        weights = pair_weights(meta, es, et)
    cross_entropy, kd = label_terms(outputs.logits, teacher_outputs.logits, labels)
    node, relation = graph_terms(es, et, weights)
    classifier = params["criterion.classifier.weight"], params["criterion.classifier.bias"]
    teacher_graph = sum(F.cross_entropy(F.linear(e, *classifier), labels) for e in et)
    return {
        "cross_entropy": cross_entropy, "kd": kd, "node": node, "relation": relation, "teacher_graph": teacher_graph,
    }  # fmt: skip


def nesterov_step(params: dict[str, Tensor], gradients: dict[str, Tensor], momenta: dict[str, Tensor]):
    """PyTorch's SGD: g ← g + wd·θ, m ← μ m + g, θ ← θ − η (g + μ m)."""
    new_params, new_momenta = {}, {}
    for name, p in params.items():
        g = gradients[name] + WEIGHT_DECAY * p
        new_momenta[name] = MOMENTUM * momenta[name] + g
        new_params[name] = p - LR * (g + MOMENTUM * new_momenta[name])
    return new_params, new_momenta


def unrolled_step(params: dict[str, Tensor], momenta: dict[str, Tensor], objective: Tensor):
    """One plain momentum step that stays in the autograd graph; what has no gradient is left alone."""
    gradients = torch.autograd.grad(objective, list(params.values()), create_graph=True, allow_unused=True)
    params, momenta = dict(params), dict(momenta)
    for name, g in zip(list(params), gradients):
        if g is not None:
            momenta[name] = MOMENTUM * momenta[name] + g + WEIGHT_DECAY * params[name]
            params[name] = params[name] - LR * momenta[name]
    return params, momenta


def meta_gradient(student, params, meta, teacher_outputs, images, labels) -> dict[str, Tensor]:
    """Two steps on node + relation, one on cross-entropy + kd, then the gradient of the latter at the meta-network."""
    momenta = {name: torch.zeros_like(p) for name, p in params.items()}
    for _ in range(2):
        es = embeddings(params, "student", run_student(student, params, images).features)
        et = embeddings(params, "teacher", teacher_outputs.features)
        params, momenta = unrolled_step(params, momenta, sum(graph_terms(es, et, pair_weights(meta, es, et))))
    outputs = run_student(student, params, images)
    params, _ = unrolled_step(params, momenta, sum(label_terms(outputs.logits, teacher_outputs.logits, labels)))
    outputs = run_student(student, params, images)
    outer = sum(label_terms(outputs.logits, teacher_outputs.logits, labels))
    return dict(zip(meta, torch.autograd.grad(outer, list(meta.values()))))
