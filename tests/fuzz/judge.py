"""How much a fused result may err, by the conditioning of what is computed."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from gkd_fast import functional, reference
from tests.ops_cases import results, with_rounded_rows
from tests.precision_cases import BOUND
from tests.second_order_cases import second_order

from .cases import D64, DTYPES, MEASURES, STAGED, arguments_of, bank_of, features, function_of, laid_out, mask_of

# A single draw of roundings against another, beside the factor 2 that the tests' means of draws keep.
LUCK = 8
SINGLE = torch.finfo(torch.float32).eps
# How near the search for a number of neighbours comes, of it.
SEARCHED = 0.02
# Of functions of distances of the features as they are, which know no unit rows.
OF_DISTANCES = ("rkd_distance", "rkd_angle")


def judge(case: dict, backend: str) -> None:
    """Raises AssertionError where the fused backend errs more than it may."""
    inputs = features(case)
    if case["function"] == "graph_conv" and case["neighbors"] is not None:
        case = _with_found_bandwidth(case, backend, inputs)
    fused, definition = function_of(case, backend), function_of(case, "reference")
    if case["function"] in MEASURES:
        measured = _measures(case, backend, fused, definition, inputs)
    elif case["order"] == "second":
        measured = _second_order(case, backend, inputs)
    elif case["autocast"]:
        measured = _autocast(case, fused, definition, inputs)
    else:
        measured = _first_order(case, backend, fused, definition, inputs)
    for k, (error, allowed) in enumerate(measured):
        assert error <= allowed, f"result {k}: error {error:.3g}, allowed {allowed:.3g}"


def gain_of(case: dict) -> float:
    """By how much a rounding of the similarities is magnified in results of the size 1."""
    function = case["function"]
    if function in MEASURES or function in STAGED:
        sharpness = 1 / case["temperature"] if function in ("node_contrast", "relation_kl") else 1.0
        if function == "adaptive_bandwidth":
            return 100.0  # a root of at least 0.01
        if function != "node_contrast":
            bandwidths = case["bandwidth"] if isinstance(case["bandwidth"], list) else [case["bandwidth"]]
            sharpness /= min(0.01 if isinstance(each, str) else float(each) for each in bandwidths) ** 2
        return sharpness
    options = case["options"]
    if function == "GraphKDLoss":
        sigma = 0.01 if options["bandwidth"] == "auto" else options["bandwidth"]
        return (1 / options["node_temperature"] + 1 / options["relation_temperature"]) / sigma**2
    return {
        # The size of what losses are differences of.
        "similarity_preserving": lambda: 10.0,
        "correlation_congruence": lambda: 10.0,
        "kd_divergence": lambda: 10 * options["temperature"] ** 2,
        # (q + ε)/(p + ε) where p is 0 and q 1/B.
        "pkt": lambda: 1 + 1 / (options["eps"] * case["batch"]),
        "info_nce": lambda: 1 / options["temperature"],
    }.get(function, lambda: 1.0)()


def shortness_of(case: dict, inputs: list[Tensor]) -> float:
    """1/‖x‖ of the shortest row, at least 1, by which gradients of functions of unit rows grow."""
    if case["function"] in OF_DISTANCES:
        return 1.0
    norms = torch.cat([torch.linalg.vector_norm(x.detach().double(), dim=-1).flatten() for x in inputs])
    return max(1.0, 1 / norms[norms > 0].min().item()) if (norms > 0).any() else 1.0


def crowd_of(case: dict) -> int:
    """How many results of the size 1 are added to a gradient: of pairs."""
    return max(case.get("students", 1), len(case["widths"]) - case.get("students", 1))


def digits_lost(case: dict, inputs: list[Tensor], eps: float) -> tuple[float, float]:
    """What differences of numbers that nearly agree err by: sizes of the output's errors and of the gradients'.

    ‖K^s − K^t‖ of bilinear kernels is the root of a difference of sums of the size B².
    """
    if case["function"] in OF_DISTANCES:
        return _of_distances(case, inputs, eps)[:2]
    if case["function"] == "correlation_congruence" and not case["options"]["squared"]:
        least = _least_norm(case, inputs)
        rest = 4 * LUCK * eps
        return rest / max(least, rest**0.5), min(1, rest / max(least**2, eps)) * shortness_of(case, inputs)
    return 0.0, 0.0


def _least_norm(case: dict, inputs: list[Tensor]) -> float:
    """The least of the graphs' norms, in float64."""
    with torch.no_grad():
        norms = function_of(case, "reference")(*(x.detach().double() for x in inputs))
    return norms[norms > 0].min().item() if (norms > 0).any() else 0.0


def _of_distances(case: dict, inputs: list[Tensor], eps: float) -> tuple[float, float, float]:
    """By how much output, gradients and second derivatives err where every pair's d² loses the share δ of itself.

    d² = n_i + n_j − 2x_ij, n = ‖x‖² of rows about their mean, so that δ_ij = ε (n_i + n_j)/d²_ij, at most 1: of all of
    its direction. A row's sums have the means of its partners' errors, not the largest. With κ the distances' inverse
    mean, rkd_distance's output errs by κ d δ and its gradients by κ δ (1 + κ d), which change by (1/d + κ) times a
    direction's entries, up to 4; rkd_angle's cosines err by δ and their gradients by δ/d. Twice that, of either side,
    and rkd_distance's gradients once more, since a row has them as a row and as all others' partner.
    """
    mask = mask_of(case) if case["within"] == "tokens" else None
    output, gradients, seconds = 0.0, 0.0, 0.0
    banks = bank_of(case, inputs) or [x[..., :0, :] for x in inputs]
    for x, bank in zip(inputs, banks, strict=True):
        rows = x.shape[-2]
        x = torch.cat([x.detach().double(), bank.detach().double()], dim=-2)
        counted = torch.ones(x.shape[:-1], dtype=D64) if mask is None else mask.to(D64)
        number = counted.sum(dim=-1, keepdim=True).clamp(min=1)
        x = x - ((counted[..., None] * x).sum(dim=-2) / number)[..., None, :]
        squares = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()
        sizes = x.square().sum(dim=-1)
        apart = (squares > 0) & (counted[..., :, None] * counted[..., None, :] > 0)
        shares = 3 * LUCK * eps * (sizes[..., :, None] + sizes[..., None, :]) / torch.where(apart, squares, 1)
        lost = torch.where(apart, shares.clamp(max=1), 0)
        distance = torch.where(apart, squares, 1).sqrt()

        def of_rows(errors: Tensor, number: Tensor = number, apart: Tensor = apart, rows: int = rows) -> Tensor:
            return torch.where(apart, errors, 0).sum(dim=-1)[..., :rows] / number

        if case["function"] == "rkd_angle":
            output = max(output, 2 * of_rows(lost).max().item())
            errors = of_rows(lost / distance) + of_rows(lost).amax(dim=-1, keepdim=True) * of_rows(1 / distance)
            gradients = max(gradients, 2 * errors.max().item())
            continue
        pairs = ((number - len(bank)) * (number - 1)).clamp(min=1)[..., None]
        means = torch.where(apart, distance, 0)[..., :rows, :].sum(dim=(-1, -2), keepdim=True) / pairs
        means = means.clamp(min=1e-6)
        output = max(output, 2 * of_rows(lost * distance / means).max().item())
        gradients = max(gradients, 4 * of_rows(lost * (1 + distance / means) / means).max().item())
        growth = 1 / distance + 1 / means
        seconds = max(seconds, 4 * LUCK * of_rows(lost * (1 + distance / means) * growth / means).max().item())
    return output, gradients, seconds


def _second_order(case: dict, backend: str, inputs: list[Tensor]) -> list[tuple[float, float]]:
    inputs = [x.requires_grad_() for x in inputs]
    shape = function_of(case, "reference")(*inputs).shape
    upstream = torch.rand(shape, dtype=D64, generator=torch.Generator().manual_seed(7))
    found, truth = (second_order(function_of(case, b), inputs, upstream, b) for b in (backend, "reference"))
    # The definition's own second derivatives lose digits where it divides by what it then multiplies with.
    growth = shortness_of(case, inputs) ** 2 * crowd_of(case)
    gain = gain_of(case) * growth
    of_distances = case["function"] in OF_DISTANCES
    lost = _of_distances(case, inputs, 1e-15)[2] * crowd_of(case) if of_distances else 0.0
    bounds = [1e-10 * max(1, gain) * max(1, y.abs().max().item()) + lost for y in truth]
    return [((x - y).abs().max().item(), bound) for x, y, bound in zip(found, truth, bounds, strict=True)]


def _first_order(case: dict, backend: str, fused: Callable, definition: Callable, inputs: list[Tensor]):
    """float64 against the definition; of other types what plain PyTorch in the type errs by, or in float64 of rounded
    rows."""
    dtype = DTYPES[case["dtype"]]
    inputs = [x.to(dtype) for x in inputs]
    exact = [x.double() for x in inputs]
    truth, found = results(definition, exact, dtype), results(fused, inputs, dtype)
    assert [x.dtype for x in found[1:]] == [dtype] * len(inputs)
    gain, growth = gain_of(case), shortness_of(case, inputs) * crowd_of(case)
    if dtype == D64:
        return _compared(found, truth, 1e-10, 1e-10 + 1e-13 * gain, growth, digits_lost(case, inputs, 1e-15))
    plain = [results(definition, inputs, dtype)]
    if not all(x.isfinite().all() for x in plain[0]):
        plain = [results(definition, [x.float() for x in inputs], dtype)]
    # Rows of few numbers may be exact in the type, but not less their mean: then the promised bound is what holds.
    bound = 0.0
    if dtype == torch.bfloat16:
        plain.append(with_rounded_rows(lambda: results(definition, exact, dtype)))
        bound = BOUND
    rounding = SINGLE * LUCK
    if backend == "triton" and dtype.itemsize == 2:  # Products of float16 operands on GPUs; C++ multiplies wider.
        rounding = torch.finfo(dtype).eps
    allowed = _compared(found, truth, bound, rounding * gain, growth, digits_lost(case, inputs, SINGLE))
    more = [
        2 * LUCK * max((z[k].double() - y).abs().max().item() for z in plain)
        + LUCK * torch.finfo(found[k].dtype).eps / 2 * y.abs().max().item()
        for k, y in enumerate(truth)
    ]
    return [(error, most + extra) for (error, most), extra in zip(allowed, more, strict=True)]


def _autocast(case: dict, fused: Callable, definition: Callable, inputs: list[Tensor]):
    inputs = [x.float() for x in inputs]
    exact = [x.double() for x in inputs]
    truth = results(definition, exact)
    rounded = [with_rounded_rows(lambda: results(definition, exact))]
    if min(case["widths"]) < 16:
        # One rounding of a few numbers may be a lucky one, and the differences of losses over several stages cancel.
        rounded += [results(definition, _half_a_step_off(exact, draw)) for draw in range(3)]
    gain, growth = gain_of(case), shortness_of(case, inputs) * crowd_of(case)
    # Of a few numbers' roundings the errors do not average out.
    share = 2e-2 if min(case["widths"]) >= 16 else 4e-2
    absolute = LUCK * SINGLE * gain
    if case["function"] == "graph_conv":
        # Where weights are 1, products of upstream and messages, of the size √K, cancel.
        absolute = max(LUCK, 2 * max(case["widths"][1::2]) ** 0.5) * SINGLE * gain
        # Means over nodes of numbers of the size 1, which may cancel where their roundings do not.
        absolute += torch.finfo(torch.bfloat16).eps / case["batch"] ** 0.5
    found = results(fused, inputs)
    allowed = _compared(found, truth, share, absolute, growth, digits_lost(case, inputs, SINGLE))
    more = [LUCK * max((z[k] - y).abs().max().item() for z in rounded) for k, y in enumerate(truth)]
    return [(error, most + extra) for (error, most), extra in zip(allowed, more, strict=True)]


def _half_a_step_off(inputs: list[Tensor], draw: int) -> list[Tensor]:
    """The inputs with every entry half a step of bfloat16 up or down."""
    generator = torch.Generator().manual_seed(draw)
    signs = [torch.randint(0, 2, x.shape, generator=generator) * 2 - 1 for x in inputs]
    return [x * (1 + sign * torch.finfo(torch.bfloat16).eps / 2) for x, sign in zip(inputs, signs)]


def _compared(found, truth, relative: float, absolute: float, growth: float, lost: tuple[float, float]):
    """The largest errors, and what is allowed: shares of the largest entry, and sizes, gradients' ``growth`` times."""
    of_output, of_gradients = lost
    compared = []
    for k, (x, y) in enumerate(zip(found, truth, strict=True)):
        size = absolute * growth + of_gradients if k else absolute + of_output
        compared.append((_error(x, y), relative * y.abs().max().item() + size))
    return compared


def _error(found: Tensor, truth: Tensor) -> float:
    """The largest; infinity is right where the truth rounded to the type is."""
    right = found.isinf() & (found == truth.to(found.dtype))
    return torch.where(right, 0, found.double() - truth).abs().max().item()


def _with_found_bandwidth(case: dict, backend: str, inputs: list[Tensor]) -> dict:
    """The case with the bandwidths that the fused backend finds in place of ``neighbors``; AssertionError where these
    give other numbers of neighbours, or another result than they do."""
    inputs = [x.to(torch.float32 if case["autocast"] else DTYPES[case["dtype"]]) for x in inputs]
    nodes = arguments_of(case, inputs)["nodes"]
    found = []
    for x in [nodes] if isinstance(nodes, Tensor) else nodes:
        sigma, (error, allowed) = _found_bandwidth(case, backend, x)
        assert error <= allowed, f"neighbours: error {error:.3g}, allowed {allowed:.3g}"
        found.append(sigma)
    given = case | {"bandwidth": found[0] if isinstance(nodes, Tensor) else found, "neighbors": None}
    assert torch.equal(*(function_of(each, backend)(*inputs) for each in (case, given)))
    return given


def _found_bandwidth(case: dict, backend: str, nodes: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """The bandwidth that a backend finds, and by how much the nodes' mean number of neighbours may err and does.

    As much as that of the definition's search, which ends at the nearest number that the nodes can have, and by the
    conditioning of the number, (Σ K)²/Σ K²: three sums' errors.
    """
    k = case["neighbors"]
    with torch.autocast("cpu", torch.bfloat16) if case["autocast"] else nullcontext():
        sigma = functional.neighbor_bandwidth(laid_out(nodes, case["strides"]), k, backend=backend)
    exact = laid_out(nodes, case["strides"]).double()
    ideal = functional.neighbor_bandwidth(exact, k, backend="reference")
    found, reached = (reference.effective_neighbors(exact, x.double()).mean().item() for x in (sigma, ideal))
    allowed = 2 * abs(reached - k) + SEARCHED * k
    return sigma, (abs(found - k), allowed + LUCK * _rounding_of(case) * 3 * max(1, sigma.item() ** -2) * max(1, found))


def _rounding_of(case: dict) -> float:
    """That of the similarities."""
    dtype = DTYPES[case["dtype"]]
    return torch.finfo(torch.bfloat16 if case["autocast"] or dtype.itemsize == 2 else dtype).eps


def _measures(case: dict, backend: str, fused: Callable, definition: Callable, inputs: list[Tensor]):
    """Functions without gradient, whose results are of the size 1 or of so many neighbours."""
    dtype = DTYPES[case["dtype"]]
    inputs = [x.to(dtype) for x in inputs]
    if case["function"] == "neighbor_bandwidth":
        return [_found_bandwidth(case, backend, inputs[0])[1]]
    found, truth = fused(*inputs).double(), definition(*[x.double() for x in inputs])
    rounding = _rounding_of(case)
    gain = max(1, gain_of(case))
    if case["function"] == "effective_neighbors":
        gain *= 3  # (Σ K)²/Σ K²: three sums' errors
    return [((found - truth).abs().max().item(), LUCK * rounding * gain * max(1, truth.abs().max().item()))]
