"""What evaluation derives from parameters once, and again when one of them has changed."""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class ParameterCache(Generic[T]):
    """Remembers the last result of a function of parameters.

    A change in place is seen by the tensor's version, which every operation on it and
    ``load_state_dict`` raise. One through ``.data`` does not: call :meth:`clear` after it, as
    the modules that use this do when they are set to training.
    """

    def __init__(self) -> None:
        self._known: tuple[tuple[Tensor, ...], list[tuple[int, int]], T] | None = None

    def get(self, make: Callable[..., T], *tensors: Tensor) -> T:
        """``make(*tensors)``, computed only where the tensors are others than in the last call.

        Args:
            make: always the same function; it runs without gradients and without autocast, so
                that one result serves every precision that the caller computes in.
            tensors: what it is a function of.
        """
        if torch.compiler.is_compiling() or any(tensor.is_inference() for tensor in tensors):
            # A tracer's tensors are no values; tensors of inference mode have no version.
            return _in_own_precision(make, tensors)
        state = [(tensor.data_ptr(), tensor._version) for tensor in tensors]
        if self._known is not None:
            known, known_state, result = self._known
            same = len(known) == len(tensors) and all(map(_is, known, tensors))
            if same and known_state == state:
                return result
        with torch.inference_mode(False), torch.no_grad():
            result = _in_own_precision(make, tensors)
        self._known = (tensors, state, result)
        return result

    def clear(self) -> None:
        """Forget the result."""
        self._known = None


def _in_own_precision(make: Callable[..., T], tensors: tuple[Tensor, ...]) -> T:
    with torch.autocast(tensors[0].device.type, enabled=False):
        return make(*tensors)


def _is(a: Tensor, b: Tensor) -> bool:
    return a is b
