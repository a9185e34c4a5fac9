"""The sizes of the tensors that a computation creates."""

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Largest(TorchDispatchMode):
    """The number of values in the largest created tensor, and in each.

    Attributes:
        values: in the largest.
        sizes: how many tensors have how many.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values = 0
        self.sizes: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor):
                self.values = max(self.values, made.numel())
                self.sizes[made.numel()] += 1
        return result
