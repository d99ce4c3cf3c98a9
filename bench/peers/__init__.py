"""The backends by name. A peer's module defines those of the three ops that it has, under the ops' own names."""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from bench.cases import STEP, Case, criterion

LIBRARY = ("cpp", "triton", "reference")
MODULES = {
    "eager": "bench.peers.eager",
    "published": "bench.peers.published",
    "compile": "bench.peers.compiled",
    "attention": "bench.peers.attention",
    "keops": "bench.peers.keops",
    "geometric": "bench.peers.geometric",
}
BACKENDS = (*LIBRARY, *MODULES)


class Unavailable(Exception):
    """This backend does not offer this case, or is not installed; the message says which."""


def build(backend: str, case: Case) -> Callable[..., Tensor]:
    """The backend's function for the case's op, called as ``function(*problem.arguments, **problem.options)``."""
    if backend in LIBRARY:
        return _whole_loss(backend, case) if case.op == STEP else _library(backend, case)
    if backend not in MODULES:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    try:
        module = importlib.import_module(MODULES[backend])
    except ImportError as error:
        raise Unavailable(f"not installed here ({error})") from error
    function = getattr(module, case.op, None)
    if function is None:
        raise Unavailable(f"has no {case.op}")
    if case.self_weight is not None:
        raise Unavailable("has no graph over the others")
    limitation = getattr(module, "limitation", lambda case: None)(case)
    if limitation:
        raise Unavailable(limitation)
    return function


def _library(backend: str, case: Case) -> Callable[..., Tensor]:
    from gkd_fast import functional

    op = getattr(functional, case.op)

    def function(*arguments, **options) -> Tensor:
        return op(*arguments, **options, backend=backend)

    return function


def _whole_loss(backend: str, case: Case) -> Callable[..., Tensor]:
    made = {}

    def function(parameters, students, teachers, target, weights) -> Tensor:
        if not made:
            made["criterion"] = criterion([x.shape[1] for x in students], case, backend).to(students[0])
        arguments = (students, teachers, target)
        return torch.func.functional_call(made["criterion"], parameters, arguments, {"weights": weights})

    return function
