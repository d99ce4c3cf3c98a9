"""Calls with one wrong argument, whose error must name it."""

import inspect
import math
import random
from collections.abc import Callable

import numpy as np
import torch

from gkd_fast import GraphKDLoss, functional

from .cases import arguments_of, features

JUNK = [
    None, True, "x", b"x", -1, 0, 2.5, math.nan, math.inf, 1j, (), [], [None], [1.0], {}, {"a": 1}, object(), len,
    np.ones(3), np.float32(-1), np.array(0.1), torch.ones(()), torch.ones(3), torch.ones(2, 3, 4), torch.ones(0, 3),
    torch.ones(3, 0), torch.ones(4, 3).int(), torch.ones(4, 3, dtype=torch.complex64), torch.ones(4, 3, device="meta"),
    torch.ones(4, 3).to_sparse(), [torch.ones(4, 3), torch.ones(5, 3)], [(0, 9)], [0, 1], [(0, 0, 0)], ("a", "b"),
]  # fmt: skip


def try_wrong_argument(case: dict, backend: str) -> str:
    """Calls with one argument exchanged; the call works, or its error names the argument."""
    rng = random.Random(case["seed"])
    if case["function"] == "GraphKDLoss":
        return _try_wrong_option(case, rng)
    function = getattr(functional, case["function"])
    parameters = inspect.signature(function).parameters
    named = arguments_of(case, [x.float() for x in features(case)])
    if "backend" in parameters:
        named["backend"] = backend
    name = rng.choice(sorted(parameters))
    return _judged(function, named, name, rng.randrange(len(JUNK)))


def _try_wrong_option(case: dict, rng: random.Random) -> str:
    """The same of a loss's options; those of its call are the functions'."""
    count, widths = case["students"], case["widths"]
    named = {"student_dims": widths[:count], "teacher_dims": widths[count:], "num_classes": 3, **case["options"]}
    name = rng.choice(sorted(set(inspect.signature(GraphKDLoss).parameters) - {"process_group"}))
    return _judged(GraphKDLoss, named, name, rng.randrange(len(JUNK)))


def _judged(function: Callable, named: dict, name: str, place: int) -> str:
    named[name] = JUNK[place]
    try:
        function(**named)
    except (TypeError, ValueError, RuntimeError) as error:
        # Features elsewhere are no fault: it is the backend that cannot compute there.
        missing = isinstance(error, RuntimeError) and str(error).startswith("backend=")
        named_it = name in str(error) and not isinstance(error, RuntimeError)
        assert missing or named_it, f"JUNK[{place}] as {name}: {type(error).__name__}: {error}"
        return "refused"
    return "taken"
