"""The public functions: check the arguments, choose the backend and the precision, and call it.

Every function takes raw features, L2-normalises their rows and is differentiable; backend="reference" any number of
times, "cpp" and "triton" twice, with respect to every input and the upstream (one more derivative or forward mode is an
error there, never a silent zero).
"""

import math
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from gkd_fast import ops, reference

BACKENDS = ("auto", "reference", "cpp", "triton")
NORMALIZATIONS = ("symmetric", "row")

# Adaptive bandwidth: σ² = BANDWIDTH_SHARE · mean over i ≠ j of (1 − c_ij), at least MIN_BANDWIDTH².
BANDWIDTH_SHARE = 0.5
MIN_BANDWIDTH = 0.01


def graph_conv(
    nodes: Tensor,
    messages: Tensor,
    *,
    bandwidth: float | Tensor | str = "auto",
    normalization: str = "symmetric",
    backend: str = "auto",
) -> Tensor:
    """One graph convolution over the batch: the normalised adjacency of ``nodes`` times ``messages``.

    A_ij = exp((e_i·e_j − 1)/σ²) with e the L2-normalised rows of ``nodes`` and A_ii = 1, normalised as
    D^-1/2 A D^-1/2 (``"symmetric"``) or D^-1 A (``"row"``).

    Args:
        nodes: ``[B, D]``, floating point.
        messages: ``[B, K]``, of the nodes' type and device.
        bandwidth: σ > 0, a number or a 0-dim tensor (taken without gradient), or ``"auto"``:
            :func:`adaptive_bandwidth` of the nodes.
        normalization: ``"symmetric"`` or ``"row"``.
        backend: ``"auto"``, ``"reference"``, ``"cpp"`` or ``"triton"``.

    Returns:
        ``[B, K]``, of the messages' type.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, type, device or value.
        RuntimeError: the chosen backend is not available here.
    """
    _check_features("nodes", nodes)
    _check_features("messages", messages)
    if len(messages) != len(nodes):
        raise ValueError(f"messages must have as many rows as nodes ({len(nodes)}), got {len(messages)}")
    dtype = _compute_dtype({"nodes": nodes, "messages": messages})
    check_graph_options(bandwidth, normalization, backend)
    sigma = _bandwidth(bandwidth, nodes, dtype)
    fused = _select_backend(backend, nodes) != "reference"
    precision = _product_precision(nodes)
    with autocast_disabled(nodes):
        if not fused:
            return reference.graph_conv(nodes.to(dtype), messages.to(dtype), sigma, normalization).to(messages.dtype)
        (unit,) = ops.unit_rows([nodes], dtype)
        output = ops.graph_conv(unit, messages.to(dtype), _inverse_variance(sigma, unit), normalization, precision)
        return output.to(messages.dtype)


def node_contrast(
    students: Tensor | Sequence[Tensor],
    teachers: Tensor | Sequence[Tensor],
    *,
    temperature: float = 0.1,
    pairs: Sequence[tuple[int, int]] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Contrast of every student node with the teacher's nodes: −log softmax_j(ŝ_b·t̂_j/τ)[b].

    Args:
        students: ``[B, D]``, or a sequence of S such tensors, all of one width.
        teachers: ``[B, D]``, or a sequence of T such tensors, of the students' width.
        temperature: τ > 0.
        pairs: the (student, teacher) stage pairs that are wanted, all by default; the loss of the others is 0.
        backend: ``"auto"``, ``"reference"``, ``"cpp"`` or ``"triton"``.

    Returns:
        The losses per sample and pair, ``[B, S, T]``, ≥ 0, in float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: an argument has a wrong shape, type, device or value.
        RuntimeError: the chosen backend is not available here.
    """
    students, teachers, dtype = _check_stages(students, teachers)
    widths = {x.shape[1] for x in (*students, *teachers)}
    if len(widths) > 1:
        raise ValueError(f"students and teachers must share one width in node_contrast, got {sorted(widths)}")
    check_positive("temperature", temperature)
    wanted = _check_pairs(pairs, len(students), len(teachers))
    fused = _select_backend(backend, students[0]) != "reference"
    precision = _product_precision(students[0])
    with autocast_disabled(students[0]):
        if fused:
            unit = ops.unit_rows([*students, *teachers], dtype)
            flat = [True] * (len(students) * len(teachers)) if wanted is None else sum(wanted, [])
            return ops.node_contrast(unit[: len(students)], unit[len(students) :], flat, temperature, precision)
        losses = reference.node_contrast([x.to(dtype) for x in students], [x.to(dtype) for x in teachers], temperature)
        return losses if wanted is None else losses * torch.tensor(wanted, dtype=dtype, device=losses.device)


def relation_kl(
    students: Tensor | Sequence[Tensor],
    teachers: Tensor | Sequence[Tensor],
    *,
    temperature: float = 0.1,
    bandwidth: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Kullback-Leibler divergence of the teacher's relations from the student's, row by row.

    ℓ_bst = Σ_j P^t_bj (log P^t_bj − log P^s_bj) where P is the row softmax of R/τ, R_ij = exp((e_i·e_j − 1)/σ²)
    of unit rows e and R_ii = 0 (the zero diagonal takes part in the softmax).

    Args:
        students: ``[B, D]``, or a sequence of S tensors ``[B, D_s]``.
        teachers: ``[B, D]``, or a sequence of T tensors ``[B, D_t]``.
        temperature: τ > 0.
        bandwidth: σ > 0.
        backend: ``"auto"``, ``"reference"``, ``"cpp"`` or ``"triton"``.

    Returns:
        The losses per sample and pair, ``[B, S, T]``, ≥ 0, in float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: an argument has a wrong shape, type, device or value.
        RuntimeError: the chosen backend is not available here.
    """
    students, teachers, dtype = _check_stages(students, teachers)
    check_positive("temperature", temperature)
    check_positive("bandwidth", bandwidth)
    fused = _select_backend(backend, students[0]) != "reference"
    precision = _product_precision(students[0])
    with autocast_disabled(students[0]):
        if fused:
            unit = ops.unit_rows([*students, *teachers], dtype)
            return ops.relation_kl(unit[: len(students)], unit[len(students) :], temperature, bandwidth, precision)
        return reference.relation_kl(
            [x.to(dtype) for x in students], [x.to(dtype) for x in teachers], temperature, bandwidth
        )


def adaptive_bandwidth(nodes: Tensor) -> Tensor:
    """The bandwidth that suits a batch: σ² = ½ · mean over i ≠ j of (1 − c_ij), without gradient.

    The mean needs no pairs: Σ_i≠j (1 − c_ij) = B Σ_i ‖e_i − ē‖² + (B − 1) · (number of zero rows), with ē the mean
    unit row. σ is at least 0.01, which it is when all rows point one way; it is 1 for a single row.

    Args:
        nodes: ``[B, D]``.

    Returns:
        σ, a 0-dim tensor in float32 (float64 for float64 nodes) on the nodes' device.
    """
    _check_features("nodes", nodes)
    batch = len(nodes)
    dtype = _compute_dtype({"nodes": nodes})
    if batch == 1:
        return torch.ones((), dtype=dtype, device=nodes.device)
    with torch.no_grad(), autocast_disabled(nodes):
        e = reference.unit_rows(nodes.to(dtype))
        zero_rows = (e == 0).all(dim=1).sum()
        distances = batch * (e - e.mean(dim=0)).square().sum() + (batch - 1) * zero_rows
        return (BANDWIDTH_SHARE * distances / (batch * (batch - 1))).sqrt().clamp(min=MIN_BANDWIDTH)


def effective_neighbors(nodes: Tensor, bandwidth: float | Tensor | str = "auto", *, backend: str = "auto") -> Tensor:
    """How many neighbours each node listens to: (Σ_j A_ij)² / Σ_j A_ij², from 1 (itself) to B (everybody).

    A_ij² is the adjacency at σ/√2, so this takes two degree passes. Without gradient.

    Args:
        nodes: ``[B, D]``.
        bandwidth: as in :func:`graph_conv`.
        backend: as in :func:`graph_conv`.

    Returns:
        ``[B]`` in float32 (float64 for float64 nodes).
    """
    _check_features("nodes", nodes)
    dtype = _compute_dtype({"nodes": nodes})
    check_graph_options(bandwidth, "symmetric", backend)
    sigma = _bandwidth(bandwidth, nodes, dtype)
    fused = _select_backend(backend, nodes) != "reference"
    precision = _product_precision(nodes)
    widths = (sigma, sigma / math.sqrt(2))
    with torch.no_grad(), autocast_disabled(nodes):
        if fused:
            (unit,) = ops.unit_rows([nodes], dtype)
            sums = [ops.graph_degrees(unit, _inverse_variance(width, unit), precision) for width in widths]
        else:
            sums = [reference.similarities(nodes.to(dtype), width, diagonal=1.0).sum(dim=1) for width in widths]
    return sums[0].square() / sums[1]


def check_graph_options(bandwidth: float | Tensor | str, normalization: str, backend: str) -> None:
    """Raises ValueError or TypeError for options that :func:`graph_conv` does not take."""
    if isinstance(bandwidth, str):
        if bandwidth != "auto":
            raise ValueError(f"bandwidth must be a positive number or 'auto', got {bandwidth!r}")
    elif isinstance(bandwidth, Tensor):
        if bandwidth.dim() != 0:
            raise ValueError(f"bandwidth must have no dimensions when it is a Tensor, got {tuple(bandwidth.shape)}")
    else:
        check_positive("bandwidth", bandwidth)
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization must be one of {NORMALIZATIONS}, got {normalization!r}")
    check_backend(backend)


def check_backend(backend: str) -> None:
    """Raises ValueError for a name that is no backend."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")


def _select_backend(backend: str, tensor: Tensor) -> str:
    """The backend that runs, or an error that says what is missing."""
    check_backend(backend)
    device = tensor.device
    if backend == "auto":
        backend = {"cpu": "cpp", "cuda": "triton"}.get(device.type, "reference")
        reason = None if backend == "reference" else ops.missing(backend, device)
        if reason is None:
            return backend
        _warn_once(f"gkd_fast computes on {device.type} with the slow reference: {reason}")
        return "reference"
    if backend != "reference" and (reason := ops.missing(backend, device)) is not None:
        raise RuntimeError(f"backend={backend!r} is not available: {reason}")
    return backend


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def _product_precision(x: Tensor) -> str:
    """The type in which tiles are multiplied: the inputs' own, autocast's, or PyTorch's choice for float32."""
    dtype = x.dtype
    if autocast_enabled(x) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    return _float32_products() if dtype == torch.float32 else str(dtype).removeprefix("torch.")


@torch.compiler.assume_constant_result
def _float32_products() -> str:
    """PyTorch's setting for float32 products; a compiled function keeps the one that it was compiled under."""
    try:
        setting = torch.get_float32_matmul_precision()
    except RuntimeError:
        # The newer per-backend settings are in use, which this one cannot express.
        setting = "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"
    return {"highest": "float32", "high": "tf32", "medium": "bfloat16"}[setting]


def _inverse_variance(sigma: float | Tensor, like: Tensor) -> Tensor:
    """1/σ², a 0-dim tensor, so that an adaptive bandwidth needs no host synchronisation."""
    if isinstance(sigma, Tensor):
        return sigma.square().reciprocal()
    return torch.full((), sigma**-2, dtype=like.dtype, device=like.device)


def _check_features(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {x.dtype}")
    if x.dim() != 2:
        raise ValueError(f"{name} must have 2 dimensions [batch, width], got shape {tuple(x.shape)}")
    if x.shape[0] == 0 or x.shape[1] == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(x.shape)}")


def check_positive(name: str, value: float) -> None:
    """Raises TypeError or ValueError unless ``value`` is a positive, finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite, got {value}")


def _bandwidth(bandwidth: float | Tensor | str, nodes: Tensor, dtype: torch.dtype) -> float | Tensor:
    if isinstance(bandwidth, str):
        return adaptive_bandwidth(nodes)
    if isinstance(bandwidth, Tensor):
        return bandwidth.detach().to(device=nodes.device, dtype=dtype)
    return bandwidth


def _check_stages(
    students: Tensor | Sequence[Tensor], teachers: Tensor | Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], torch.dtype]:
    sides = {}
    for side, stages in (("students", students), ("teachers", teachers)):
        stages = [stages] if isinstance(stages, Tensor) else list(stages)
        if not stages:
            raise ValueError(f"{side} must hold at least one stage, got none")
        sides[side] = stages
    named = {f"{side}[{k}]": x for side, stages in sides.items() for k, x in enumerate(stages)}
    for name, x in named.items():
        _check_features(name, x)
    batch = len(sides["students"][0])
    for name, x in named.items():
        if len(x) != batch:
            raise ValueError(f"{name} must have the batch size of students[0] ({batch}), got {len(x)}")
    return sides["students"], sides["teachers"], _compute_dtype(named)


def _check_pairs(
    pairs: Sequence[tuple[int, int]] | None, num_students: int, num_teachers: int
) -> list[list[bool]] | None:
    if pairs is None:
        return None
    wanted = [[False] * num_teachers for _ in range(num_students)]
    for s, t in pairs:
        if not (0 <= s < num_students and 0 <= t < num_teachers):
            raise ValueError(f"pairs must lie below ({num_students}, {num_teachers}), got ({s}, {t})")
        wanted[s][t] = True
    return wanted


def _compute_dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    """float64 for float64 inputs, else float32; mixed types are an error, except under autocast, which mixes them."""
    (first_name, first), *others = tensors.items()
    for name, x in others:
        if x.device != first.device:
            raise ValueError(f"{name} must be on the device of {first_name} ({first.device}), got {x.device}")
        if x.dtype != first.dtype and not autocast_enabled(first):
            raise TypeError(f"{name} must have the type of {first_name} ({first.dtype}), got {x.dtype}")
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors.values()) else torch.float32


def autocast_enabled(tensor: Tensor) -> bool:
    """Whether autocast is on for the tensor's device; never on a device that has none ("meta")."""
    device = tensor.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def autocast_disabled(tensor: Tensor) -> AbstractContextManager[None]:
    """A context in which operations on the tensor's device keep their types."""
    return torch.autocast(tensor.device.type, enabled=False) if autocast_enabled(tensor) else nullcontext()
