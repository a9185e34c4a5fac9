"""Cityscapes' own instance AP, in addition to COCO's, if cityscapesscripts is installed."""

import contextlib
import importlib.util
import logging
from collections.abc import Iterator

import numpy as np
from detectron2.evaluation import CityscapesInstanceEvaluator

logger = logging.getLogger(__name__)

PACKAGE = "cityscapesscripts"


class CityscapesAP(CityscapesInstanceEvaluator):
    """Detectron2's evaluator with its results under a separate key."""

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """{"cityscapes": {"AP": ..., "AP50": ...}} in percent; None except in the main process."""
        with _in1d():
            results = super().evaluate()
        return None if results is None else {"cityscapes": dict(results["segm"])}


def official_evaluator(dataset_name: str) -> CityscapesAP | None:
    """The evaluator for a "cityscapes_instance" dataset; None without the package."""
    if importlib.util.find_spec(PACKAGE):
        return CityscapesAP(dataset_name)
    logger.info(
        "Dataset '%s' is evaluated by COCO's AP. Cityscapes' own, which is published for it and "
        "ignores instances of less than 100 pixels, needs the dataset's scripts: pip install %s.",
        *(dataset_name, PACKAGE),
    )
    return None


@contextlib.contextmanager
def _in1d() -> Iterator[None]:
    """Restore ``np.in1d``, which NumPy 2.4 removed and cityscapesscripts 2.3 calls."""
    missing = "in1d" not in vars(np)
    if missing:
        vars(np)["in1d"] = lambda first, second: np.isin(np.ravel(first), second)
    try:
        yield
    finally:
        if missing:
            del vars(np)["in1d"]
