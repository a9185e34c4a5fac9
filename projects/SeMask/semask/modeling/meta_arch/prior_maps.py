"""The semantic-prior maps of a detector's backbone in inference, where nobody else wants them."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from semask.modeling.backbone.base import PRIOR_STRIDES, SemSegBackbone
from semask.modeling.meta_arch.detectors import outputs_of


def gives_priors(model: nn.Module) -> bool:
    """Whether the backbone of a model has semantic layers."""
    backbone = getattr(model, "backbone", None)
    return isinstance(backbone, SemSegBackbone) and backbone.num_semantic_classes > 0


@contextlib.contextmanager
def prior_maps_of(backbone: nn.Module) -> Iterator[dict[str, Tensor]]:
    """A dictionary that has the prior maps of what runs in the ``with`` block.

    Detectron2's detectors call their backbone with the images alone; within the block it is asked
    for the priors as well, which the heads do not see, as in training.

    Args:
        backbone: a :class:`SemSegBackbone`.

    Yields:
        After a forward pass: {"prior2": (B, K, h, w), ...}, of the padded batch.
    """

    def ask(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "return_priors": True}

    handle = backbone.register_forward_pre_hook(ask, with_kwargs=True)
    priors: dict[str, Tensor] = {}
    try:
        with outputs_of(backbone) as outputs:
            yield priors
            priors.update({k: v for k, v in outputs.items() if k in PRIOR_STRIDES})
    finally:
        handle.remove()


def without_padding(priors: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
    """The prior maps of one image, without what it was padded with.

    Args:
        priors: {"prior2": (1, K, h, w), ...}.
        size: (height, width) of the image that the model was given, in pixels.

    Returns:
        {"prior2": (K, ceil(height / 4), ceil(width / 4)), ...}.
    """
    cut = {}
    for name, maps in priors.items():
        rows, columns = (-(-side // PRIOR_STRIDES[name]) for side in size)
        cut[name] = maps[0, :, :rows, :columns]
    return cut
