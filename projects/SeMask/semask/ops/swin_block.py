"""Swin blocks a few windows at a time: evaluation in the cache, training from the input alone."""

from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from semask.modeling.backbone.swin import SwinBlock
from semask.ops.recompute import Call, call, recompute
from semask.ops.tracing import evaluated, trained
from semask.ops.window import (
    WindowLayout,
    WindowPart,
    gather_windows,
    map_parts,
    scatter_windows,
)
from semask.ops.window_attention import layout_of, masked, project


class ChunkedSwinBlock(SwinBlock):
    """A :class:`SwinBlock` whose evaluation goes through the map a few windows at a time.

    Hooks of the layers inside are called for each part, those of ``attn`` and ``mlp`` not at all.
    """

    def forward(self, x: Tensor) -> Tensor:
        """See :meth:`SwinBlock.forward`."""
        if not evaluated(self):
            return super().forward(x)
        layout = layout_of(self.attn, x)
        inputs = (self.attn.bias().contiguous(),)
        part = partial(through_windows, self, layout, inputs=inputs)
        return map_parts(part, x.flatten(0, 2), layout).view_as(x)


class RecomputedSwinBlock(SwinBlock):
    """A :class:`SwinBlock` that keeps nothing but its input for the gradient.

    See :mod:`semask.ops.recompute`. With dropout, whose choices would have to be kept, it is the
    plain block, and also where a parameter has a hook, which would be called for each part. Hooks
    of the layers inside are called for each part, those of ``attn`` and ``mlp`` not at all.
    """

    def forward(self, x: Tensor) -> Tensor:
        """See :meth:`SwinBlock.forward`."""
        hooked = any(parameter._backward_hooks for parameter in self.parameters())
        if not trained(self) or hooked or self._has_dropout():
            return super().forward(x)
        layout = layout_of(self.attn, x)
        # What stochastic depth multiplies each sample's branches by, drawn as the plain form does.
        samples = x.new_ones(len(x), 1, 1, 1)
        scales = [self.drop_path(samples) for _ in range(2)] if self.drop_path.rate else []
        inputs = [self.attn.bias().contiguous()]
        inputs += [scale.expand(*x.shape[:3], 1).flatten(0, 2) for scale in scales]
        table = self.attn.relative_position_bias_table
        parameters = [each for each in self.parameters() if each is not table]
        part = partial(through_windows, self, layout)
        return recompute(part, x.flatten(0, 2), layout, inputs, parameters).view_as(x)

    def _has_dropout(self) -> bool:
        return bool(self.attn.attention_dropout or self.attn.dropout.p or self.mlp.dropout.p)


def through_windows(
    block: SwinBlock,
    layout: WindowLayout,
    part: WindowPart,
    x: Tensor,
    inputs: Sequence[Tensor],
    call_last: Call = call,
) -> Tensor:
    """What becomes of the tokens (n, C) of some windows.

    Args:
        block: whose layers are used.
        layout: of all windows.
        part: which of them.
        x: their tokens.
        inputs: the position bias, and with stochastic depth the scales (B * H * W, 1) of the
            two branches.
        call_last: how the last linear layer is computed.
    """
    bias, *scales = inputs
    attn, mlp = block.attn, block.mlp
    qkv = gather_windows(project(attn, block.norm1(x)), part)
    attended = attn.attend(qkv, masked(bias, layout, part.windows))
    branch = attn.proj(scatter_windows(attended, part))
    x = x + (branch * part.take(scales[0]) if scales else branch)
    branch = call_last(mlp.fc2, F.gelu(mlp.fc1(block.norm2(x))))
    return x + (branch * part.take(scales[1]) if scales else branch)
