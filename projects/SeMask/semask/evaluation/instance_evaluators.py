"""Detectron2's evaluators of instances and panoptic maps, for COCO's kinds of annotation."""

import contextlib
import io
import math
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    SemSegEvaluator,
)
from hotcoco.panoptic import pq_compute
from pycocotools.coco import COCO

from semask.data.annotations import inspect
from semask.data.image_files import opened_image
from semask.errors import ConfigError
from semask.evaluation.instance_scores import RecordedEvaluation

# Values of "evaluator_type" in a dataset's metadata.
INSTANCES, PANOPTIC = "coco", "coco_panoptic_seg"


def build_instance_evaluator(
    dataset_name: str,
    folder: str,
    *,
    masks: bool,
    panoptic: bool = False,
    detections_per_image: int = 100,
) -> DatasetEvaluator:
    """AP of boxes and masks by pycocotools; on demand also PQ, and mIoU of the semantic map.

    Args:
        dataset_name: a registered dataset.
        folder: where the evaluators write what they have computed.
        masks: masks are evaluated, too; otherwise boxes alone.
        panoptic: evaluate panoptic and semantic maps as well, which the dataset has.
        detections_per_image: so many detections of an image count, those with the highest scores.
    """
    tasks = ("bbox", "segm") if masks else ("bbox",)
    # The compiled evaluation is not everywhere, and only the official one is for publications.
    instances = COCOEvaluator(
        dataset_name,
        tasks,
        output_dir=folder,
        max_dets_per_image=detections_per_image,
        use_fast_impl=False,
    )
    fix_ground_truth(instances._coco_api, masks=masks)
    evaluator: DatasetEvaluator = instances
    if panoptic:
        stuff = StuffEvaluator(dataset_name, output_dir=folder)
        segments = PanopticEvaluator(dataset_name, folder)
        evaluator = DatasetEvaluators([stuff, instances, segments])
    return RecordedEvaluation(
        evaluator, instances, dataset_name=dataset_name, folder=folder, masks=masks
    )


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
    """Whether a dataset has panoptic maps, beside the instances.

    Raises:
        ConfigError: there is no evaluator for the dataset.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", INSTANCES)
    if kind not in (INSTANCES, PANOPTIC):
        raise ConfigError(
            f"Dataset '{dataset_name}' has the evaluator_type '{kind}'; instances are evaluated "
            f"on datasets of the types {INSTANCES} and {PANOPTIC}."
        )
    return kind == PANOPTIC


def fix_ground_truth(truth: COCO, *, masks: bool) -> None:
    """Make pycocotools evaluate a file that lacks what it takes for granted.

    Annotations that training would skip are crowds then: what is found there counts neither way.

    Args:
        truth: the annotations of a dataset; changed in place.
        masks: masks are evaluated, so that an annotation needs one.
    """
    truth.dataset.setdefault("info", {})
    annotations = truth.dataset.get("annotations", ())
    if not all(isinstance(entry["id"], int) and entry["id"] > 0 for entry in annotations):
        for number, entry in enumerate(annotations, start=1):
            entry["id"] = number  # pycocotools keeps ids as numbers, and 0 stands for "no match"
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
