"""Cityscapes' own AP of instances, beside COCO's, where the dataset's scripts are installed."""

import importlib.util
import logging

from detectron2.evaluation import CityscapesInstanceEvaluator

logger = logging.getLogger(__name__)

PACKAGE = "cityscapesscripts"


class CityscapesAP(CityscapesInstanceEvaluator):
    """Detectron2's evaluator, with its results under a name of their own."""

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """{"cityscapes": {"AP": ..., "AP50": ...}} in percent; None but in the main process."""
        results = super().evaluate()
        return None if results is None else {"cityscapes": dict(results["segm"])}


def official_evaluator(dataset_name: str) -> CityscapesAP | None:
    """The evaluator of a dataset of the type "cityscapes_instance"; None without the package."""
    if importlib.util.find_spec(PACKAGE):
        return CityscapesAP(dataset_name)
    logger.info(
        "Dataset '%s' is evaluated by COCO's AP. Cityscapes' own, which is published for it and "
        "ignores instances of less than 100 pixels, needs the dataset's scripts: pip install %s.",
        *(dataset_name, PACKAGE),
    )
    return None
