"""Window attention whose windows are cut by one gather, and by fused kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from semask.modeling.backbone.swin import WindowAttention
from semask.ops.tracing import traced
from semask.ops.window import (
    WindowLayout,
    append_zero,
    gather_windows,
    scatter_windows,
    window_layout,
)


def layout_of(attention: WindowAttention, x: Tensor) -> WindowLayout:
    """The windows of maps (B, H, W, C)."""
    batch, height, width, _ = x.shape
    return window_layout(batch, height, width, attention.window_size, attention.shift, x.device)


def project(attention: WindowAttention, tokens: Tensor) -> Tensor:
    """q, k and v of each token, and of the one that stands for the padding.

    Projecting first and cutting windows then is the same and does not project padding.

    Args:
        attention: whose projection it is.
        tokens: (n, C), of maps in rows or any of them.

    Returns:
        (n + 1, 3 C).
    """
    qkv: Tensor = attention.qkv(append_zero(tokens))
    return qkv


def masked(bias: Tensor, layout: WindowLayout, part: slice = slice(None)) -> Tensor:
    """With a shift, also keep apart what only the shift joined.

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
        if traced():
            return super().attend(qkv, bias)
        windows, tokens, _ = qkv.shape
        qkv = qkv.view(windows, tokens, 3, self.num_heads, -1).permute(2, 3, 0, 1, 4).contiguous()
        query, key, value = qkv.unbind(0)
        dropout = self.attention_dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias.to(qkv.dtype), dropout_p=dropout
        )
        return out.permute(1, 2, 0, 3).flatten(2)
