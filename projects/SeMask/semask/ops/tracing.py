"""Whether the model is being compiled, traced or exported."""

import torch
from torch import nn


def traced() -> bool:
    """True while a model is compiled, exported or counted, for which the plain form is used."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def trained(module: nn.Module) -> bool:
    """Whether a module is run in training, with gradients, and is not traced."""
    return module.training and torch.is_grad_enabled() and not traced()


def evaluated(module: nn.Module) -> bool:
    """Whether a module is run in evaluation, without gradients, and is not traced.

    Its sub-modules are assumed to be in evaluation, too, and so without dropout.
    """
    return not (module.training or torch.is_grad_enabled() or traced())
