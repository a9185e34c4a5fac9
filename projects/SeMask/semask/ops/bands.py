"""Patch embedding and merging a few rows at a time, in evaluation."""

from collections.abc import Callable

from torch import Tensor

from semask.modeling.backbone.swin import PatchEmbed, PatchMerging
from semask.ops import window
from semask.ops.tracing import evaluated


class ChunkedPatchEmbed(PatchEmbed):
    """A :class:`PatchEmbed` whose evaluation takes a few rows of patches at a time."""

    def forward(self, image: Tensor) -> Tensor:
        """See :meth:`PatchEmbed.forward`."""
        if not evaluated(self):
            return super().forward(image)
        return in_bands(super().forward, image, dim=2, stride=self.patch_size)


class ChunkedPatchMerging(PatchMerging):
    """A :class:`PatchMerging` whose evaluation takes a few rows at a time."""

    def forward(self, x: Tensor) -> Tensor:
        """See :meth:`PatchMerging.forward`."""
        if not evaluated(self):
            return super().forward(x)
        return in_bands(super().forward, x, dim=1, stride=2)


def in_bands(layer: Callable[[Tensor], Tensor], x: Tensor, *, dim: int, stride: int) -> Tensor:
    """``layer(x)`` for a layer that makes each row of tokens of ``stride`` rows of its input.

    Args:
        layer: pads the last rows itself.
        x: an image (B, 3, H, W) or a map (B, H, W, C).
        dim: the one of H.
        stride: see above.

    Returns:
        (B, ceil(H / stride), ceil(W / stride), C).
    """
    tokens_of_row = x.shape[0] * -(-x.shape[dim + 1] // stride)
    step = stride * max(1, window.CHUNK_TOKENS // tokens_of_row)
    if step >= x.shape[dim]:
        return layer(x)
    out: Tensor | None = None
    for index, part in enumerate(x.split(step, dim)):
        tokens = layer(part)
        if out is None:
            rows = -(-x.shape[dim] // stride)
            out = tokens.new_empty(len(tokens), rows, *tokens.shape[2:])
        start = index * step // stride
        out[:, start : start + tokens.shape[1]] = tokens
    assert out is not None  # a map has a row
    return out
