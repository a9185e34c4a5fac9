"""COCO's average precision of boxes and masks, and Boundary AP.

Cityscapes' own instance AP is computed in addition if cityscapesscripts is installed.
"""

import contextlib
import copy
import importlib.util
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import cv2
import hotcoco
import numpy as np
import pycocotools.mask as mask_util
from detectron2.evaluation import CityscapesInstanceEvaluator
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from semask.errors import ConfigError
from semask.evaluation.boundary import band_width

logger = logging.getLogger(__name__)

# Results by name: IoU threshold (None = the mean over all) and area range.
METRICS: Mapping[str, tuple[float | None, int]] = {
    "AP": (None, 0),
    "AP50": (0.5, 0),
    "AP75": (0.75, 0),
    "APs": (None, 1),
    "APm": (None, 2),
    "APl": (None, 3),
}

Detections = Sequence[Mapping[str, Any]]

CITYSCAPES_PACKAGE = "cityscapesscripts"


def average_precision(
    truth: COCO,
    detections: Detections,
    kind: str,
    *,
    categories: Mapping[int, str],
    limit: int = 100,
    library: str = "pycocotools",
) -> dict[str, float]:
    """AP by COCO's definition, in percent.

    Args:
        truth: the annotations.
        detections: in COCO's result format, with "bbox", and with "segmentation" for masks.
        kind: "bbox", "segm", or "boundary" for Boundary AP (arXiv 2103.16562).
        categories: category names by id, in the order of the ids.
        limit: maximum number of detections of a category in an image; those with the highest scores
            count.
        library: "pycocotools", or "hotcoco" for the same numbers in less time.

    Returns:
        "AP", "AP50", "AP75", "APs", "APm", "APl", and with several categories "AP-<name>"; NaN
        where undefined, and everywhere if there are no detections.

    Raises:
        ConfigError: the library is unknown, or has no Boundary AP.
    """
    if library not in LIBRARIES:
        raise ConfigError(f"TEST.AP_LIBRARY is '{library}'; set it to {' or '.join(LIBRARIES)}.")
    if not detections:
        return dict.fromkeys(METRICS, float("nan"))
    if kind != "bbox":
        # If there is a box, pycocotools uses its area as the instance's.
        detections = [{k: v for k, v in entry.items() if k != "bbox"} for entry in detections]
    # Boundary AP is a subclass of pycocotools' evaluation.
    evaluate = LIBRARIES["pycocotools" if kind == "boundary" else library]
    precision, thresholds, ids = evaluate(truth, detections, kind, limit)
    results = {}
    for name, (threshold, area) in METRICS.items():
        chosen = slice(None) if threshold is None else np.isclose(thresholds, threshold)
        results[name] = _mean(precision[chosen][:, :, :, area])
    if len(categories) > 1:
        places = {category: index for index, category in enumerate(ids)}
        for category, name in categories.items():
            place = places.get(category)
            results[f"AP-{name}"] = _mean(precision[:, :, [] if place is None else place, 0])
    return results


# Precisions (thresholds, recalls, categories, areas) at the limit of detections, -1 where
# undefined; the thresholds; the category ids.
Precisions = tuple[np.ndarray, np.ndarray, list[int]]


def _by_pycocotools(truth: COCO, detections: Detections, kind: str, limit: int) -> Precisions:
    with contextlib.redirect_stdout(io.StringIO()):
        found = truth.loadRes(copy.deepcopy(list(detections)))
        if kind == "boundary":
            evaluation: COCOeval = BoundaryCOCOeval(truth, found, "segm")
        else:
            evaluation = COCOeval(truth, found, kind)
        evaluation.params.maxDets = _limits(limit)
        evaluation.evaluate()
        evaluation.accumulate()
    precision: np.ndarray = evaluation.eval["precision"][..., -1]
    return precision, np.asarray(evaluation.params.iouThrs), list(evaluation.params.catIds)


def _by_hotcoco(truth: COCO, detections: Detections, kind: str, limit: int) -> Precisions:
    # hotcoco accepts only integer ids.
    images = {given: number for number, given in enumerate(truth.imgs, start=1)}
    ids = sorted(truth.cats)
    categories = {given: number for number, given in enumerate(ids, start=1)}

    def numbered(entries: Detections) -> list[dict[str, Any]]:
        return [
            {
                **entry,
                "image_id": images[entry["image_id"]],
                "category_id": categories[entry["category_id"]],
            }
            for entry in entries
        ]

    annotations = hotcoco.COCO(
        {
            "images": [{**image, "id": images[image["id"]]} for image in truth.imgs.values()],
            "categories": [{"id": categories[given], "name": str(given)} for given in ids],
            "annotations": numbered(truth.dataset["annotations"]),
        }
    )
    evaluation = hotcoco.COCOeval(annotations, annotations.load_res(numbered(detections)), kind)
    params = evaluation.params
    params.max_dets = _limits(limit)
    evaluation.evaluate()
    evaluation.accumulate()
    outcome = evaluation.eval
    assert outcome is not None  # set by accumulate
    precision = np.asarray(outcome["precision"])[..., -1]
    return precision, np.asarray(params.iou_thrs), [ids[number - 1] for number in params.cat_ids]


def _limits(limit: int) -> list[int]:
    """COCO's limits of detections per image: the libraries sort them, and the last one counts.

    A negative limit is none.
    """
    limit = limit if limit >= 0 else 2**31 - 1
    return [1, min(10, limit), limit]


LIBRARIES: dict[str, Callable[[COCO, Detections, str, int], Precisions]] = {
    "pycocotools": _by_pycocotools,
    "hotcoco": _by_hotcoco,
}


def _mean(precision: np.ndarray) -> float:
    defined = precision[precision > -1]
    return 100 * float(defined.mean()) if defined.size else float("nan")


class BoundaryCOCOeval(COCOeval):
    """COCO's evaluation with the smaller of mask IoU and Boundary IoU instead of mask IoU.

    arXiv 2103.16562, section 5: Boundary IoU alone ignores the interior of the masks.
    """

    def computeIoU(self, imgId: Any, catId: Any) -> Any:
        """IoU of each detection and annotation of an image and a category."""
        overlaps = super().computeIoU(imgId, catId)
        if len(overlaps) == 0:
            return overlaps
        truth, found = self._gts[imgId, catId], self._dts[imgId, catId]
        order = np.argsort([-entry["score"] for entry in found], kind="mergesort")
        found = [found[index] for index in order[: self.params.maxDets[-1]]]
        near = mask_util.iou(
            [contour_band(entry["segmentation"]) for entry in found],
            [contour_band(entry["segmentation"]) for entry in truth],
            [int(entry["iscrowd"]) for entry in truth],
        )
        return np.minimum(overlaps, near)


def contour_band(rle: Mapping[str, Any]) -> dict[str, Any]:
    """The pixels of a mask near its contour (or the image's border), as RLE."""
    mask = mask_util.decode(rle)
    width = band_width(*mask.shape)
    window = np.s_[width : -width or None, width : -width or None]
    padded = np.pad(mask, width)
    inner = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=width)[window]
    encoded: dict[str, Any] = mask_util.encode(np.asfortranarray(mask - inner))
    return encoded


class CityscapesAP(CityscapesInstanceEvaluator):
    """Detectron2's evaluator with its results under a separate key."""

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """{"cityscapes": {"AP": ..., "AP50": ...}} in percent; None except in the main process."""
        with _in1d():
            results = super().evaluate()
        return None if results is None else {"cityscapes": dict(results["segm"])}


def official_evaluator(dataset_name: str) -> CityscapesAP | None:
    """The evaluator for a "cityscapes_instance" dataset; None without the package."""
    if importlib.util.find_spec(CITYSCAPES_PACKAGE):
        return CityscapesAP(dataset_name)
    logger.info(
        "Dataset '%s' is evaluated by COCO's AP. Cityscapes' own, which is published for it and "
        "ignores instances of less than 100 pixels, needs the dataset's scripts: pip install %s.",
        dataset_name,
        CITYSCAPES_PACKAGE,
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
