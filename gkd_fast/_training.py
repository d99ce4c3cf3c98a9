"""What a loss notices of the training around it."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

# The training calls that look at what there is to warn of; an untrained network's embeddings are alike anyway, so these
# are judged at the last of them.
CHECKED_CALLS = (1, 100)
# Numbers of a parameter that are kept to see whether it moves.
SAMPLED = 64

ALONE = (
    "a batch of one sample teaches nothing: it is told from no other and has no relations, so its node and relation "
    "losses are 0; DataLoader(drop_last=True) leaves out a last batch that is short"
)
UNMOVED = (
    "the parameters of {} have not moved: give them to the optimizer too, as in "
    "SGD([*student.parameters(), *criterion.parameters()]), or freeze them with requires_grad_(False)"
)
UNMOVED_WEIGHTS = (
    "the parameters of weights={} have not moved: the loss evaluates it without gradient, so no optimizer moves it; "
    "take its gradient in meta-steps (UnrolledSGD), or pass weights as a Tensor with gradient, or freeze it with "
    "requires_grad_(False)"
)


def recomputing() -> bool:
    """Whether this runs within a backward pass: again, as activation checkpointing runs things."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


_beside_training: ContextVar[bool] = ContextVar("beside_training", default=False)


@contextmanager
def beside_training() -> Iterator[None]:
    """Within the block calls are looks, or those of unrolled steps, which are undone, and of their replays."""
    token = _beside_training.set(True)
    try:
        yield
    finally:
        _beside_training.reset(token)


def repeats_or_is_undone() -> bool:
    """Whether this call is not a training step's own: recomputed, a look, or of an unrolled step."""
    return not torch.compiler.is_compiling() and (recomputing() or _beside_training.get())


def being_captured(x: Tensor) -> bool:
    """Whether a CUDA graph is captured on the current stream of the tensor's device: nothing may wait for it then."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


class TrainingWatch:
    """Warns, once each, of what makes a training teach nothing.

    That parameters do not move is told from their version counters, which optimizers advance and which need no look at
    the device; only where one stands still are some of its numbers compared, for optimizers that go around it. While
    gradients are accumulated nothing moves: the student's parameters tell when there has been a step.
    """

    def __init__(self) -> None:
        self.warned: set[str] = set()
        self.marks: dict[str, list[tuple[int, int, Tensor]]] = {}
        self.students: dict[int, int] = {}
        self.waits = False

    def warn_once(self, kind: str, message: str) -> None:
        if kind not in self.warned and not torch.compiler.is_compiling():
            self.warned.add(kind)
            warnings.warn(message, UserWarning, stacklevel=4)

    def looks_at(self, call: int) -> bool:
        return call in CHECKED_CALLS or (self.waits and call % CHECKED_CALLS[-1] == 0)

    def look(self, criterion: Any, weights: object, loss: Tensor) -> None:
        """At the first training call takes down where the parameters are; at the last that looks, says which stayed.

        It ``waits`` for that while no other leaf of the loss, a parameter of the student, has moved either.
        """
        used = sorted({s for s, _ in criterion.pairs})
        modules: dict[str, Any] = {
            "student_graph": nn.ModuleList(criterion.student_heads[s] for s in used),
            "teacher_graph": criterion.teacher_heads,
            "classifier": criterion.classifier,
            "weights": weights if isinstance(weights, nn.Module) else None,
        }
        groups = {name: list(module.parameters()) for name, module in modules.items() if module is not None}
        if criterion._training_calls == CHECKED_CALLS[0]:
            self.marks = {name: [(id(p), p._version, _numbers(p)) for p in ps] for name, ps in groups.items()}
            known = {id(p) for ps in groups.values() for p in ps}
            self.students = {p: version for p, version in _leaf_versions(loss).items() if p not in known}
            return
        now = _leaf_versions(loss)
        self.waits = bool(self.students) and all(now.get(p, version) == version for p, version in self.students.items())
        if self.waits:
            return
        unmoved = [name for name, ps in groups.items() if name in self.marks and _unmoved(ps, self.marks[name])]
        self.marks = {}
        own = [name for name in unmoved if name != "weights"]
        reasons = [UNMOVED.format(", ".join(own))] if own else []
        reasons += [UNMOVED_WEIGHTS.format(type(weights).__name__)] if "weights" in unmoved else []
        if reasons:
            self.warn_once("unmoved", f"in {criterion._training_calls} training calls {'; '.join(reasons)}")


def _unmoved(parameters: Sequence[nn.Parameter], marks: Sequence[tuple[int, int, Tensor]]) -> bool:
    trained = [(p, mark) for p, mark in zip(parameters, marks) if p.requires_grad and p.numel()]
    if not trained or any((id(p), p._version) != mark[:2] for p, mark in trained):
        return False
    return all(mark[2].device == p.device and torch.equal(_numbers(p), mark[2]) for p, mark in trained)


def _leaf_versions(loss: Tensor) -> dict[int, int]:
    """The version counters, by id, of the leaves that the loss has gradients for."""
    found, waiting = {}, [loss.grad_fn]
    known = set(waiting)
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if (leaf := getattr(node, "variable", None)) is not None:
            found[id(leaf)] = leaf._version
        new = {following for following, _ in node.next_functions} - known
        known |= new
        waiting += new
    return found


@torch.no_grad()
def _numbers(p: nn.Parameter) -> Tensor:
    whole = p.to_local() if hasattr(p, "to_local") else p.detach()
    return whole.flatten()[:: max(1, whole.numel() // SAMPLED)].clone()
