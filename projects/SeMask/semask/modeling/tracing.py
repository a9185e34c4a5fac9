"""Whether a graph is being made of what runs."""

import torch


def traced() -> bool:
    """True while a model is compiled, exported or counted: it then shows its plain form."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()
