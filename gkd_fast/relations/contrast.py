"""info_nce: which teacher's sample is the own one, and which student's."""

import torch
from torch import Tensor

from gkd_fast import ops, reference
from gkd_fast._arguments import (
    bank_size,
    check_bank,
    check_choice,
    check_flag,
    check_positive,
    compute_dtype,
    product_precision,
    select_backend,
)
from gkd_fast._autocast import autocast_disabled
from gkd_fast._compilation import leaves_graphs, meets_columns
from gkd_fast.distributed import Group, Shards, checking, shards_of, union, unit_columns
from gkd_fast.relations.common import REDUCTIONS, check_within, graphs_of, mean, unit_rows

# So cold that sums are taken about the largest logit of every row, which holds for whatever the logits are scaled by.
OF_OWN_SHIFTS = 0.01


@leaves_graphs(meets_columns)
def info_nce(
    students: Tensor,
    teachers: Tensor,
    temperature: float | Tensor = 0.07,
    *,
    symmetric: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
    process_group: Group = None,
    bank: Tensor | None = None,
    within: str = "batch",
    mask: Tensor | None = None,
) -> Tensor:
    """InfoNCE (van den Oord et al., 2018): −log softmax_j(ŝ_i·t̂_j/τ)[i], and with ``symmetric`` the mean of this and of
    −log softmax_j(ŝ_j·t̂_i/τ)[i], as in CLIP (Radford et al., 2021) and CLIP-KD (Yang et al., 2024).

    Rows are L2-normalised. Students and teachers need not be of one kind: the rows of an image and a text encoder do as
    well. :func:`gkd_fast.functional.node_contrast` is the one-sided form for several stages. In the symmetric loss of
    one process both directions come of one product of the rows, but in bfloat16 of two, whose rows are multiplied about
    their mean: results so err by at most 1e-2 of the largest entry up to mean cosines of 0.9999.

    Args:
        students: ``[B, D]``.
        teachers: ``[B, D]``.
        temperature: τ > 0, a number, or a 0-dim tensor or parameter, which then has its gradient. A tensor's value on a
            GPU is not read on the host, which would wait for the device: the losses are NaN where it is not positive.
        symmetric: both directions.
        reduction: ``"mean"`` over the batch, or ``"none"``: ``[B]``.
        backend: ``"auto"``, ``"reference"``, ``"cpp"`` or ``"triton"``.
        process_group: the samples of all its ranks are the batch, see :mod:`gkd_fast.distributed`; the mean is then
            such that its mean over ranks is the global loss.
        bank: further teachers ``[N, D]`` to tell the own one from, without gradient; the same on all ranks.
            Within tokens there is none.
        within: ``"batch"``, or ``"tokens"``: features are ``[B, N, D]``, tokens or patches of each sample, of which
            each is told from the others of its sample; a sample's loss is the mean of its tokens'. Products are made by
            PyTorch's batched ones, in memory of B·N².
        mask: the tokens that count (not 0), ``[B, N]``; a sample without any has a loss of 0.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, type, device or value.
        RuntimeError: the chosen backend is not available here.
    """
    with checking(process_group, "info_nce"):
        check_choice("reduction", reduction, REDUCTIONS)
        symmetric = check_flag("symmetric", symmetric)
        check_within(students, teachers, within, mask, process_group is not None)
        if students.shape[-1] != teachers.shape[-1]:
            raise ValueError(f"teachers must have the students' width {students.shape[-1]}, got {teachers.shape[-1]}")
        if bank is not None and within == "tokens":
            raise ValueError('bank must be None within="tokens", got a Tensor')
        dtype = compute_dtype({"students": students, "teachers": teachers})
        value = _number(temperature)
        more = None if bank is None else check_bank("bank", [bank], [teachers])
        fused = select_backend(backend, students) != "reference"
    told = "info_nce", value, symmetric, reduction, bank_size(more), fused, within
    shards = shards_of(process_group, [students, teachers], told, more)
    precision = product_precision(students)
    with autocast_disabled(students):
        s, t = students.to(dtype), teachers.to(dtype)
        if within == "tokens":
            losses = (_batched if fused else _definition_of_tokens)(s, t, temperature, symmetric, mask)
        elif fused:
            scale = None
            if isinstance(temperature, Tensor):
                # 1, where the temperature's value is known, with the gradient by the temperature.
                positive = torch.where(temperature > 0, temperature, torch.nan)
                scale = ((value if _stays(temperature) else temperature.detach()) / positive).to(dtype)
            losses = _fused(s, t, value, scale, symmetric, precision, shards, more)
        else:
            losses = _definition(s, t, temperature, symmetric, shards, more)
    return losses if reduction == "none" else mean(losses, shards)


def _number(temperature: float | Tensor) -> float:
    if not isinstance(temperature, Tensor):
        check_positive("temperature", temperature)
        return temperature
    if temperature.dim() != 0 or not temperature.is_floating_point():
        raise ValueError(
            f"temperature must be a number or a 0-dim floating point tensor, got {tuple(temperature.shape)}"
        )
    if _stays(temperature):
        return OF_OWN_SHIFTS
    value = float(temperature.detach())
    check_positive("temperature", value)
    return value


def _stays(temperature: Tensor) -> bool:
    """Whether the value stays on the device, because reading it would wait for the kernels before it."""
    return ops.missing("triton", temperature.device) is None


def _fused(
    students: Tensor,
    teachers: Tensor,
    temperature: float,
    scale: Tensor | None,
    symmetric: bool,
    precision: str,
    shards: Shards | None,
    bank: list[Tensor] | None,
) -> Tensor:
    dtype = students.dtype
    # In bfloat16 two one-sided losses, whose rows are multiplied about their mean.
    one_product = shards is None and symmetric and precision != "bfloat16"
    if one_product and ops.has_kernels("info_nce", students.device):
        return ops.info_nce(students, teachers, temperature, scale, precision)

    def half(rows: Tensor, others: Tensor, more: list[Tensor] | None) -> Tensor:
        columns = None
        if shards is not None:
            # The rows' columns are for the others' gradients alone.
            met = [others, rows] if others.requires_grad else [others]
            columns = unit_columns(shards, met, dtype, more)
        return ops.one_sided(rows, others, temperature, scale, precision, columns)

    losses = half(students, teachers, bank)
    return (losses + half(teachers, students, None)) / 2 if symmetric else losses


def _batched(
    students: Tensor, teachers: Tensor, temperature: float | Tensor, symmetric: bool, mask: Tensor | None
) -> Tensor:
    *sides, _, _, counts = graphs_of(students, teachers, mask, "")
    s, t = unit_rows(sides)
    logits = s @ t.mT / temperature
    counting = torch.arange(s.shape[1], device=s.device) < counts[:, None]
    own = logits.diagonal(dim1=1, dim2=2)

    def half(dim: int) -> Tensor:
        # Finite, so that a sample without tokens has finite sums.
        others = counting[:, None, :] if dim == 2 else counting[:, :, None]
        return logits.masked_fill(~others, torch.finfo(s.dtype).min).logsumexp(dim=dim) - own

    losses = (half(2) + half(1)) / 2 if symmetric else half(2)
    return torch.where(counting, losses, 0).sum(dim=1) / counts.clamp(min=1)


def _definition_of_tokens(
    students: Tensor, teachers: Tensor, temperature: float | Tensor, symmetric: bool, mask: Tensor | None
) -> Tensor:
    return reference.within_tokens(
        lambda s, t: reference.info_nce(s, t, temperature, symmetric), students, teachers, mask
    )


def _definition(
    students: Tensor,
    teachers: Tensor,
    temperature: float | Tensor,
    symmetric: bool,
    shards: Shards | None,
    bank: list[Tensor] | None,
) -> Tensor:
    if shards is None:
        return reference.info_nce(students, teachers, temperature, symmetric)
    s, t = union(shards, [students, teachers])
    columns = t if bank is None else torch.cat([t, bank[0].to(t.dtype)])
    losses = reference.one_sided_info_nce(s, columns, temperature)
    if symmetric:
        losses = (losses + reference.one_sided_info_nce(t, s, temperature)) / 2
    return shards.own(losses)
