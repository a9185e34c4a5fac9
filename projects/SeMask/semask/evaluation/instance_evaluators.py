"""Evaluators of instances and panoptic maps, for COCO's annotation formats."""

import contextlib
import io
import itertools
import json
import logging
import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import pycocotools.mask as mask_util
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators, SemSegEvaluator
from detectron2.structures import BoxMode, Instances
from detectron2.utils import comm
from pycocotools.coco import COCO

from semask.data.annotations import inspect
from semask.data.image_files import opened_image
from semask.errors import ConfigError
from semask.evaluation.average_precision import METRICS, average_precision, official_evaluator
from semask.evaluation.matching import instance_scores
from semask.evaluation.panoptic_evaluator import PanopticEvaluator
from semask.evaluation.panoptic_truth import PanopticTruth, contiguous_to_dataset
from semask.ops.mask_postprocess import EncodedMasks, encode_mask
from semask.utils.files import read_json, replacing
from semask.utils.text import value_table

logger = logging.getLogger(__name__)

# Values of "evaluator_type" in a dataset's metadata.
INSTANCES = ("coco", "cityscapes_instance")
PANOPTIC = ("coco_panoptic_seg", "ade20k_panoptic_seg", "cityscapes_panoptic_seg")
# Files of InstanceEvaluator; the last two have Detectron2's names.
RESULT_FILE = "instance_evaluation.json"
DETECTIONS_FILE = "coco_instances_results.json"
PREDICTIONS_FILE = "instances_predictions.pth"


class InstanceEvaluator(DatasetEvaluator):
    """AP of boxes and masks, and Boundary AP; results and files are those of ``COCOEvaluator``.

    The main process also writes ``RESULT_FILE``, with the results and a score of each image.

    Masks are run-length encoded one by one, unless they already are, so at most one full mask is in
    memory. Classes need not be contiguous: a panoptic model's things can be any of its classes.
    """

    def __init__(
        self,
        dataset_name: str,
        folder: str,
        *,
        masks: bool,
        detections_per_image: int = 100,
        library: str = "pycocotools",
        boundary: bool = False,
    ) -> None:
        """
        Args:
            dataset_name: a registered dataset with "json_file" in its metadata; or else with
                "panoptic_json" and "panoptic_root", whose things are then the instances. Without
                either, the annotations in the dataset's dicts are used, as in ``COCOEvaluator``.
            folder: the output folder.
            masks: also evaluate masks, not only boxes.
            detections_per_image: maximum number of detections per image; those with the highest
                scores count.
            library: see :func:`average_precision`.
            boundary: also evaluate Boundary AP.
        """
        metadata = MetadataCatalog.get(dataset_name)
        self._dataset_name = dataset_name
        self._folder = folder
        self._masks = masks
        self._limit = detections_per_image
        self._library = library
        self._kinds = ["bbox", *(["segm"] if masks else []), *(["boundary"] if boundary else [])]
        self._truth: COCO | None = None
        file, from_maps = metadata.get("json_file"), metadata.get("panoptic_json")
        if file and (os.path.isfile(file) or not from_maps):
            self._truth = _indexed(read_json(file))
            fix_ground_truth(self._truth, masks=masks)
        self.reset()

    @property
    def truth(self) -> COCO:
        """The annotations, as evaluated."""
        if self._truth is None and MetadataCatalog.get(self._dataset_name).get("panoptic_json"):
            self._truth = PanopticTruth(self._dataset_name).instances()
        elif self._truth is None:
            self._truth = instances_of_records(self._dataset_name)
            fix_ground_truth(self._truth, masks=self._masks)
        return self._truth

    @property
    def category_names(self) -> dict[int, str]:
        """Category names by the dataset's own ids, in the order of the ids."""
        return {given: self.truth.cats[given]["name"] for given in sorted(self.truth.cats)}

    def reset(self) -> None:
        """Discard all results."""
        self._predictions: list[dict[str, Any]] = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Store the "instances" of a batch, encoded."""
        for entry, output in zip(inputs, outputs, strict=True):
            found = coco_results(output["instances"], entry["image_id"])
            self._predictions.append({"image_id": entry["image_id"], "instances": found})

    def detections(self, predictions: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """All instances with the dataset's own category ids."""
        metadata = MetadataCatalog.get(self._dataset_name)
        things, _ = contiguous_to_dataset(metadata)
        return [
            {**entry, "category_id": things.get(entry["category_id"], entry["category_id"])}
            for prediction in predictions
            for entry in prediction["instances"]
        ]

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """In percent {"bbox": {"AP": ..., ...}, "segm": ..., "boundary": ...}, as configured.

        None except in the main process.
        """
        comm.synchronize()
        gathered = comm.gather(self._predictions)
        if not comm.is_main_process():
            return None
        predictions = list(itertools.chain(*gathered))
        with replacing(os.path.join(self._folder, PREDICTIONS_FILE)) as file:
            torch.save(predictions, file)
        detections = self.detections(predictions)
        with replacing(os.path.join(self._folder, DETECTIONS_FILE)) as file:
            file.write(json.dumps(detections).encode())
        if not detections:
            logger.warning("No instances were predicted on '%s'.", self._dataset_name)
        results = {
            kind: average_precision(
                self.truth,
                detections,
                kind,
                categories=self.category_names,
                limit=self._limit,
                library=self._library,
            )
            for kind in self._kinds
        }
        rows = [[kind, *(values[key] for key in METRICS)] for kind, values in results.items()]
        table = value_table(rows, ["", *METRICS], "instance of this size in the ground truth")
        logger.info("Instances of '%s', by %s:\n%s", self._dataset_name, self._library, table)
        self._log_categories(results)
        self._write(results, detections)
        return results

    def _write(
        self,
        results: Mapping[str, Mapping[str, float]],
        detections: Sequence[dict[str, Any]],
    ) -> None:
        by_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        for detection in detections:
            by_image[detection["image_id"]].append(detection)
        document = {
            "dataset": self._dataset_name,
            "categories": list(self.category_names.values()),
            "masks": self._masks,
            "results": {
                kind: {key: None if math.isnan(value) else value for key, value in values.items()}
                for kind, values in results.items()
            },
            "images": instance_scores(self.truth, by_image, masks=self._masks),
        }
        with replacing(os.path.join(self._folder, RESULT_FILE)) as file:
            file.write(json.dumps(document, allow_nan=False).encode())

    def _log_categories(self, results: Mapping[str, Mapping[str, float]]) -> None:
        names = [name for name in self.category_names.values() if f"AP-{name}" in results["bbox"]]
        if names:
            rows = [[name, *(each[f"AP-{name}"] for each in results.values())] for name in names]
            absent = "instance of this category in the ground truth"
            table = value_table(rows, ["category", *results], absent)
            logger.info("AP of each category:\n%s", table)


def coco_results(instances: Instances, image_id: Any) -> list[dict[str, Any]]:
    """An image's predicted instances in COCO's result format, with the model's class indices."""
    instances = instances.to(torch.device("cpu"))
    boxes = BoxMode.convert(
        instances.pred_boxes.tensor.float().numpy(), BoxMode.XYXY_ABS, BoxMode.XYWH_ABS
    )
    results: list[dict[str, Any]] = [
        {"image_id": image_id, "category_id": category, "bbox": box, "score": score}
        for box, score, category in zip(
            boxes.tolist(),
            instances.scores.tolist(),
            instances.pred_classes.tolist(),
            strict=True,
        )
    ]
    if instances.has("pred_masks"):
        masks = instances.pred_masks
        rles = masks.rles if isinstance(masks, EncodedMasks) else map(encode_mask, masks)
        for result, rle in zip(results, rles, strict=True):
            result["segmentation"] = {**rle, "counts": rle["counts"].decode("ascii")}
    return results


def build_instance_evaluator(
    dataset_name: str,
    folder: str,
    *,
    masks: bool,
    panoptic: bool = False,
    detections_per_image: int = 100,
    library: str = "pycocotools",
    boundary: bool = False,
) -> DatasetEvaluator:
    """The evaluator of AP of boxes and masks, and optionally of PQ and stuff mIoU (Panoptic FPN).

    On Cityscapes it adds the dataset's own AP, see :mod:`semask.evaluation.average_precision`.

    Args:
        dataset_name: a registered dataset.
        folder: the output folder.
        panoptic: also evaluate the dataset's panoptic and semantic maps.
        masks, detections_per_image, library, boundary: see :class:`InstanceEvaluator`.
    """
    instances = InstanceEvaluator(
        dataset_name,
        folder,
        masks=masks,
        detections_per_image=detections_per_image,
        library=library,
        boundary=boundary,
    )
    evaluator: DatasetEvaluator = instances
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind == "cityscapes_instance" and masks:
        official = official_evaluator(dataset_name)
        evaluator = DatasetEvaluators([instances, official]) if official else instances
    if panoptic:
        stuff = StuffEvaluator(dataset_name, output_dir=folder)
        segments = PanopticEvaluator(dataset_name, folder)
        evaluator = DatasetEvaluators([stuff, instances, segments])
    return evaluator


class StuffEvaluator(SemSegEvaluator):
    """Detectron2's evaluator, for label maps in the formats that this project reads."""

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """See ``SemSegEvaluator``.

        Raises:
            DataError: a label map is missing, damaged or no image.
        """
        for entry in inputs:
            with opened_image(self.input_file_to_gt_file[entry["file_name"]], "label map"):
                pass
        super().process(inputs, outputs)


def check_evaluator_type(dataset_name: str) -> bool:
    """Whether a dataset has panoptic maps in addition to instances.

    Raises:
        ConfigError: there is no evaluator for the dataset.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", INSTANCES[0])
    if kind not in (*INSTANCES, *PANOPTIC):
        raise ConfigError(
            f"Dataset '{dataset_name}' has evaluator_type '{kind}'; to evaluate instances, set it "
            f"to one of {', '.join((*INSTANCES, *PANOPTIC))}."
        )
    return kind in PANOPTIC


def instances_of_records(dataset_name: str) -> COCO:
    """The annotations of a registered dataset's dicts, with their contiguous category ids.

    Raises:
        ConfigError: the dataset has no category names.
    """
    names = MetadataCatalog.get(dataset_name).get("thing_classes")
    records = DatasetCatalog.get(dataset_name)
    if not names:
        raise ConfigError(
            f"Dataset '{dataset_name}' has no annotations to evaluate instances with: its metadata "
            "need thing_classes and json_file or panoptic_json, or its dicts need annotations."
        )
    annotations: list[dict[str, Any]] = []
    for record in records:
        for entry in record.get("annotations", ()):
            mode = entry.get("bbox_mode", BoxMode.XYXY_ABS)
            annotation = {
                "id": len(annotations) + 1,
                "image_id": record["image_id"],
                "category_id": entry["category_id"],
                "iscrowd": int(entry.get("iscrowd", 0)),
                "bbox": BoxMode.convert(list(entry["bbox"]), mode, BoxMode.XYWH_ABS),
            }
            if "segmentation" in entry:
                annotation["segmentation"] = entry["segmentation"]
            annotations.append(annotation)
    content = {
        "info": {},
        "images": [
            {
                "id": record["image_id"],
                **{key: record[key] for key in ("file_name", "height", "width")},
            }
            for record in records
        ],
        "categories": [{"id": index, "name": name} for index, name in enumerate(names)],
        "annotations": annotations,
    }
    return _indexed(content)


def _indexed(content: dict[str, Any]) -> COCO:
    truth = COCO()
    truth.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def fix_ground_truth(truth: COCO, *, masks: bool) -> None:
    """Add the entries that pycocotools requires to annotations that lack them.

    Annotations that training skips become crowds: detections there are ignored.

    Args:
        truth: the annotations of a dataset; changed in place.
        masks: masks are evaluated, so an annotation needs one.
    """
    truth.dataset.setdefault("info", {})
    annotations = truth.dataset.get("annotations", ())
    if not all(isinstance(entry["id"], int) and entry["id"] > 0 for entry in annotations):
        for number, entry in enumerate(annotations, start=1):
            entry["id"] = number  # pycocotools stores ids as numbers, with 0 for "no match"
    for annotation in annotations:
        image = truth.imgs[annotation["image_id"]]
        found = inspect(annotation, image["height"], image["width"])
        x0, y0, x1, y1 = found.box or (0.0, 0.0, 0.0, 0.0)
        unusable = found.box is None or (masks and found.segmentation is None)
        annotation["iscrowd"] = int(bool(annotation.get("iscrowd", 0)) or unusable)
        if found.problems or not all(map(_is_number, annotation["bbox"])):
            annotation["bbox"] = [x0, y0, x1 - x0, y1 - y0]
        if found.segmentation is None:
            annotation["segmentation"] = [[x0, y0, x1, y0, x1, y1, x0, y1]]
        elif isinstance(found.segmentation, list):
            annotation["segmentation"] = [polygon.tolist() for polygon in found.segmentation]
        else:
            annotation["segmentation"] = found.segmentation
        if not _is_number(annotation.get("area")):
            outlined = found.segmentation is not None
            area = mask_util.area(truth.annToRLE(annotation)) if outlined else (x1 - x0) * (y1 - y0)
            annotation["area"] = float(area)
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
