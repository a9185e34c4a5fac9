"""The choice of :mod:`semask.ops.apply`, for modules that still take it as arguments."""

from detectron2.config import CfgNode


def fast_paths(cfg: CfgNode) -> frozenset[str]:
    """See :func:`semask.ops.apply.select_fast_paths`."""
    from semask.ops.apply import select_fast_paths  # which imports what calls this

    return select_fast_paths(cfg)
