"""What a random call is: its case as plain values, its features, and the call itself."""

import math
import random
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from gkd_fast import GraphKDLoss, functional, reference

D64 = torch.float64
DTYPES = {"float64": D64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BATCHES = {"cpp": [1, 2, 3, 7, 31, 32, 33, 65, 130, 257], "triton": [1, 2, 5, 17, 18]}
WIDTHS = {"cpp": [1, 2, 5, 16, 33, 70, 129], "triton": [1, 3, 8]}
KINDS = ["random", "random", "near one", "zero rows", "converged", "opposite"]
STRIDES = ["contiguous", "contiguous", "transposed", "columns", "rows", "expanded"]

STAGED = ["graph_conv", "node_contrast", "relation_kl"]
RELATIONS = ["similarity_preserving", "correlation_congruence", "pkt", "rkd_distance", "rkd_angle", "info_nce"]
WITH_BANKS = ["similarity_preserving", "correlation_congruence", "pkt", "rkd_distance", "info_nce"]
MEASURES = ["adaptive_bandwidth", "effective_neighbors", "neighbor_bandwidth"]
FUNCTIONS = STAGED * 2 + RELATIONS + ["kd_divergence", "GraphKDLoss"] + MEASURES


def draw(seed: int, number: int, backend: str) -> dict:
    """The case as plain values."""
    rng = random.Random(f"{seed} {number}")
    case = {
        "function": rng.choice(FUNCTIONS),
        "batch": rng.choice(BATCHES[backend]),
        "dtype": rng.choice(["float64", "float64", "float32", "float32", "bfloat16", "float16"]),
        "order": rng.choice(["first", "first", "second", "bad argument"]),
        "kind": rng.choice(KINDS),
        "strides": rng.choice(STRIDES),
        "tile_rows": rng.choice([0, 32]),
        "autocast": rng.random() < 0.15,
        "spread": rng.choice([0.3, 0.05, 0.02]),
        "seed": rng.randrange(10**6),
        "bank": None,
        "within": "batch",
    }
    if case["function"] in STAGED:
        case |= _stages(case["function"], rng, backend)
    elif case["function"] == "GraphKDLoss":
        case |= _loss(rng, backend)
    else:
        case |= _two_sides(case["function"], rng, backend)
    if case["function"] == "GraphKDLoss":
        # Its parts are drawn in every type.
        case |= {"dtype": "float64", "autocast": False, "order": case["order"].replace("second", "first")}
    # Autocast takes float32; second derivatives are judged in float64.
    if case["autocast"]:
        case["dtype"] = "float32"
    if case["function"] in MEASURES and case["order"] == "second":
        case["order"] = "first"
    if case["order"] == "second":
        case |= {"dtype": "float64", "autocast": False, "batch": min(case["batch"], 65)}
        if case["function"] == "correlation_congruence":
            case["options"]["squared"] = True  # Near 0 a norm has no second derivatives.
    if case["kind"] == "pairs":
        # A node without a partner has weights that hang on what rounding leaves of far cosines, times 1/σ².
        case["batch"] += case["batch"] % 2
    if case["function"] == "kd_divergence" and case["kind"] == "zero rows" and case["dtype"] == "float16":
        case["dtype"] = "float32"  # The slope of standardized constants is 1e7, beyond float16.
    if case["function"] == "rkd_angle":
        # Its definition takes B² D numbers, and its kernels have no second order.
        case |= {"order": case["order"].replace("second", "first"), "batch": min(case["batch"], 33)}
    return case


def _temperature(rng: random.Random) -> float:
    return math.exp(rng.uniform(math.log(0.02), 0))


def _bandwidth(rng: random.Random) -> float:
    return math.exp(rng.uniform(math.log(0.2), math.log(2)))


def _neighbors(rng: random.Random) -> float:
    return rng.choice([1, 2.5, 6, rng.uniform(1, 60)])


def _stages(function: str, rng: random.Random, backend: str) -> dict:
    drawn = {"temperature": _temperature(rng), "bandwidth": _bandwidth(rng), "pairs": None}
    if function == "graph_conv":
        drawn["normalization"] = rng.choice(["symmetric", "row"])
        drawn["bandwidth"] = rng.choice([drawn["bandwidth"], "auto"])
        # So many stages at once; None: one, not in a list.
        drawn["stages"] = rng.choice([None, None, 1, 3])
        drawn["widths"] = [rng.choice(WIDTHS[backend]) for _ in range(2 * (drawn["stages"] or 1))]
        if drawn["stages"] is not None and rng.random() < 0.5:
            drawn["bandwidth"] = [rng.choice([1.0, 0.4, "auto"]) for _ in range(drawn["stages"])]
        # The own message's weight: None, with the own node in the graph.
        drawn["self_weight"] = rng.choice([None, 0.0, 1.0, rng.random(), rng.random()])
        drawn["neighbors"] = _neighbors(rng) if drawn["bandwidth"] == "auto" and rng.random() < 0.7 else None
        if rng.random() < 0.4:
            # Weights of 1, where all of a gradient cancels, but for 1/σ² times what products round.
            drawn |= {"kind": "pairs", "order": "first", "autocast": True, "bandwidth": 0.01, "neighbors": None}
            drawn["self_weight"] = rng.random()
        return drawn
    students, teachers = rng.choice([(1, 1), (1, 1), (2, 1), (1, 3), (2, 2), (3, 3)])
    widths = [rng.choice(WIDTHS[backend]) for _ in range(students + teachers)]
    drawn |= {"students": students, "widths": widths[:1] * len(widths) if function == "node_contrast" else widths}
    every = [(s, t) for s in range(students) for t in range(teachers)]
    if rng.random() < 0.4:
        drawn["pairs"] = sorted(rng.sample(every, rng.randrange(1, len(every) + 1)))
    if rng.random() < 0.4:
        drawn["bank"] = rng.choice([0, 1, 9, 40])
    return drawn


def _loss(rng: random.Random, backend: str) -> dict:
    students, teachers = rng.choice([(1, 1), (2, 1), (2, 2)])
    drawn = {"students": students, "widths": [rng.choice(WIDTHS[backend]) for _ in range(students + teachers)]}
    options = {
        "layers": rng.choice([1, 2]), "normalization": rng.choice(["symmetric", "row"]), "embed_dim": 8,
        "node_temperature": _temperature(rng), "relation_temperature": _temperature(rng),
        "self_weight": rng.choice([None, rng.random()]), "bandwidth": rng.choice([_bandwidth(rng), "auto", "auto"]),
        "pairs": rng.choice(["all", "matched"]) if students == teachers else "all",
    }  # fmt: skip
    options["neighbors"] = _neighbors(rng) if options["bandwidth"] == "auto" and rng.random() < 0.7 else None
    return drawn | {"options": options}


def _two_sides(function: str, rng: random.Random, backend: str) -> dict:
    """Of the functions of a student's features and a teacher's, or of one network's."""
    widths = [rng.choice(WIDTHS[backend]) for _ in range(2)]
    if function == "neighbor_bandwidth":
        return {"widths": widths[:1], "neighbors": _neighbors(rng)}
    if function in MEASURES:
        bandwidth = rng.choice([_bandwidth(rng), "auto"])
        return {"widths": widths[:1], "bandwidth": bandwidth, "others": rng.random() < 0.5}
    drawn = {"widths": widths, "reduction": rng.choice(["mean", "none"])}
    if function in ("info_nce", "kd_divergence"):
        drawn["widths"] = widths[:1] * 2
    options = {
        "similarity_preserving": lambda: {"norm": rng.choice([1, 2])},
        "correlation_congruence": lambda: {
            "kernel": rng.choice(["bilinear", "gaussian"]), "gamma": rng.choice([0.4, 1.0]),
            "order": rng.randrange(1, 6), "squared": rng.random() < 0.5,
        },
        "pkt": lambda: {"eps": rng.choice([1e-7, 1e-7, 1e-3])},
        "info_nce": lambda: {"temperature": _temperature(rng), "symmetric": rng.random() < 0.7},
        "kd_divergence": lambda: {"temperature": rng.uniform(0.5, 8), "standardize": rng.random() < 0.5},
    }.get(function, dict)()  # fmt: skip
    drawn["options"] = options
    if function != "kd_divergence" and rng.random() < 0.3 and _has_graphs(function, options, backend):
        drawn |= {"within": "tokens", "samples": rng.choice([1, 2, 4]), "mask": rng.choice([None, "bool", "int"])}
    elif function in WITH_BANKS and rng.random() < 0.4:
        drawn["bank"] = rng.choice([0, 1, 9, 40])
    if options.get("squared") is False and "within" not in drawn:
        drawn["reduction"] = "mean"  # A norm is no mean of losses per sample.
    return drawn


def _has_graphs(function: str, options: dict, backend: str) -> bool:
    """Whether the backend has kernels of many graphs at once for the function, or PyTorch's products do."""
    by_products = function == "info_nce" or options.get("norm") == 2 or options.get("kernel") == "bilinear"
    return backend == "cpp" or by_products


def features(case: dict) -> list[Tensor]:
    """``[batch, width]``, within tokens ``[samples, batch, width]``, in float64."""
    generator = torch.Generator().manual_seed(case["seed"])
    made: list[Tensor] = []
    lead = (case["samples"],) if case["within"] == "tokens" else ()
    for width in case["widths"]:
        x = torch.randn(*lead, case["batch"], width, dtype=D64, generator=generator)
        half = case["batch"] // 2
        if case["kind"] == "near one":
            x = 1 + case["spread"] * x
        elif case["kind"] == "zero rows":
            x[..., len(made) :: 3, :] = 0
        elif case["kind"] == "converged" and made and made[0].shape == x.shape:
            x = made[0] + 1e-3 * x
        elif case["kind"] == "pairs" and 2 * len(made) < len(case["widths"]):  # of nodes
            x[half : 2 * half] = x[:half] + case["spread"] * x[half : 2 * half]
        elif case["kind"] == "opposite":
            x[..., half:, :] = -x[..., : case["batch"] - half, :]
        if case["strides"] == "expanded":
            x = x[:1].expand_as(x).contiguous()
        made.append(x)
    return made


def laid_out(x: Tensor, strides: str) -> Tensor:
    """The same numbers in memory of another layout."""
    if strides == "transposed":
        return x.mT.contiguous().mT
    if strides == "columns":
        wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
        wide[..., ::2] = x
        return wide[..., ::2]
    if strides == "rows":
        tall = x.new_zeros(3 * x.shape[0], *x.shape[1:])
        tall[1::3] = x
        return tall[1::3]
    if strides == "expanded":
        return _Expanded.apply(x)
    return x


class _Expanded(torch.autograd.Function):
    """The first row in place of all, with the gradients of every row: autograd would add them in the rows' type."""

    @staticmethod
    def forward(ctx, x):
        return x[:1].expand_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def mask_of(case: dict) -> Tensor | None:
    """Which tokens count; of one sample none, where there are several."""
    if case["mask"] is None:
        return None
    generator = torch.Generator().manual_seed(case["seed"] + 2)
    mask = torch.rand(case["samples"], case["batch"], generator=generator) < 0.7
    mask[1:2] = False
    return mask if case["mask"] == "bool" else mask.int()


def bank_of(case: dict, inputs: list[Tensor]) -> list[Tensor] | None:
    """Further rows of the inputs' widths and types."""
    if case["bank"] is None:
        return None
    generator = torch.Generator().manual_seed(case["seed"] + 1)
    return [torch.randn(case["bank"], x.shape[-1], dtype=D64, generator=generator).to(x.dtype) for x in inputs]


def arguments_of(case: dict, inputs: list[Tensor]) -> dict:
    """The call's arguments by name."""
    function = case["function"]
    if function in MEASURES:
        own = {"effective_neighbors": ["bandwidth", "others"], "neighbor_bandwidth": ["neighbors"]}.get(function, [])
        return {"nodes": inputs[0]} | {name: case[name] for name in own}
    if function == "graph_conv":
        half = len(inputs) // 2
        nodes, messages = (inputs[0], inputs[1]) if case["stages"] is None else (inputs[:half], inputs[half:])
        named = {"nodes": nodes, "messages": messages, "normalization": case["normalization"]}
        return named | {name: case[name] for name in ("bandwidth", "neighbors", "self_weight")}
    bank = bank_of(case, inputs)
    if function not in STAGED:
        named = {"students": inputs[0], "teachers": inputs[1], "reduction": case["reduction"], **case["options"]}
        if case["within"] == "tokens":
            named |= {"within": "tokens", "mask": mask_of(case)}
        if bank is None:
            return named
        if function == "info_nce":
            return named | {"bank": bank[1]}
        return named | {"bank": tuple(bank) if case["seed"] % 2 else ([bank[0]], [bank[1]])}
    count = case["students"]
    named = {"students": inputs[:count], "teachers": inputs[count:], "temperature": case["temperature"]}
    named["pairs"] = case["pairs"]
    if function == "relation_kl":
        named["bandwidth"] = case["bandwidth"]
    if bank is not None:
        named["bank"] = (bank[:count], bank[count:]) if function == "relation_kl" else bank[count:]
    return named


def loss_of(case: dict, *inputs: Tensor, backend: str) -> Tensor:
    """A GraphKDLoss of fixed parameters, of given targets."""
    count, widths = case["students"], case["widths"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case["seed"])
        criterion = GraphKDLoss(widths[:count], widths[count:], num_classes=3, backend=backend, **case["options"])
    target = torch.arange(case["batch"]) % 3
    loss = criterion.to(inputs[0].dtype).eval()(list(inputs[:count]), list(inputs[count:]), target)
    return loss + 0 * sum(x.sum() for x in inputs[count:])  # Teachers have no gradient.


def function_of(case: dict, backend: str) -> Callable[..., Tensor]:
    """The case's function of its features, on ``backend``, where another is not asked for."""

    def call(*inputs: Tensor, backend: str = backend) -> Tensor:
        inputs = tuple(laid_out(x, case["strides"]) for x in inputs)
        if case["function"] == "GraphKDLoss":
            return loss_of(case, *inputs, backend=backend)
        if case["function"] in WITHOUT_BACKENDS and backend == "reference":
            return WITHOUT_BACKENDS[case["function"]](**arguments_of(case, list(inputs)))
        chosen = {} if case["function"] in WITHOUT_BACKENDS else {"backend": backend}
        is_short = case["autocast"] and backend != "reference"
        with torch.autocast("cpu", torch.bfloat16) if is_short else nullcontext():
            output = getattr(functional, case["function"])(**arguments_of(case, list(inputs)), **chosen)
        if isinstance(output, list):
            output = torch.cat(output, dim=1)
        return output.to(inputs[0].dtype) if case["autocast"] else output

    return call


def _divergence(students, teachers, temperature, standardize, reduction) -> Tensor:
    def probabilities(x: Tensor) -> Tensor:
        if standardize:
            x = x - x.mean(dim=1, keepdim=True)
            moving = (x != 0).any(dim=1, keepdim=True)
            norm = torch.linalg.vector_norm(torch.where(moving, x, 1), dim=1, keepdim=True)
            x = x / (torch.where(moving, norm / max(x.shape[1] - 1, 1) ** 0.5, 0) + 1e-7)
        return torch.log_softmax(x / temperature, dim=1)

    p, q = probabilities(students), probabilities(teachers)
    losses = temperature**2 * torch.nn.functional.kl_div(p, q, reduction="none", log_target=True).sum(dim=1)
    return losses if reduction == "none" else losses.mean()


def _mean_distance(nodes: Tensor) -> Tensor:
    e = reference.unit_rows(nodes)
    distances = (1 - e @ e.T).clamp(min=0).fill_diagonal_(0)
    return (
        (0.5 * distances.sum() / max(len(e) * (len(e) - 1), 1)).sqrt().clamp(min=0.01) if len(e) > 1 else e.new_ones(())
    )


# Functions that are ordinary PyTorch on every backend, and what they should be.
WITHOUT_BACKENDS = {"kd_divergence": _divergence, "adaptive_bandwidth": _mean_distance}
