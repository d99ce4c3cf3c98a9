"""Random calls of the public functions: ``python -m tests.fuzz --seconds 300 --seed 0``.

The fused backend that computes on this CPU (C++, or with TRITON_INTERPRET=1 the interpreted Triton kernels) against the
reference in float64, output and first and second derivatives; and calls with one wrong argument, whose error must name
it. A failure prints its case, which ``--case`` runs again. Case k of a seed is always the same.
"""

import argparse
import math
import random
import sys
import time
import traceback
from collections import Counter
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor

from gkd_fast import functional

from .ops_cases import FUSED, _errors, results, with_rounded_rows
from .precision_cases import BOUND
from .second_order_cases import second_order

D64 = torch.float64
DTYPES = {"float64": D64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BATCHES = {"cpp": [1, 2, 3, 7, 31, 32, 33, 65, 130, 257], "triton": [1, 2, 5, 17, 18]}
WIDTHS = {"cpp": [1, 2, 5, 16, 33, 70, 129], "triton": [1, 3, 8]}
KINDS = ["random", "random", "near one", "zero rows", "converged", "opposite"]
STRIDES = ["contiguous", "contiguous", "transposed", "columns", "rows"]
# A single draw of roundings against another, beside the factor 2 that the tests' means of draws keep.
LUCK = 8
SINGLE = torch.finfo(torch.float32).eps


def draw(seed: int, number: int, backend: str) -> dict:
    """The case as plain values."""
    rng = random.Random(f"{seed} {number}")
    case = {
        "function": rng.choice(["graph_conv", "node_contrast", "relation_kl"]),
        "batch": rng.choice(BATCHES[backend]),
        "dtype": rng.choice(["float64", "float64", "float32", "float32", "bfloat16", "float16"]),
        "order": rng.choice(["first", "first", "second", "bad argument"]),
        "kind": rng.choice(KINDS),
        "strides": rng.choice(STRIDES),
        "tile_rows": rng.choice([0, 32]),
        "autocast": rng.random() < 0.15,
        "temperature": math.exp(rng.uniform(math.log(0.02), 0)),
        "bandwidth": math.exp(rng.uniform(math.log(0.2), math.log(2))),
        "normalization": rng.choice(["symmetric", "row"]),
        "spread": rng.choice([0.3, 0.05, 0.02]),
        "seed": rng.randrange(10**6),
    }
    students, teachers = rng.choice([(1, 1), (1, 1), (2, 1), (1, 3), (2, 2), (3, 3)])
    if case["function"] == "graph_conv":
        students = teachers = 1
        case["bandwidth"] = rng.choice([case["bandwidth"], "auto"])
    widths = [rng.choice(WIDTHS[backend]) for _ in range(students + teachers)]
    case["widths"] = widths[:1] * len(widths) if case["function"] == "node_contrast" else widths
    case["students"] = students
    every = [(s, t) for s in range(students) for t in range(teachers)]
    losses = case["function"] != "graph_conv"
    case["pairs"] = (
        sorted(rng.sample(every, rng.randrange(1, len(every) + 1))) if losses and rng.random() < 0.4 else None
    )
    case["bank"] = rng.choice([0, 1, 9, 40]) if losses and rng.random() < 0.4 else None
    # graph_conv of so many stages at once; None: of one, not in a list.
    case["stages"] = rng.choice([None, None, 1, 3]) if case["function"] == "graph_conv" else None
    if case["stages"] is not None:
        case["widths"] = [rng.choice(WIDTHS[backend]) for _ in range(2 * case["stages"])]
        if rng.random() < 0.5:
            case["bandwidth"] = [rng.choice([1.0, 0.4, "auto"]) for _ in range(case["stages"])]
    # Autocast takes float32; second derivatives are judged in float64.
    if case["autocast"]:
        case["dtype"] = "float32"
    if case["order"] == "second":
        case |= {"dtype": "float64", "autocast": False, "batch": min(case["batch"], 65)}
    return case


def features(case: dict) -> list[Tensor]:
    generator = torch.Generator().manual_seed(case["seed"])
    made: list[Tensor] = []
    for width in case["widths"]:
        x = torch.randn(case["batch"], width, dtype=D64, generator=generator)
        if case["kind"] == "near one":
            x = 1 + case["spread"] * x
        elif case["kind"] == "zero rows":
            x[len(made) :: 3] = 0
        elif case["kind"] == "converged" and made and made[0].shape == x.shape:
            x = made[0] + 1e-3 * x
        elif case["kind"] == "opposite":
            x[len(x) // 2 :] = -x[: len(x) - len(x) // 2]
        made.append(x)
    return made


def laid_out(x: Tensor, strides: str) -> Tensor:
    """The same numbers in memory of another layout."""
    if strides == "transposed":
        return x.T.contiguous().T
    if strides == "columns":
        wide = x.new_zeros(x.shape[0], 2 * x.shape[1])
        wide[:, ::2] = x
        return wide[:, ::2]
    if strides == "rows":
        tall = x.new_zeros(3 * x.shape[0], x.shape[1])
        tall[1::3] = x
        return tall[1::3]
    return x


def arguments_of(case: dict, inputs: list[Tensor]) -> dict:
    """The call's arguments by name."""
    if case["function"] == "graph_conv":
        half = len(inputs) // 2
        nodes, messages = (inputs[0], inputs[1]) if case["stages"] is None else (inputs[:half], inputs[half:])
        named = {"nodes": nodes, "messages": messages, "normalization": case["normalization"]}
        return named | {"bandwidth": case["bandwidth"]}
    students, teachers = inputs[: case["students"]], inputs[case["students"] :]
    named = {"students": students, "teachers": teachers, "temperature": case["temperature"], "pairs": case["pairs"]}
    if case["function"] == "relation_kl":
        named["bandwidth"] = case["bandwidth"]
    if case["bank"] is not None:
        generator = torch.Generator().manual_seed(case["seed"] + 1)
        rows = [torch.randn(case["bank"], x.shape[1], dtype=D64, generator=generator).to(x.dtype) for x in inputs]
        sides = rows[: case["students"]], rows[case["students"] :]
        named["bank"] = sides if case["function"] == "relation_kl" else sides[1]
    return named


def function_of(case: dict, backend: str):
    def call(*inputs: Tensor, backend: str = backend) -> Tensor:
        inputs = [laid_out(x, case["strides"]) for x in inputs]
        context = (
            torch.autocast("cpu", torch.bfloat16) if case["autocast"] and backend != "reference" else nullcontext()
        )
        with context:
            output = getattr(functional, case["function"])(**arguments_of(case, inputs), backend=backend)
        if isinstance(output, list):
            output = torch.cat(output, dim=1)
        return output.to(inputs[0].dtype) if case["autocast"] else output

    return call


def gain_of(case: dict) -> float:
    """By how much exponents magnify a rounding of the cosines."""
    sharpness = 1 / case["temperature"] if case["function"] != "graph_conv" else 1.0
    if case["function"] != "node_contrast":
        bandwidths = case["bandwidth"] if isinstance(case["bandwidth"], list) else [case["bandwidth"]]
        sharpness /= min(0.01 if each == "auto" else each for each in bandwidths) ** 2
    return sharpness


def judge(case: dict, backend: str) -> None:
    """Raises AssertionError where the fused backend errs more than it may."""
    inputs, dtype, gain = features(case), DTYPES[case["dtype"]], gain_of(case)
    fused, definition = function_of(case, backend), function_of(case, "reference")
    if case["order"] == "second":
        inputs = [x.requires_grad_() for x in inputs]
        shape = definition(*inputs).shape
        upstream = torch.rand(shape, dtype=D64, generator=torch.Generator().manual_seed(7))
        found, truth = (second_order(function_of(case, b), inputs, upstream, b) for b in (backend, "reference"))
        # The definition's own second derivatives lose digits where it divides by what it then multiplies with.
        bounds = [1e-10 * max(1, gain) * max(1, y.abs().max().item()) for y in truth]
        measured = [((x - y).abs().max().item(), bound) for x, y, bound in zip(found, truth, bounds, strict=True)]
    elif case["autocast"]:
        inputs = [x.float() for x in inputs]
        truth = results(definition, [x.double() for x in inputs])
        rounded = with_rounded_rows(lambda: results(definition, [x.double() for x in inputs]))
        # Of a few numbers' roundings the errors do not average out.
        share = 2e-2 if min(case["widths"]) >= 16 else 4e-2
        measured = [
            (
                (x.double() - y).abs().max().item(),
                LUCK * (z - y).abs().max().item() + share * y.abs().max().item() + 2 * SINGLE * gain,
            )
            for x, y, z in zip(results(fused, inputs), truth, rounded, strict=True)
        ]
    else:
        luck = 1 if dtype == D64 else LUCK
        errors = _errors(fused, definition, inputs, dtype, gain)
        more = 1e-13 * gain if dtype == D64 else 0.0
        if backend == "triton" and dtype.itemsize == 2:  # Products of float16 operands on GPUs; C++ multiplies wider.
            more = torch.finfo(dtype).eps * gain
        # Rows of few numbers may be exact in the type, but not less their mean: then the promised bound is what holds.
        bound = BOUND if dtype == torch.bfloat16 else 0.0
        sizes = [y.abs().max().item() for y in results(definition, [x.to(dtype).double() for x in inputs])]
        measured = [(e, luck * allowed + more + bound * size) for (e, allowed), size in zip(errors, sizes, strict=True)]
    for k, (error, allowed) in enumerate(measured):
        assert error <= allowed, f"result {k}: error {error:.3g}, allowed {allowed:.3g}"


JUNK = [
    None, True, "x", b"x", -1, 0, 2.5, math.nan, math.inf, 1j, (), [], [None], [1.0], {}, {"a": 1}, object(), len,
    np.ones(3), np.float32(-1), np.array(0.1), torch.ones(()), torch.ones(3), torch.ones(2, 3, 4), torch.ones(0, 3),
    torch.ones(3, 0), torch.ones(4, 3).int(), torch.ones(4, 3, dtype=torch.complex64), torch.ones(4, 3, device="meta"),
    torch.ones(4, 3).to_sparse(), [torch.ones(4, 3), torch.ones(5, 3)], [(0, 9)], [0, 1], [(0, 0, 0)], ("a", "b"),
]  # fmt: skip


def try_bad_argument(case: dict, backend: str) -> str:
    """Calls with one argument exchanged; the call works, or its error names the argument."""
    rng = random.Random(case["seed"])
    named = arguments_of(case, [x.float() for x in features(case)]) | {"backend": backend, "process_group": None}
    if case["function"] != "graph_conv":
        named.setdefault("bank", None)
    name = rng.choice(sorted(named))
    place = rng.randrange(len(JUNK))
    named[name] = JUNK[place]
    try:
        getattr(functional, case["function"])(**named)
    except (TypeError, ValueError, RuntimeError) as error:
        assert name in str(error), f"JUNK[{place}] as {name}: {type(error).__name__}: {error}"
        assert not isinstance(error, RuntimeError) or name == "backend", f"JUNK[{place}] as {name}: {error}"
        return "refused"
    return "taken"


def run(seed: int, number: int, backend: str) -> str:
    """Runs a case; returns what it was."""
    case = draw(seed, number, backend)
    try:
        with tiles_of(case, backend):
            if case["order"] == "bad argument":
                return f"bad argument, {try_bad_argument(case, backend)}"
            judge(case, backend)
        return f"{case['function']}, {case['order']} order"
    except Exception as error:
        raise RuntimeError(f"case {number} of seed {seed} on {backend}: {case}") from error


@contextmanager
def tiles_of(case: dict, backend: str):
    """Small tiles, so that small batches have several."""
    if backend == "triton":
        from gkd_fast.kernels.common import table

        with table.forced(16, 16):
            yield
        return
    from gkd_fast import _C

    _C._set_block(case["tile_rows"])
    try:
        yield
    finally:
        _C._set_block(0)


def fuzz(seconds: float, seed: int, backend: str, first: int = 0) -> tuple[Counter, list[Exception]]:
    """Cases from ``first`` on for so many seconds: how many of what kind, and the failures."""
    done: Counter = Counter()
    failures = []
    end = time.monotonic() + seconds
    number = first
    while time.monotonic() < end:
        try:
            done[run(seed, number, backend)] += 1
        except RuntimeError as error:
            failures.append(error)
        number += 1
    return done, failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this case alone")
    arguments = parser.parse_args()
    if FUSED is None:
        sys.exit("no fused backend computes on this CPU")
    torch.set_num_threads(1)
    if arguments.case is not None:
        print(draw(arguments.seed, arguments.case, FUSED))
        print(run(arguments.seed, arguments.case, FUSED))
        return
    done, failures = fuzz(arguments.seconds, arguments.seed, FUSED)
    for failure in failures:
        print(failure)
        print("   ", *traceback.format_exception_only(failure.__cause__), end="")
    print(f"{sum(done.values())} cases on {FUSED}, {len(failures)} failures: {dict(sorted(done.items()))}")
    if failures:
        sys.exit(f"again with: python -m tests.fuzz --seed {arguments.seed} --case NUMBER")


if __name__ == "__main__":
    main()
