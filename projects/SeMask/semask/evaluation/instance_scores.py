"""Which predicted instances are right, image by image, and the result file that says so."""

import json
import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.utils import comm
from pycocotools.coco import COCO

from semask.utils.files import read_json, replacing

RESULT_FILE = "instance_evaluation.json"
# What Detectron2's COCOEvaluator writes.
DETECTIONS_FILE = "coco_instances_results.json"
# A prediction is right with at least this IoU, as for AP50,
IOU = 0.5
# and counts from this score on.
SCORE = 0.5

FALSE, IN_CROWD = -1, -2


@dataclass(frozen=True)
class Matching:
    """What became of the instances of an image.

    Attributes:
        found: for each prediction, in the order given, the index of the instance that it is
            right about; or ``FALSE``, or ``IN_CROWD`` where it counts neither way.
        missed: indices of the instances that no prediction is right about.
    """

    found: tuple[int, ...]
    missed: tuple[int, ...]

    @property
    def f1(self) -> float | None:
        """2 R / (R + F + R + M) of R right, F false predictions and M missed instances, in
        percent; None where there is nothing.
        """
        right = sum(index >= 0 for index in self.found)
        counted = 2 * right + self.found.count(FALSE) + len(self.missed)
        return 200 * right / counted if counted else None


def match_instances(
    predicted: Sequence[Any],
    predicted_classes: Sequence[int],
    truth: Sequence[Any],
    truth_classes: Sequence[int],
    crowds: Sequence[bool],
) -> Matching:
    """Give each prediction the instance that it fits best and that no better one has.

    Args:
        predicted: RLEs, or boxes (x, y, width, height), the most certain first.
        predicted_classes: their categories.
        truth: the instances, in the same form.
        truth_classes: their categories.
        crowds: which of them are crowds.
    """
    usable = {index for index, crowd in enumerate(crowds) if not crowd}
    if not len(predicted) or not len(truth):
        return Matching((FALSE,) * len(predicted), tuple(sorted(usable)))
    overlaps = mask_util.iou(list(predicted), list(truth), [int(crowd) for crowd in crowds])
    same = np.equal.outer(np.asarray(predicted_classes), np.asarray(truth_classes))
    overlaps = np.where(same, overlaps, 0.0)
    free, found = set(usable), []
    for row in overlaps:
        best = max(free, key=lambda index: row[index], default=None)
        if best is not None and row[best] >= IOU:
            free.remove(best)
            found.append(best)
        else:
            in_crowd = any(row[index] >= IOU for index in range(len(row)) if crowds[index])
            found.append(IN_CROWD if in_crowd else FALSE)
    return Matching(tuple(found), tuple(sorted(free)))


class RecordedEvaluation(DatasetEvaluator):
    """Evaluators whose results are also written to ``RESULT_FILE``, with a score of each image."""

    def __init__(
        self,
        evaluator: DatasetEvaluator,
        instances: COCOEvaluator,
        *,
        dataset_name: str,
        folder: str,
        masks: bool,
    ) -> None:
        """
        Args:
            evaluator: gives the results.
            instances: the one of the instances, which may be the same or a part of it; it writes
                its predictions into ``folder``.
            dataset_name: the registered dataset.
            folder: where the file goes.
            masks: masks are predicted, else boxes alone.
        """
        self._evaluator = evaluator
        self._instances = instances
        self._dataset_name = dataset_name
        self._folder = folder
        self._masks = masks

    def reset(self) -> None:
        """See ``DatasetEvaluator``."""
        self._evaluator.reset()

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """See ``DatasetEvaluator``."""
        self._evaluator.process(inputs, outputs)

    def evaluate(self) -> dict[str, Any] | None:
        """See ``DatasetEvaluator``; the main process also writes the file."""
        results = self._evaluator.evaluate()
        if comm.is_main_process() and results:
            truth: COCO = self._instances._coco_api
            names = MetadataCatalog.get(self._dataset_name).thing_classes
            document = {
                "dataset": self._dataset_name,
                "categories": list(names),
                "masks": self._masks,
                "results": {
                    task: {key: _plain(value) for key, value in values.items()}
                    for task, values in results.items()
                },
                "images": image_scores(truth, self._detections(), masks=self._masks),
            }
            with replacing(os.path.join(self._folder, RESULT_FILE)) as file:
                file.write(json.dumps(document, allow_nan=False).encode())
        return results

    def _detections(self) -> dict[Any, list[dict[str, Any]]]:
        """The predictions of each image."""
        detections = read_json(os.path.join(self._folder, DETECTIONS_FILE))
        by_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        for detection in detections:
            by_image[detection["image_id"]].append(detection)
        return by_image


def image_scores(
    truth: COCO, detections: Mapping[Any, list[dict[str, Any]]], *, masks: bool
) -> list[dict[str, Any]]:
    """How well the instances of each image were found.

    Args:
        truth: the annotations, as evaluated.
        detections: in COCO's result format, by image id.
        masks: masks are compared, else boxes.

    Returns:
        A dict per image: "image_id", "file_name", "instances", "right", "false", "missed" (at an
        IoU and a score of 0.5) and "F1" in percent, None where there is nothing to find and
        nothing was found.
    """
    scores = []
    for image_id, image in truth.imgs.items():
        annotations = truth.imgToAnns.get(image_id, [])
        crowds = [bool(annotation["iscrowd"]) for annotation in annotations]
        matching = match_instances(
            *_boxes_or_masks(detections.get(image_id, []), masks),
            [truth.annToRLE(entry) if masks else entry["bbox"] for entry in annotations],
            [annotation["category_id"] for annotation in annotations],
            crowds,
        )
        right = sum(index >= 0 for index in matching.found)
        scores.append(
            {
                "image_id": image_id,
                "file_name": image["file_name"],
                "instances": len(crowds) - sum(crowds),
                "right": right,
                "false": matching.found.count(FALSE),
                "missed": len(matching.missed),
                "F1": matching.f1,
            }
        )
    return scores


def _boxes_or_masks(
    results: Sequence[Mapping[str, Any]], masks: bool
) -> tuple[list[Any], list[int]]:
    """Regions and categories of results in COCO's format, the most certain first.

    Args:
        results: of one image; those below ``SCORE`` are left out.
        masks: the regions are the masks, else the boxes.
    """
    chosen = [result for result in results if result["score"] >= SCORE]
    chosen.sort(key=lambda result: -result["score"])
    key = "segmentation" if masks else "bbox"
    return [result[key] for result in chosen], [result["category_id"] for result in chosen]


def _plain(value: Any) -> float | None:
    number = float(value)
    return None if math.isnan(number) else number
