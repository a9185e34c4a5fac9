"""What an evaluation of instances leaves behind for the report: one file of plain values."""

import json
import math
import os
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.utils import comm
from pycocotools.coco import COCO

from semask.evaluation.instance_matching import boxes_or_masks, match_instances
from semask.utils.files import replacing

RESULT_FILE = "instance_evaluation.json"
# What Detectron2's COCOEvaluator writes.
DETECTIONS_FILE = "coco_instances_results.json"


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
        with open(os.path.join(self._folder, DETECTIONS_FILE), encoding="utf-8") as file:
            detections = json.load(file)
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
            *boxes_or_masks(detections.get(image_id, []), masks),
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
                "false": matching.found.count(-1),
                "missed": len(matching.missed),
                "F1": matching.f1,
            }
        )
    return scores


def _plain(value: Any) -> float | None:
    number = float(value)
    return None if math.isnan(number) else number
