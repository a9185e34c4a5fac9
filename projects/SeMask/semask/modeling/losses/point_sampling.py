"""Masks compared at points instead of at all pixels (arXiv 1912.08193, section 3.1)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def random_points(count: int, num_points: int, like: Tensor) -> Tensor:
    """``count`` sets of (x, y), uniform in [0, 1)^2: (count, num_points, 2), typed as ``like``."""
    return torch.rand(count, num_points, 2, dtype=like.dtype, device=like.device)


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Values of maps at points: bilinear between the centres of pixels, zero outside.

    A point within half a pixel of the border mixes with these zeros, as published.

    Args:
        maps: (N, C, H, W) of a floating-point type.
        points: (N, P, 2), (x, y) of each point in [0, 1], of the same type.

    Returns:
        (N, C, P).
    """
    grid = 2 * points[:, None] - 1
    return F.grid_sample(maps, grid, mode="bilinear", align_corners=False)[:, :, 0]


def uncertain_points(
    logits: Tensor,
    num_points: int,
    *,
    oversample_ratio: float = 3.0,
    importance_sample_ratio: float = 0.75,
) -> Tensor:
    """Random points, most of them where a mask is least certain.

    Args:
        logits: (M, h, w) mask logits; the uncertainty of a point is -|logit|.
        num_points: P, for each mask.
        oversample_ratio: candidates drawn for the uncertain points, as a multiple of P.
        importance_sample_ratio: share of the uncertain points in P.

    Returns:
        (M, P, 2), the uncertain points first; without gradient.
    """
    with torch.no_grad():
        num_uncertain = int(importance_sample_ratio * num_points)
        candidates = random_points(len(logits), int(oversample_ratio * num_points), logits)
        uncertainty = -sample_points(logits[:, None], candidates)[:, 0].abs()
        chosen = uncertainty.topk(num_uncertain, dim=1).indices
        uncertain = candidates.gather(1, chosen[..., None].expand(-1, -1, 2))
        others = random_points(len(logits), num_points - num_uncertain, logits)
        return torch.cat([uncertain, others], dim=1)
