"""The public functions: check the arguments, choose the backend and the precision, and call it.

Every function takes raw features, L2-normalises their rows and is differentiable; backend="reference" any number of
times, "cpp" twice, with respect to every input and the upstream, "triton" once (one more derivative or forward mode is
an error there, never a silent zero).
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeAlias

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from gkd_fast import distributed, ops, reference
from gkd_fast.distributed import Shards
from gkd_fast.ops.columns import Columns

# Whose samples are the nodes: this process's alone (None), or those of all ranks.
Group: TypeAlias = "ProcessGroup | Shards | None"

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
    process_group: Group = None,
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
        process_group: the samples of all its ranks are the nodes, see :mod:`gkd_fast.distributed`.

    Returns:
        ``[B, K]``, of the messages' type.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, type, device or value.
        RuntimeError: the chosen backend is not available here.
    """
    with checking(process_group, "graph_conv"):
        _check_features("nodes", nodes, process_group)
        _check_features("messages", messages, process_group)
        if len(messages) != len(nodes):
            raise ValueError(f"messages must have as many rows as nodes ({len(nodes)}), got {len(messages)}")
        dtype = _compute_dtype({"nodes": nodes, "messages": messages})
        check_graph_options(bandwidth, normalization, backend)
        fused = _select_backend(backend, nodes) != "reference"
    told = bandwidth if isinstance(bandwidth, (str, float, int)) else "a tensor"
    shards = shards_of(process_group, [nodes, messages], f"graph_conv({told}, {normalization}, {fused})")
    sigma = _bandwidth(bandwidth, nodes, dtype, shards)
    precision = _product_precision(nodes)
    with autocast_disabled(nodes):
        if not fused:
            inputs = nodes.to(dtype), messages.to(dtype)
            output = _of_union(lambda x, h: reference.graph_conv(x, h, sigma, normalization), inputs, shards)
            return output.to(messages.dtype)
        (unit,) = ops.unit_rows([nodes], dtype)
        inverse_variance = _inverse_variance(sigma, unit)
        columns = None if shards is None else _graph_columns(shards, [nodes, messages], dtype)
        output = ops.graph_conv(unit, messages.to(dtype), inverse_variance, normalization, precision, columns)
        return output.to(messages.dtype)


def node_contrast(
    students: Tensor | Sequence[Tensor],
    teachers: Tensor | Sequence[Tensor],
    *,
    temperature: float = 0.1,
    pairs: Sequence[tuple[int, int]] | None = None,
    backend: str = "auto",
    process_group: Group = None,
    bank: Sequence[Tensor] | None = None,
) -> Tensor:
    """Contrast of every student node with the teacher's nodes: −log softmax_j(ŝ_b·t̂_j/τ)[b].

    Args:
        students: ``[B, D]``, or a sequence of S such tensors, all of one width.
        teachers: ``[B, D]``, or a sequence of T such tensors, of the students' width.
        temperature: τ > 0.
        pairs: the (student, teacher) stage pairs that are wanted, all by default; the loss of the others is 0.
        backend: ``"auto"``, ``"reference"``, ``"cpp"`` or ``"triton"``.
        process_group: the samples of all its ranks are the nodes, see :mod:`gkd_fast.distributed`.
        bank: further teacher nodes to tell the own one from, T tensors ``[N, D]``, without gradient; the same on all
            ranks.

    Returns:
        The losses per sample and pair, ``[B, S, T]``, ≥ 0, in float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: an argument has a wrong shape, type, device or value.
        RuntimeError: the chosen backend is not available here.
    """
    with checking(process_group, "node_contrast"):
        students, teachers, dtype = _check_stages(students, teachers, process_group)
        widths = {x.shape[1] for x in (*students, *teachers)}
        if len(widths) > 1:
            raise ValueError(f"students and teachers must share one width in node_contrast, got {sorted(widths)}")
        check_positive("temperature", temperature)
        wanted = _check_pairs(pairs, len(students), len(teachers))
        more = _check_bank("bank", bank, teachers)
        fused = _select_backend(backend, students[0]) != "reference"
    shards = shards_of(
        process_group, [*students, *teachers], f"node_contrast({temperature}, {wanted}, {_size(more)}, {fused})", more
    )
    precision = _product_precision(students[0])
    with autocast_disabled(students[0]):
        if fused:
            unit = ops.unit_rows([*students, *teachers], dtype)
            flat = [True] * (len(students) * len(teachers)) if wanted is None else sum(wanted, [])
            columns = None
            if shards is not None:
                # The students' columns are for the teachers' gradients alone.
                met = [*teachers, *students] if any(x.requires_grad for x in teachers) else teachers
                columns = _unit_columns(shards, met, dtype, more)
            halves = unit[: len(students)], unit[len(students) :]
            return ops.node_contrast(*halves, flat, temperature, precision, columns)

        def losses_of(*stages):
            return reference.node_contrast(stages[: len(students)], stages[len(students) :], temperature)

        # The bank's samples are rows too, of students that do not matter.
        beside = None if more is None else [more[0].new_zeros(more[0].shape) for _ in students] + more
        losses = _of_union(losses_of, [x.to(dtype) for x in (*students, *teachers)], shards, beside)
        return losses if wanted is None else losses * torch.tensor(wanted, dtype=dtype, device=losses.device)


def relation_kl(
    students: Tensor | Sequence[Tensor],
    teachers: Tensor | Sequence[Tensor],
    *,
    temperature: float = 0.1,
    bandwidth: float = 1.0,
    backend: str = "auto",
    process_group: Group = None,
    bank: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
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
        process_group: the samples of all its ranks are the nodes, see :mod:`gkd_fast.distributed`.
        bank: further nodes to have relations with, S students and T teachers ``[N, width]``, without gradient; the
            same on all ranks.

    Returns:
        The losses per sample and pair, ``[B, S, T]``, ≥ 0, in float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: an argument has a wrong shape, type, device or value.
        RuntimeError: the chosen backend is not available here.
    """
    with checking(process_group, "relation_kl"):
        students, teachers, dtype = _check_stages(students, teachers, process_group)
        check_positive("temperature", temperature)
        check_positive("bandwidth", bandwidth)
        more = None if bank is None else _check_bank("bank", [*bank[0], *bank[1]], [*students, *teachers])
        fused = _select_backend(backend, students[0]) != "reference"
    stages = [*students, *teachers]
    told = f"relation_kl({temperature}, {bandwidth}, {len(students)} of, {_size(more)}, {fused})"
    shards = shards_of(process_group, stages, told, more)
    precision = _product_precision(students[0])
    with autocast_disabled(students[0]):
        if fused:
            unit = ops.unit_rows(stages, dtype)
            columns = None if shards is None else _unit_columns(shards, stages, dtype, more)
            halves = unit[: len(students)], unit[len(students) :]
            return ops.relation_kl(*halves, temperature, bandwidth, precision, columns)

        def losses_of(*stages):
            halves = stages[: len(students)], stages[len(students) :]
            return reference.relation_kl(*halves, temperature, bandwidth)

        return _of_union(losses_of, [x.to(dtype) for x in stages], shards, more)


def adaptive_bandwidth(nodes: Tensor, *, process_group: Group = None) -> Tensor:
    """The bandwidth that suits a batch: σ² = ½ · mean over i ≠ j of (1 − c_ij), without gradient.

    The mean needs no pairs: Σ_i≠j (1 − c_ij) = B Σ_i ‖e_i − ē‖² + (B − 1) · (number of zero rows), with ē the mean
    unit row. σ is at least 0.01, which it is when all rows point one way; it is 1 for a single row.

    Args:
        nodes: ``[B, D]``.
        process_group: as in :func:`graph_conv`; the bandwidth is that of all ranks' nodes.

    Returns:
        σ, a 0-dim tensor in float32 (float64 for float64 nodes) on the nodes' device.
    """
    with checking(process_group, "adaptive_bandwidth"):
        _check_features("nodes", nodes, process_group)
        dtype = _compute_dtype({"nodes": nodes})
    shards = shards_of(process_group, [nodes], "adaptive_bandwidth")
    batch = len(nodes) if shards is None else shards.total
    if batch == 1:
        return torch.ones((), dtype=dtype, device=nodes.device)
    with torch.no_grad(), autocast_disabled(nodes):
        e = reference.unit_rows(nodes.to(dtype)) if len(nodes) else nodes.to(dtype)
        zero_rows = (e == 0).all(dim=1).sum()
        mean = e.sum(dim=0) / max(len(e), 1)
        spread = (e - mean).square().sum()
        if shards is not None:
            # The spread about the common mean is that about the ranks' own means, and theirs about it.
            moments = shards.stack(torch.cat([mean, spread[None], zero_rows[None].to(dtype)]))
            counts = torch.tensor(shards.counts, dtype=dtype, device=nodes.device)
            means = moments[:, :-2]
            mean = counts @ means / batch
            spread = moments[:, -2].sum() + counts @ (means - mean).square().sum(dim=1)
            zero_rows = moments[:, -1].sum()
        distances = batch * spread + (batch - 1) * zero_rows
        return (BANDWIDTH_SHARE * distances / (batch * (batch - 1))).sqrt().clamp(min=MIN_BANDWIDTH)


def effective_neighbors(
    nodes: Tensor, bandwidth: float | Tensor | str = "auto", *, backend: str = "auto", process_group: Group = None
) -> Tensor:
    """How many neighbours each node listens to: (Σ_j A_ij)² / Σ_j A_ij², from 1 (itself) to B (everybody).

    A_ij² is the adjacency at σ/√2, so this takes two degree passes. Without gradient.

    Args:
        nodes: ``[B, D]``.
        bandwidth: as in :func:`graph_conv`.
        backend: as in :func:`graph_conv`.
        process_group: as in :func:`graph_conv`.

    Returns:
        ``[B]`` in float32 (float64 for float64 nodes).
    """
    with checking(process_group, "effective_neighbors"):
        _check_features("nodes", nodes, process_group)
        dtype = _compute_dtype({"nodes": nodes})
        check_graph_options(bandwidth, "symmetric", backend)
        fused = _select_backend(backend, nodes) != "reference"
    shards = shards_of(process_group, [nodes], f"effective_neighbors({fused})")
    sigma = _bandwidth(bandwidth, nodes, dtype, shards)
    precision = _product_precision(nodes)
    widths = (sigma, sigma / math.sqrt(2))
    with torch.no_grad(), autocast_disabled(nodes):
        if fused:
            (unit,) = ops.unit_rows([nodes], dtype)
            columns = None if shards is None else _unit_columns(shards, [nodes], dtype)
            sums = [ops.graph_degrees(unit, _inverse_variance(width, unit), precision, columns) for width in widths]
        else:

            def degrees(width):
                return lambda x: reference.similarities(x, width, diagonal=1.0).sum(dim=1)

            sums = [_of_union(degrees(width), [nodes.to(dtype)], shards) for width in widths]
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


@contextmanager
def checking(group: Group, what: str) -> Iterator[None]:
    """Lets all ranks raise where the checks of one find fault with its arguments."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if isinstance(group, ProcessGroup):
            Shards.agree(group, (), what, error)
        raise


def shards_of(group: Group, rows: list[Tensor], what: str, bank: list[Tensor] | None = None) -> Shards | None:
    """How the rows lie on the ranks; None where they are this process's alone and there is no bank."""
    shards = Shards.agree(group, rows, what) if isinstance(group, ProcessGroup) else group
    if bank is None:
        return None if shards is None or shards.size == 1 else shards
    return shards or Shards(None, [len(rows[0])], rows[0].device)


def _unit_columns(shards: Shards, stages: Sequence[Tensor], dtype: torch.dtype, bank: list[Tensor] | None = None):
    """The unit rows of the stages on all ranks, and of a bank."""

    def prepare(rows: Tensor, place: int = 0) -> Tensor:
        return ops.unit_rows([rows.detach()], dtype)[0]

    more = None if bank is None else [prepare(x) for x in bank]
    return Columns(shards, list(stages), prepare, more, distributed.GATHER_BUDGET, shards.gathered)


def _graph_columns(shards: Shards, rows: list[Tensor], dtype: torch.dtype) -> Columns:
    """The unit nodes on all ranks, the messages, and what goes with them."""

    def prepare(rows: Tensor, place: int) -> Tensor:
        return ops.unit_rows([rows], dtype)[0] if place == 0 else rows.to(dtype)

    return Columns(shards, rows, prepare, None, distributed.GATHER_BUDGET)


def _of_union(
    function: Callable[..., Tensor],
    rows: Sequence[Tensor],
    shards: Shards | None,
    bank: Sequence[Tensor] | None = None,
) -> Tensor:
    """This rank's rows of ``function`` of all ranks' rows and the bank's."""
    if shards is None:
        return function(*rows)
    whole = distributed.union(shards, rows)
    if bank is not None:
        whole = [torch.cat([x, more.to(x.dtype)]) for x, more in zip(whole, bank)]
    return shards.own(function(*whole))


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


def _check_features(name: str, x: Tensor, group: Group = None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {x.dtype}")
    if x.dim() != 2:
        raise ValueError(f"{name} must have 2 dimensions [batch, width], got shape {tuple(x.shape)}")
    if x.shape[1] == 0 or (x.shape[0] == 0 and group is None):
        raise ValueError(f"{name} must not be empty, got shape {tuple(x.shape)}")


def check_positive(name: str, value: float) -> None:
    """Raises TypeError or ValueError unless ``value`` is a positive, finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite, got {value}")


def _bandwidth(
    bandwidth: float | Tensor | str, nodes: Tensor, dtype: torch.dtype, shards: Shards | None
) -> float | Tensor:
    if isinstance(bandwidth, str):
        return adaptive_bandwidth(nodes, process_group=shards)
    if isinstance(bandwidth, Tensor):
        return bandwidth.detach().to(device=nodes.device, dtype=dtype)
    return bandwidth


def _check_stages(
    students: Tensor | Sequence[Tensor], teachers: Tensor | Sequence[Tensor], group: Group
) -> tuple[list[Tensor], list[Tensor], torch.dtype]:
    sides = {}
    for side, stages in (("students", students), ("teachers", teachers)):
        stages = [stages] if isinstance(stages, Tensor) else list(stages)
        if not stages:
            raise ValueError(f"{side} must hold at least one stage, got none")
        sides[side] = stages
    named = {f"{side}[{k}]": x for side, stages in sides.items() for k, x in enumerate(stages)}
    for name, x in named.items():
        _check_features(name, x, group)
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


def _check_bank(name: str, bank: Sequence[Tensor] | None, stages: Sequence[Tensor]) -> list[Tensor] | None:
    """The bank's tensors, None where it is empty."""
    if bank is None:
        return None
    if len(bank) != len(stages):
        raise ValueError(f"{name} must hold a tensor for each of {len(stages)} stages, got {len(bank)}")
    for k, (x, stage) in enumerate(zip(bank, stages)):
        if x.dim() != 2 or x.shape[1] != stage.shape[1] or len(x) != len(bank[0]) or x.device != stage.device:
            raise ValueError(
                f"{name}[{k}] must have shape [{len(bank[0])}, {stage.shape[1]}] on {stage.device}, got "
                f"{tuple(x.shape)} on {x.device}"
            )
    return list(bank) if len(bank[0]) else None


def _size(bank: list[Tensor] | None) -> int:
    return 0 if bank is None else len(bank[0])


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
