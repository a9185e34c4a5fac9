"""Whether a graph is being made of what runs."""

import torch
from torch import nn


def traced() -> bool:
    """True while a model is compiled, exported or counted: it then shows its plain form."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def trained(module: nn.Module) -> bool:
    """Whether a module is run in training, with gradients, and no graph is made of it."""
    return module.training and torch.is_grad_enabled() and not traced()


def evaluated(module: nn.Module) -> bool:
    """Whether a module is run in evaluation, without gradients, and no graph is made of it.

    The modules in it are taken to be in evaluation, too, where nothing is drawn at random.
    """
    return not (module.training or torch.is_grad_enabled() or traced())
