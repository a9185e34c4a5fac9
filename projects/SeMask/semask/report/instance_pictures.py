"""The pictures of one image in the instance report: prediction, ground truth, errors, priors."""

import copy
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from torch import nn

from semask.data.annotations import inspect
from semask.data.bands import reader_of
from semask.data.mappers.prior_target import PriorTarget, Region, annotation_region
from semask.evaluation.matching import FALSE, SCORE, match_instances
from semask.inference.model_outputs import (
    FoundInstances,
    Mapper,
    category_colors,
    predict_instances,
    prior_classes_of,
    prior_strides_of,
    stuff_classes_of,
)
from semask.report.pictures import (
    NOT_THERE,
    WRONG,
    Picture,
    ShownImage,
    fitting,
    mark,
    pale,
    photograph,
    prior_pictures,
    query_pictures,
)
from semask.report.samples import draw_annotations
from semask.visualize.instances import detection_texts, draw_instances


def show_instances(
    model: nn.Module,
    record: Mapping[str, Any],
    scores: Mapping[str, Any],
    mapper: Mapper,
    *,
    dataset_name: str,
    masks: bool,
) -> ShownImage:
    """Predict one image again and draw it.

    Args:
        model: a detector in evaluation mode, not wrapped.
        record: its dataset dict, with annotations.
        scores: of the evaluation.
        mapper: turns a dataset dict into the model's input.
        dataset_name: the registered dataset.
        masks: compare masks instead of boxes.

    Raises:
        DataError: the image cannot be read.
    """
    image = reader_of(mapper).read_picture(record["file_name"])
    names = MetadataCatalog.get(dataset_name).thing_classes
    inputs = mapper(copy.deepcopy(dict(record)))
    output = predict_instances(model, inputs, priors=True)
    found = FoundInstances.of(output["instances"], SCORE)
    size = fitting(image.shape[1], image.shape[0])

    texts = detection_texts(found.classes, found.scores, names)
    drawn = draw_instances(image, found.boxes, found.masks, texts=texts)
    errors = _error_picture(image, record, found if masks else found._replace(masks=None))
    pictures = (
        photograph("Image", "The photograph", image, size),
        photograph(
            "Ground truth",
            f"{scores['instances']} annotated instances",
            draw_annotations(image, record, names),
            size,
        ),
        photograph("Prediction", f"{len(found.scores)} instances with their scores", drawn, size),
        photograph(
            "Errors",
            f"{scores['missed']} missed instances in orange, {scores['false']} false ones in blue",
            errors,
            size,
        ),
    )
    priors: tuple[Picture, ...] = ()
    legend: tuple[tuple[str, tuple[int, ...]], ...] = ()
    if output.get("priors"):
        number = next(iter(output["priors"].values())).shape[0]
        classes, colors = prior_classes_of(dataset_name, number)
        truth = _prior_truth(record, image.shape[:2], number, dataset_name, masks=masks)
        priors = prior_pictures(output, prior_strides_of(model), truth, classes, colors)
        legend = tuple(zip(classes, map(tuple, colors.tolist()), strict=True))
    return ShownImage(
        name=os.path.basename(record["file_name"]),
        scores=dict(scores),
        size=size,
        pictures=pictures,
        priors=priors,
        legend=legend,
        queries=query_pictures(
            model, inputs, image, functools.partial(_query_classes, dataset_name)
        ),
    )


def _query_classes(dataset_name: str, number: int) -> tuple[Sequence[str], np.ndarray]:
    """Names and colours of a model's classes: the categories, or things and stuff."""
    metadata = MetadataCatalog.get(dataset_name)
    if number == len(metadata.thing_classes):
        return metadata.thing_classes, category_colors(metadata, number)
    return stuff_classes_of(dataset_name, number)


def _error_picture(
    image: np.ndarray,
    record: Mapping[str, Any],
    predictions: FoundInstances,
) -> np.ndarray:
    """The pale photograph with missed and false instances; boxes if there are no masks."""
    height, width = image.shape[:2]
    truth = _truth(record, height, width, masks=predictions.masks is not None)
    predicted = [Region(None, box=box) for box in predictions.boxes.tolist()]
    if predictions.masks is not None:
        predicted = [Region(None, mask=mask) for mask in predictions.masks]
    found = [region.mask_of_image(height, width) for region in predicted]
    there = [annotated.region.mask_of_image(height, width) for annotated in truth]
    matching = match_instances(
        [mask_util.encode(np.asfortranarray(mask)) for mask in found],
        predictions.classes.tolist(),
        [mask_util.encode(np.asfortranarray(mask)) for mask in there],
        [annotated.category for annotated in truth],
        [annotated.crowd for annotated in truth],
    )
    picture = pale(image)
    for mask, matched in zip(found, matching.found, strict=True):
        if matched == FALSE:
            mark(picture, mask, NOT_THERE)
    for index in matching.missed:
        mark(picture, there[index], WRONG)
    return picture.astype(np.uint8)


class _Annotated(NamedTuple):
    """A usable annotation."""

    region: Region
    category: int
    crowd: bool


def _truth(record: Mapping[str, Any], height: int, width: int, *, masks: bool) -> list[_Annotated]:
    """The annotations as evaluated: with ``masks``, those without a mask are crowds; otherwise
    only boxes are used.
    """
    usable = []
    for annotation in record.get("annotations", ()):
        found = inspect(annotation, height, width)
        if found.box is None:
            continue
        entry = {
            "category_id": annotation["category_id"],
            "segmentation": found.segmentation if masks else None,
            "bbox": found.box,
            "bbox_mode": BoxMode.XYXY_ABS,
        }
        crowd = bool(annotation.get("iscrowd", 0)) or (masks and found.segmentation is None)
        usable.append(_Annotated(annotation_region(entry), annotation["category_id"], crowd))
    return usable


def _prior_truth(
    record: Mapping[str, Any],
    size: tuple[int, ...],
    num_classes: int,
    dataset_name: str,
    *,
    masks: bool,
) -> np.ndarray | None:
    """(H, W) target classes of a prior of painted instances, -1 = none; None for other priors."""
    if num_classes != len(MetadataCatalog.get(dataset_name).thing_classes) + 1 or num_classes > 255:
        return None
    height, width = size
    annotations = [
        {
            **annotation,
            "segmentation": found.segmentation,
            "bbox": found.box,
            "bbox_mode": BoxMode.XYXY_ABS,
            "iscrowd": annotation.get("iscrowd", 0) or (masks and found.segmentation is None),
        }
        for annotation in record.get("annotations", ())
        if (found := inspect(annotation, height, width)).box is not None
    ]
    painter = PriorTarget(num_categories=num_classes - 1)
    target = painter.from_annotations(annotations, (height, width))
    return np.where(target == painter.ignore_value, -1, target.astype(np.int64))
