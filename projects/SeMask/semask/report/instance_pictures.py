"""The pictures of the report on instances: one image with everything that was made of it."""

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image
from torch import nn

from semask.data.annotations import inspect
from semask.data.mappers.prior_target import PriorTarget, Region, annotation_region
from semask.data.reading import read_image
from semask.evaluation.instance_scores import FALSE, SCORE, match_instances
from semask.inference.model_outputs import (
    FoundInstances,
    Mapper,
    class_map,
    predict_instances,
    prior_classes_of,
)
from semask.modeling.meta_arch.prior_maps import prior_strides_of
from semask.report.pictures import (
    WRONG,
    Picture,
    agreement,
    data_uri,
    fitting,
    prior_title,
)
from semask.report.samples import draw_annotations
from semask.visualize.drawing import painted, resized
from semask.visualize.instances import detection_texts, draw_instances

# Sky blue, apart from vermilion and grey for every kind of colour vision.
NOT_THERE = (86, 180, 233)


@dataclass(frozen=True)
class ShownInstances:
    """One image of the report.

    Attributes:
        name: of its file.
        scores: see ``semask.evaluation.instance_scores.image_scores``.
        size: (width, height) that all its pictures are shown in, as a ratio.
        pictures: image, ground truth, prediction, errors.
        priors: the semantic-prior map of each stage and their sum; none without a prior.
        legend: name and (R, G, B) of each class of the priors.
    """

    name: str
    scores: Mapping[str, Any]
    size: tuple[int, int]
    pictures: tuple[Picture, ...]
    priors: tuple[Picture, ...]
    legend: tuple[tuple[str, tuple[int, ...]], ...]


def show_instances(
    model: nn.Module,
    record: Mapping[str, Any],
    scores: Mapping[str, Any],
    mapper: Mapper,
    *,
    dataset_name: str,
    masks: bool,
) -> ShownInstances:
    """Predict one image again and draw it.

    Args:
        model: a detector in evaluation mode, not wrapped.
        record: its dataset dict, with annotations.
        scores: of the evaluation.
        mapper: turns a dataset dict into the model's input.
        dataset_name: the registered dataset.
        masks: masks are compared, else boxes.

    Raises:
        DataError: the image cannot be read.
    """
    image = read_image(record["file_name"])
    names = MetadataCatalog.get(dataset_name).thing_classes
    output = predict_instances(model, mapper(copy.deepcopy(dict(record))), priors=True)
    found = FoundInstances.of(output["instances"]).above(SCORE)
    size = fitting(image.shape[1], image.shape[0])

    def photograph(title: str, alt: str, pixels: np.ndarray) -> Picture:
        uri = data_uri(resized(pixels, size), "JPEG")
        return Picture(title, alt, uri, is_map=False)

    texts = detection_texts(found.classes, found.scores, names)
    drawn = draw_instances(image, found.boxes, found.masks, texts=texts)
    errors = _error_picture(image, record, found if masks else found._replace(masks=None))
    pictures = (
        photograph("Image", "The photograph", image),
        photograph(
            "Ground truth",
            f"{scores['instances']} annotated instances",
            draw_annotations(image, record, names),
        ),
        photograph("Prediction", f"{len(found.scores)} instances with their scores", drawn),
        photograph(
            "Errors",
            f"{scores['missed']} instances missed, in orange; {scores['false']} predicted ones "
            "that are not there, in blue",
            errors,
        ),
    )
    strides = prior_strides_of(model)
    priors, legend = _priors(output, record, image.shape[:2], dataset_name, strides, masks=masks)
    return ShownInstances(
        name=os.path.basename(record["file_name"]),
        scores=dict(scores),
        size=size,
        pictures=pictures,
        priors=priors,
        legend=legend,
    )


def _error_picture(
    image: np.ndarray,
    record: Mapping[str, Any],
    predictions: FoundInstances,
) -> np.ndarray:
    """The pale photograph with missed and false instances; boxes where there are no masks."""
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
    grey = image.mean(axis=2, keepdims=True)
    pale = np.repeat(165 + grey * 85 / 255, 3, axis=2)
    for mask, matched in zip(found, matching.found, strict=True):
        if matched == FALSE:
            pale[mask > 0] = 0.25 * pale[mask > 0] + 0.75 * np.array(NOT_THERE)
    for index in matching.missed:
        mask = there[index] > 0
        pale[mask] = 0.25 * pale[mask] + 0.75 * np.array(WRONG)
    return pale.astype(np.uint8)


class _Annotated(NamedTuple):
    """A usable annotation."""

    region: Region
    category: int
    crowd: bool


def _truth(record: Mapping[str, Any], height: int, width: int, *, masks: bool) -> list[_Annotated]:
    """The annotations as evaluated: with ``masks`` those without one are crowds, else all have
    boxes alone.
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


def _priors(
    output: Mapping[str, Any],
    record: Mapping[str, Any],
    size: tuple[int, int],
    dataset_name: str,
    strides: Mapping[str, int],
    *,
    masks: bool,
) -> tuple[tuple[Picture, ...], tuple[tuple[str, tuple[int, ...]], ...]]:
    maps = dict(output.get("priors", {}))
    if not maps:
        return (), ()
    number = next(iter(maps.values())).shape[0]
    names, colors = prior_classes_of(dataset_name, number)
    truth = None
    if number == len(MetadataCatalog.get(dataset_name).thing_classes) + 1 and number <= 255:
        annotations = [
            {
                **annotation,
                "segmentation": found.segmentation,
                "bbox": found.box,
                "bbox_mode": BoxMode.XYXY_ABS,
                "iscrowd": annotation.get("iscrowd", 0) or (masks and found.segmentation is None),
            }
            for annotation in record.get("annotations", ())
            if (found := inspect(annotation, *size)).box is not None
        ]
        target = PriorTarget(num_categories=number - 1).from_annotations(annotations, size)
        truth = np.where(target == 255, -1, target.astype(np.int64))
    titles = {name: prior_title(name, strides) for name in maps}
    if "prior" in output:
        maps["sum"], titles["sum"] = output["prior"], "Priors summed"
    pictures = []
    for name, scores in maps.items():
        classes = class_map(scores)
        picture: Image.Image = painted(classes, colors, fitting(classes.shape[1], classes.shape[0]))
        note = "" if truth is None else agreement(classes, truth)
        shares = np.bincount(classes.ravel(), minlength=number) / classes.size
        named = ", ".join(
            f"{names[i]} {100 * share:.0f} %" for i, share in enumerate(shares) if share
        )
        alt = f"{titles[name]}: {named}"
        pictures.append(Picture(f"{titles[name]}{note}", alt, data_uri(picture, "PNG")))
    listed = [(name, tuple(color)) for name, color in zip(names, colors.tolist(), strict=True)]
    return tuple(pictures), tuple(listed)
