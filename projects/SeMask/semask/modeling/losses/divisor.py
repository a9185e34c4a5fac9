"""What the losses of a batch are divided by."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Divisor(NamedTuple):
    """A loss is a sum over a batch, divided by ``max(total, least)``.

    Attributes:
        total: of pixels, masks or weights; those of the parts of a batch add up to the batch's.
        least: see above.
    """

    total: float
    least: float = 1.0


def shares(parts: Sequence[Mapping[str, Divisor]]) -> list[dict[str, float]]:
    """The weights with which the losses of the parts of a batch add up to those of the batch.

    Args:
        parts: for each part, the divisors of its losses by their names; the same names for all.

    Returns:
        For each part, the weights by the same names.
    """
    weights: list[dict[str, float]] = [{} for _ in parts]
    for name, (_, least) in parts[0].items():
        whole = max(sum(part[name].total for part in parts), least) or 1.0
        for own, part in zip(weights, parts, strict=True):
            own[name] = max(part[name].total, least) / whole
    return weights


def without_layer(name: str) -> str:
    """The name of a loss without the number of its decoder layer: "loss_ce_3" to "loss_ce"."""
    return re.sub(r"_\d+$", "", name)
