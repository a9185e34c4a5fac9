"""The semantic-prior maps of a detector's backbone in inference."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from semask.modeling.backbone.base import SemSegBackbone
from semask.modeling.meta_arch.detectors import outputs_of


def gives_priors(model: nn.Module) -> bool:
    """Whether the backbone of a model has semantic layers."""
    backbone = getattr(model, "backbone", None)
    return isinstance(backbone, SemSegBackbone) and backbone.num_semantic_classes > 0


def prior_strides_of(model: nn.Module) -> dict[str, int]:
    """Stride of each prior map of a model's backbone, by name; empty without semantic layers."""
    backbone = getattr(model, "backbone", None)
    return backbone.prior_strides if isinstance(backbone, SemSegBackbone) else {}


@contextlib.contextmanager
def prior_maps_of(backbone: SemSegBackbone) -> Iterator[dict[str, Tensor]]:
    """A dictionary with the prior maps of the forward pass in the ``with`` block.

    Detectron2's detectors call their backbone with the images alone. Within the block it returns
    the priors as well, which the heads ignore, as in training.

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
            priors.update({k: outputs[k] for k in backbone.prior_strides if k in outputs})
    finally:
        handle.remove()


def without_padding(
    priors: Mapping[str, Tensor], strides: Mapping[str, int], size: tuple[int, int]
) -> dict[str, Tensor]:
    """The prior maps of one image, without its padding.

    Args:
        priors: {"prior2": (1, K, h, w), ...}.
        strides: of each of them, see :attr:`SemSegBackbone.prior_strides`.
        size: (height, width) of the image that the model was given, in pixels.

    Returns:
        {"prior2": (K, ceil(height / 4), ceil(width / 4)), ...}.
    """
    cut = {}
    for name, maps in priors.items():
        rows, columns = (-(-side // strides[name]) for side in size)
        cut[name] = maps[0, :, :rows, :columns]
    return cut
