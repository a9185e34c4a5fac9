"""Panoptic quality (arXiv 1801.00868) by Detectron2's evaluator, computed by hotcoco."""

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
from detectron2.evaluation import COCOPanopticEvaluator
from hotcoco.panoptic import pq_compute


class PanopticEvaluator(COCOPanopticEvaluator):
    """PQ, SQ and RQ in percent, also of things and stuff alone.

    Detectron2's evaluator computes them with the package panopticapi, which no package index has;
    hotcoco follows the same protocol. Arguments and results are those of Detectron2's.
    """

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Keep the "panoptic_seg" of some images."""
        with _hotcoco_as_panopticapi():
            super().process(inputs, outputs)

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """{"panoptic_seg": {"PQ": ..., ...}}; None where this is not the main process."""
        with _hotcoco_as_panopticapi():
            return super().evaluate()


def segment_colors(ids: np.ndarray) -> np.ndarray:
    """(H, W) segment ids to (H, W, 3) uint8, R + 256 G + 65536 B, as COCO stores them."""
    return np.stack([ids >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8)


@contextlib.contextmanager
def _hotcoco_as_panopticapi() -> Iterator[None]:
    """Within it, Detectron2's imports from panopticapi find these functions."""
    utils, evaluation = ModuleType("panopticapi.utils"), ModuleType("panopticapi.evaluation")
    vars(utils)["id2rgb"] = segment_colors
    vars(evaluation)["pq_compute"] = pq_compute
    modules = {
        "panopticapi": ModuleType("panopticapi"),
        "panopticapi.utils": utils,
        "panopticapi.evaluation": evaluation,
    }
    installed = {name: sys.modules[name] for name in modules if name in sys.modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
        sys.modules.update(installed)
