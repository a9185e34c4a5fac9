"""The losses and the data pipeline written down plainly, apart from the project's own code.

Written from the paper alone (SeMask, arXiv 2112.12782) and as is common with PyTorch: every step
is an operation of its own, nothing is cached and nothing is left out.
"""

from .data import PlainPipeline
from .loss import plain_loss

__all__ = ["PlainPipeline", "plain_loss"]
