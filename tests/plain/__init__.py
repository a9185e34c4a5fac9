"""SeMask-FPN written down plainly, as the measure of what the project computes and costs.

Written from the papers alone (SeMask, arXiv 2112.12782; Swin, arXiv 2103.14030; Semantic FPN,
arXiv 1901.02446), apart from the project's own code and as PyTorch is commonly written: every step
is an operation of its own, nothing is cached and nothing is left out. Parameters have the project's
names, so weights and gradients are compared one by one.
"""

from .data import PlainPipeline
from .loss import plain_loss
from .model import PlainSegmentor, plain_arguments, plain_model

__all__ = ["PlainPipeline", "PlainSegmentor", "plain_arguments", "plain_loss", "plain_model"]
