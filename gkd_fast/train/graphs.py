"""A training step's forward and backward pass in a CUDA graph, so that a step costs the device's time alone."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from torch import Tensor

from gkd_fast import GraphDistiller
from gkd_fast.train.config import Config, TrainError
from gkd_fast.train.methods import METHODS

# Steps that run as ever before one is captured: libraries choose their algorithms and allocate in them.
STEPS_BEFORE = 3

Step = Callable[[Tensor, Tensor], dict[str, Tensor]]


def check_capture(config: Config, method: str, accelerator: Accelerator) -> None:
    """Raises TrainError, which names it, where a run has what a CUDA graph cannot hold."""
    device, processes = accelerator.device, accelerator.num_processes
    reasons = {
        f"it needs a CUDA device, and the run is on {device}": device.type != "cuda",
        f"it is for one process, there are {processes}: what processes tell each other is not captured": processes > 1,
        "precision fp16 reads on the host, step by step, whether gradients are finite": config.precision == "fp16",
        "micro_batch saves and restores random states on the host": config.micro_batch is not None,
        "graph.column_bank has other memory after every batch of another shape": config.graph.column_bank > 0,
        f"method {method} draws a permutation on the host for every step": METHODS[method].weights == "permuted",
    }
    for reason, holds in reasons.items():
        if holds:
            raise TrainError(f"cuda_graphs cannot be had: {reason}")


class CapturedStep:
    """Forward and backward pass of one shape of batch in a CUDA graph, of any other as ever.

    Args:
        step: (images, labels) → the terms; leaves the gradients of the parameters in their ``grad``.
        module: whose step it is.

    Of the shapes that one is captured of which there first were STEPS_BEFORE.
    """

    def __init__(self, step: Step, module: GraphDistiller):
        self.step = step
        self.module = module
        self._seen: dict[tuple, int] = {}
        self._kind: tuple | None = None
        self._inputs: tuple[Tensor, Tensor]
        self._terms: dict[str, Tensor]
        self._gradients: list[tuple[torch.nn.Parameter, Tensor]]
        self._replay: Callable[[], None]

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        kind = _kind(images), _kind(labels)
        if self._kind is None and self._seen.get(kind, 0) >= STEPS_BEFORE:
            self._capture(kind, images, labels)
        if kind != self._kind:
            self._seen[kind] = self._seen.get(kind, 0) + 1
            with beside_default_stream(images.device):
                return self.step(images, labels)
        for held, given in zip(self._inputs, (images, labels), strict=True):
            held.copy_(given)
        self._replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return {name: term.clone() for name, term in self._terms.items()}

    def _capture(self, kind: tuple, images: Tensor, labels: Tensor) -> None:
        inputs = images.clone(), labels.clone()
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        # Gradients of the graph's own memory, written anew by every replay.
        for parameter in parameters:
            parameter.grad = None
        try:
            self._terms, self._replay = captured(lambda: self.step(*inputs))
        except RuntimeError as error:
            raise TrainError(
                f"cuda_graphs cannot be had: the step waits for the device or changes its shapes ({error}); networks "
                "whose forward pass reads numbers on the host cannot be captured"
            ) from error
        self._gradients = [(p, p.grad) for p in parameters if p.grad is not None]
        self._kind, self._inputs = kind, inputs


def captured(run: Callable[[], dict[str, Tensor]]) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """What ``run`` returns, once it was replayed, and the replay, which writes to that memory again."""
    graph = torch.cuda.CUDAGraph()
    # The loader's thread, which pins memory, may go on.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = run()
    return results, graph.replay


@contextlib.contextmanager
def beside_default_stream(device: torch.device) -> Iterator[None]:
    """Work on another stream than the default one, which is where graphs are captured, before and after its own."""
    if device.type != "cuda":
        yield
        return
    stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


def _kind(x: Tensor) -> tuple:
    return x.shape, x.dtype, x.stride()
