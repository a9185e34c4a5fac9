"""Faster forms of Swin's parts.

Blocks a few windows at a time (within the cache in evaluation, recomputed from the input in
training), attention without changes of layout, patch embedding and merging a few rows at a time.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from semask.modeling.backbone.swin import PatchEmbed, PatchMerging, SwinBlock
from semask.modeling.backbone.windows import WindowAttention
from semask.ops import window
from semask.ops.modes import is_inference, is_tracing, is_training
from semask.ops.recompute import Call, call, recompute
from semask.ops.window import (
    WindowLayout,
    WindowPart,
    append_zero,
    gather_windows,
    map_parts,
    scatter_windows,
    window_layout,
)


class ChunkedSwinBlock(SwinBlock):
    """A :class:`SwinBlock` that is evaluated a few windows at a time.

    Hooks of its linear and norm layers are called for each part, those of ``attn`` and ``mlp``
    never.
    """

    def forward(self, x: Tensor) -> Tensor:
        """See :meth:`SwinBlock.forward`."""
        if not is_inference(self):
            return super().forward(x)
        layout = layout_of(self.attn, x)
        inputs = (self.attn.bias().contiguous(),)
        part = partial(through_windows, self, layout, inputs=inputs)
        return map_parts(part, x.flatten(0, 2), layout).view_as(x)


class RecomputedSwinBlock(SwinBlock):
    """A :class:`SwinBlock` that keeps only its input for the gradient.

    See :mod:`semask.ops.recompute`. It is the plain block with dropout, whose masks would have to
    be kept, and where a parameter has a hook, which would be called for each part. Hooks of its
    linear and norm layers are called for each part, those of ``attn`` and ``mlp`` never.
    """

    def forward(self, x: Tensor) -> Tensor:
        """See :meth:`SwinBlock.forward`."""
        hooked = any(parameter._backward_hooks for parameter in self.parameters())
        if not is_training(self) or hooked or self._has_dropout():
            return super().forward(x)
        layout = layout_of(self.attn, x)
        # Factors of stochastic depth for each sample's branches, drawn as in the plain form.
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
    """The block's output (n, C) for the tokens of some windows.

    Args:
        block: its layers are used.
        layout: of all windows.
        part: the windows to compute.
        x: their tokens.
        inputs: the position bias, and with stochastic depth the scales (B * H * W, 1) of the
            two branches.
        call_last: computes the last linear layer.
    """
    bias, *scales = inputs
    attn, mlp = block.attn, block.mlp
    qkv = gather_windows(project(attn, block.norm1(x)), part)
    attended = attn.attend(qkv, masked(bias, layout, part.windows))
    branch = attn.proj(scatter_windows(attended, part))
    x = x + (branch * part.take(scales[0]) if scales else branch)
    branch = call_last(mlp.fc2, F.gelu(mlp.fc1(block.norm2(x))))
    return x + (branch * part.take(scales[1]) if scales else branch)


def layout_of(attention: WindowAttention, x: Tensor) -> WindowLayout:
    """The windows of maps (B, H, W, C)."""
    batch, height, width, _ = x.shape
    return window_layout(batch, height, width, attention.window_size, attention.shift, x.device)


def project(attention: WindowAttention, tokens: Tensor) -> Tensor:
    """q, k and v of each token, and of one token for all of the padding.

    Projecting before cutting windows is the same and does not project padding again.

    Args:
        attention: its projection is used.
        tokens: (n, C), of maps in rows or any of them.

    Returns:
        (n + 1, 3 C).
    """
    qkv: Tensor = attention.qkv(append_zero(tokens))
    return qkv


def masked(bias: Tensor, layout: WindowLayout, part: slice = slice(None)) -> Tensor:
    """The bias, with the mask of shifted windows added.

    Args:
        bias: (heads, 1, N, N), see :meth:`WindowAttention.bias`.
        layout: of all windows.
        part: of the windows.

    Returns:
        (heads, windows, N, N); without a shift ``bias``, which serves any number of them.
    """
    if layout.masks is None:
        return bias
    return bias + layout.masks[layout.mask_of_window[part]].to(bias.dtype)


class GatheredWindowAttention(WindowAttention):
    """A :class:`WindowAttention` with one gather in, one gather out, and one call per product."""

    def forward(self, x: Tensor) -> Tensor:
        """See :meth:`WindowAttention.forward`."""
        layout = layout_of(self, x)
        windows = gather_windows(project(self, x.flatten(0, 2)), layout)
        out = self.attend(windows, masked(self.bias(), layout))
        return self.dropout(self.proj(scatter_windows(out, layout))).view(x.shape)

    def attend(self, qkv: Tensor, bias: Tensor) -> Tensor:
        """See :meth:`WindowAttention.attend`."""
        windows, tokens, _ = qkv.shape
        heads = self.num_heads
        # Heads first, so that one bias serves all windows.
        qkv = qkv.view(windows, tokens, 3, heads, -1).permute(2, 3, 0, 1, 4).contiguous()
        bias = bias.to(qkv.dtype).expand(-1, windows, -1, -1).flatten(0, 1)
        query, key, value = qkv.flatten(1, 2).unbind(0)
        logits = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=query.shape[-1] ** -0.5)
        dropout = self.attention_dropout if self.training else 0.0
        weights = F.dropout(logits.softmax(dim=-1), dropout).to(value.dtype)
        out = torch.bmm(weights, value).view(heads, windows, tokens, -1)
        return out.permute(1, 2, 0, 3).flatten(2)


class SdpaWindowAttention(WindowAttention):
    """A :class:`WindowAttention` by ``F.scaled_dot_product_attention``: fewer kernels."""

    def attend(self, qkv: Tensor, bias: Tensor) -> Tensor:
        """See :meth:`WindowAttention.attend`."""
        if is_tracing():
            return super().attend(qkv, bias)
        windows, tokens, _ = qkv.shape
        qkv = qkv.view(windows, tokens, 3, self.num_heads, -1).permute(2, 3, 0, 1, 4).contiguous()
        query, key, value = qkv.unbind(0)
        dropout = self.attention_dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias.to(qkv.dtype), dropout_p=dropout
        )
        return out.permute(1, 2, 0, 3).flatten(2)


class ChunkedPatchEmbed(PatchEmbed):
    """A :class:`PatchEmbed` that is evaluated a few rows of patches at a time."""

    def forward(self, image: Tensor) -> Tensor:
        """See :meth:`PatchEmbed.forward`."""
        if not is_inference(self):
            return super().forward(image)
        return in_bands(super().forward, image, dim=2, stride=self.patch_size)


class ChunkedPatchMerging(PatchMerging):
    """A :class:`PatchMerging` that is evaluated a few rows at a time."""

    def forward(self, x: Tensor) -> Tensor:
        """See :meth:`PatchMerging.forward`."""
        if not is_inference(self):
            return super().forward(x)
        return in_bands(super().forward, x, dim=1, stride=2)


def in_bands(layer: Callable[[Tensor], Tensor], x: Tensor, *, dim: int, stride: int) -> Tensor:
    """``layer(x)``, in bands, for a layer whose row of tokens depends on ``stride`` input rows.

    Args:
        layer: pads the last rows itself.
        x: an image (B, 3, H, W) or a map (B, H, W, C).
        dim: index of the dimension H.
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
    assert out is not None  # a map has at least one row
    return out
