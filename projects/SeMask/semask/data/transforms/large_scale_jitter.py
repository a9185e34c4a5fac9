"""Large-scale jitter: images much smaller and much larger than they are, in crops of one size.

"Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation" (arXiv
2012.07177, section 4.1), without the pasting; the steps are Detectron2's own.
"""

from detectron2.config import CfgNode
from detectron2.data import transforms as T

from semask.errors import ConfigError


def build_large_scale_jitter(cfg: CfgNode) -> list[T.Augmentation]:
    """Resizing by a random factor, and a random crop, in place of the usual resizing.

    The image is made to fit into ``INPUT.LSJ.SIZE`` times a factor drawn uniformly from
    ``INPUT.LSJ.SCALE``; of what is larger than SIZE then, a window of SIZE is kept. Smaller
    images stay smaller: the batch is padded as always, and the padding counts in no loss.

    Args:
        cfg: with ``INPUT.LSJ``.

    Raises:
        ConfigError: a value cannot be used.
    """
    scale, size = list(cfg.INPUT.LSJ.SCALE), list(cfg.INPUT.LSJ.SIZE)
    if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
        raise ConfigError(
            f"INPUT.LSJ.SCALE is {scale}; it needs two factors greater than 0, the smaller first."
        )
    if len(size) != 2 or min(size) < 1:
        raise ConfigError(f"INPUT.LSJ.SIZE is {size}; it needs a height and a width in pixels.")
    return [T.ResizeScale(*scale, *size), T.FixedSizeCrop(tuple(size), pad=False)]
