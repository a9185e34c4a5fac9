"""Whether a module is traced, trained or used for inference; and values cached in inference."""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


def is_tracing() -> bool:
    """True while a model is compiled, exported or counted, for which the plain form is used."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_training(module: nn.Module) -> bool:
    """Whether a module is run in training, with gradients, and is not traced."""
    return module.training and torch.is_grad_enabled() and not is_tracing()


def is_inference(module: nn.Module) -> bool:
    """Whether a module is run in evaluation mode, without gradients, and is not traced.

    Its sub-modules are assumed to be in evaluation, too, and so without dropout.
    """
    return not (module.training or torch.is_grad_enabled() or is_tracing())


class ParameterCache(Generic[T]):
    """Remembers the last result of a function of parameters.

    An in-place change is detected by the tensor's version, which every in-place operation and
    ``load_state_dict`` increase. A change through ``.data`` does not: call :meth:`clear` after it,
    as the modules that use this do in ``train()``.
    """

    def __init__(self) -> None:
        self._known: tuple[tuple[Tensor, ...], list[tuple[int, int]], T] | None = None

    def get(self, make: Callable[..., T], *tensors: Tensor) -> T:
        """``make(*tensors)``, computed only if the tensors differ from those of the last call.

        Args:
            make: always the same function; it runs without gradients and without autocast, so
                the result is the same in every precision of the caller.
            tensors: its arguments.
        """
        if torch.compiler.is_compiling() or any(tensor.is_inference() for tensor in tensors):
            # A tracer's tensors have no values; tensors of inference mode have no version.
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
