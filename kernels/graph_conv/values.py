"""The values that graph_conv's launches take: messages and upstream, times factors of their rows, about their means."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gkd_fast.kernels.common.launch import Product, matrices, power_of_two
from gkd_fast.kernels.common.operands import Operand, longest_rows, means, operands, powers_of
from gkd_fast.kernels.graph_conv.graphs import Graph, kinds_of

# Factors of a value's row, as in ``tiles``.
ONE, INVERSE, INVERSE_ROOT = range(3)


@dataclass(frozen=True)
class Side:
    """Messages, upstream and degrees of the rows or of the columns; the last two may be missing."""

    messages: Tensor
    upstream: Tensor | None
    degrees: Tensor | None


@dataclass(frozen=True)
class Values:
    """H and G times factors of their rows, H' and G', of the rows or of the columns as products take them; and what
    float16 has them multiplied by. G' of columns may be missing.
    """

    messages: Operand
    upstream: Operand | None
    powers: tuple[Tensor | None, Tensor | None]

    def with_numbers(self, terms: Tensor) -> Tensor:
        """Node terms that a caller gave, and what H' and G' leave to be added to their products."""
        for x in (self.messages, self.upstream):
            if x is not None:
                terms = terms + x.numbers[: len(terms)]
        return terms


def factors_of(degrees: Sequence[Tensor | None], factor: int) -> list[Tensor | None]:
    if factor == ONE:
        return [None] * len(degrees)
    return torch._foreach_reciprocal(degrees) if factor == INVERSE else torch._foreach_rsqrt(degrees)


def column_side(graph, is_row, messages, upstream, degrees) -> Side:
    if messages is None:
        raise ValueError("column_nodes and column_messages go together")
    if degrees is None and (not is_row or upstream is not None):
        raise ValueError("column_degrees are missing")
    (messages,) = matrices("column_messages", [messages], graph.column_count)
    if upstream is not None:
        (upstream,) = matrices("column_upstream", [upstream], graph.column_count)
    return Side(messages, upstream, None if degrees is None else degrees.contiguous())


def _alternating(some: Sequence, others: Sequence) -> list:
    return [x for both in zip(some, others, strict=True) for x in both]


def convolved_values(graphs, values: Sequence[Tensor], factors) -> tuple[list[Operand], list[Tensor | None]]:
    """Values times their factors about their means, and what float16 has them multiplied by."""
    kinds = kinds_of(graphs, [x.shape[1] for x in values])
    products, widths = [kind.form.product for kind in kinds], [kind.value_width for kind in kinds]
    # As many places as the gradients' launch takes, of messages and upstream.
    places = 2 * graphs[0].num_stages
    powers = _powers([[x] for x in values], products, places)
    centres = means(values, products[0], widths, factors, places)
    return _of_types(products, places, values, widths, centres, factors=factors, powers=powers), powers


def _of_types(
    products: Sequence[Product], places: int, *lists: Sequence, rounded: bool = False, **options: Sequence
) -> list[Operand]:
    """``operands`` of the values of each type."""
    found: list = [None] * len(products)
    for product in dict.fromkeys(products):
        here = [k for k, of_value in enumerate(products) if of_value is product]
        values, *others = ([x[k] for k in here] for x in lists)
        chosen = {key: [x[k] for k in here] for key, x in options.items()}
        made = operands(values, product, *others, places=places, rounded=rounded, **chosen)
        for k, x in zip(here, made, strict=True):
            found[k] = x
    return found


def both_values(
    graphs, sides: Sequence[Side], powers, of_messages, of_upstream, columns=None, rounded: bool = False
) -> list[Values]:
    """H' and G' of the sides, about the centres of the ``columns``, or of their own where the sides are the columns.

    of_messages, of_upstream: the factors of H and of G.  rounded: see ``operands``.
    """
    has_upstream = sides[0].upstream is not None
    values, factors = [side.messages for side in sides], list(of_messages)
    of_sides = kinds_of(graphs, [x.shape[1] for x in values])
    if has_upstream:
        values = _alternating(values, [side.upstream for side in sides])
        factors, of_sides = _alternating(factors, of_upstream), _alternating(of_sides, of_sides)
    products, widths = [kind.form.product for kind in of_sides], [kind.value_width for kind in of_sides]
    kinds = len(values) // len(sides)
    if columns is None:
        centres = means(values, products[0], widths, factors)
    else:
        centres = []
        for x in columns:
            of_other = torch.zeros_like(x.messages.centre) if x.upstream is None else x.upstream.centre
            centres += [x.messages.centre, of_other][:kinds]
    # Where there is no G' of columns, nothing is added to products for H'.
    others = [centres[k ^ 1] if has_upstream else torch.zeros_like(x) for k, x in enumerate(centres)]
    made = _of_types(
        products, 0, values, widths, centres, others=others, factors=factors,
        powers=[x for both in powers for x in both[:kinds]], rounded=rounded,
    )  # fmt: skip
    return [
        Values(made[kinds * k], made[kinds * k + 1] if has_upstream else None, powers[k]) for k in range(len(graphs))
    ]


def all_powers(graphs: Sequence[Graph], own: Sequence[Values], longest: float) -> list[Tensor]:
    """Of each stage, powers of two for H', G' and M = v K (…), whose terms are bounded by the product of the longest H'
    and G', in ``powers`` as long as ``longest``.
    """
    of_messages, of_upstream = (torch.stack(powers) for powers in zip(*[x.powers for x in own], strict=True))
    v = torch.stack([graph.inverse_variance for graph in graphs])
    units = power_of_two(4 * longest**2 * v / (of_messages * of_upstream))
    # Four numbers each, so that all stages' begin where Triton has one kernel for them.
    return list(torch.stack([of_messages, of_upstream, units, units], dim=1).unbind())


def _powers(values: Sequence[Sequence[Tensor | None]], products: Sequence[Product], places: int) -> list[Tensor | None]:
    """Powers of two for values in these types, that bring the longest row among each place's to what the type takes;
    places: see ``operands``."""
    limited = [k for k, product in enumerate(products) if product.limited]
    powers: list[Tensor | None] = [None] * len(products)
    if limited:
        product = products[limited[0]]
        lengths = _longest([[x for x in values[k] if x is not None] for k in limited], product, places)
        for k, power in zip(limited, powers_of(lengths, product), strict=True):
            powers[k] = power
    return powers


def _longest(values: Sequence[Sequence[Tensor]], product: Product, places: int) -> Tensor:
    """``longest_rows`` of each place's matrices, of the rows and of some places also of the columns."""
    found = longest_rows([of_place[0] for of_place in values], product, places)
    both = [of_place[1] for of_place in values if len(of_place) > 1]
    if not both:
        return found
    others = iter(longest_rows(both, product, places).amax(dim=1).unbind())
    of_both = zip(found.amax(dim=1).unbind(), values, strict=True)
    longest = [torch.maximum(x, next(others)) if len(of_place) > 1 else x for x, of_place in of_both]
    return torch.stack(longest)[:, None]


def value_powers(
    graphs: Sequence[Graph], own: Sequence[Side], other: Sequence[Side]
) -> list[tuple[Tensor | None, Tensor | None]]:
    """Of each stage, powers of two for H' and G' in float16: rows have degrees ≥ 1, so H and G bound H' and G'."""
    values: list[Sequence[Tensor | None]] = []
    for of_rows, of_columns in zip(own, other, strict=True):
        sides = [of_rows] if of_columns is of_rows else [of_rows, of_columns]
        values += [[side.messages for side in sides], [side.upstream for side in sides]]
    kinds = kinds_of(graphs, [side.messages.shape[1] for side in own])
    powers = _powers(values, [kind.form.product for kind in kinds for _ in range(2)], 2 * graphs[0].num_stages)
    return list(zip(powers[::2], powers[1::2], strict=True))
