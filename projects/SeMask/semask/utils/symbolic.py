"""Sizes in a graph that is exported for any size, where they are symbols and not numbers."""

from collections.abc import Sequence

from torch import SymInt


def is_symbolic(*sides: int) -> bool:
    """Whether any of these is a symbol."""
    return any(isinstance(side, SymInt) for side in sides)


def surely_equal(size: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two sizes are equal; of symbols, whether they are equal in every case."""
    if not is_symbolic(*size, *other):
        return tuple(size) == tuple(other)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports SymPy

    return all(statically_known_true(a == b) for a, b in zip(size, other, strict=True))
