"""The report of an instance evaluation: ``report.html``, one self-contained file.

It is made from the file that ``InstanceEvaluator`` writes. Only the few shown images are predicted
again.
"""

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
from semask.evaluation.instance_evaluators import RESULT_FILE
from semask.evaluation.matching import FALSE, SCORE, match_instances
from semask.inference.class_names import category_colors, prior_classes_of, stuff_classes_of
from semask.inference.model_outputs import (
    FoundInstances,
    Mapper,
    evaluating,
    predict_instances,
    prior_strides_of,
)
from semask.report.charts import histogram_values
from semask.report.page import (
    defined,
    modification_date,
    read_evaluation,
    worst_and_best_records,
    write_page,
)
from semask.report.panels import draw_annotations
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
from semask.visualize.instances import detection_texts, draw_instances

# Keys of the results, and their names on the page.
_TASKS = (("segm", "Mask"), ("bbox", "Box"), ("boundary", "Boundary"))


def write_instance_report(
    model: nn.Module,
    dataset_name: str,
    mapper: Mapper,
    folder: str,
    *,
    num_images: int = 4,
    facts: Sequence[tuple[str, str]] = (),
) -> str:
    """Write the report of an evaluation next to its result file, atomically.

    Args, Returns, Raises: as for :func:`semask.report.semantic.write_report`.
    """
    source = os.path.join(folder, RESULT_FILE)
    document = read_evaluation(source, dataset_name)
    images: list[dict[str, Any]] = document["images"]
    groups = worst_and_best_records(document, "F1", num_images, dataset_name, source)
    with evaluating(model) as model:
        worst, best = (
            [
                show_instances(
                    model,
                    record,
                    image,
                    mapper,
                    dataset_name=dataset_name,
                    masks=document["masks"],
                )
                for record, image in group
            ]
            for group in groups
        )
    results = _results(document["results"])
    tasks = [{"name": name, "results": results[key]} for key, name in _TASKS if key in results]
    return write_page(
        folder,
        "instance.html.j2",
        title=dataset_name,
        facts=[
            ("Evaluated", modification_date(source)),
            ("Images", f"{len(images):,}"),
            ("Categories", str(len(document["categories"]))),
            ("Instances", f"{sum(image['instances'] for image in images):,}"),
            *facts,
        ],
        tiles=_tiles(results),
        tasks=tasks,
        categories=_category_rows(results, document["categories"]),
        **histogram_values(images, "F1"),
        worst=worst,
        best=best,
    )


def _results(
    results: Mapping[str, Mapping[str, float | None]],
) -> dict[str, dict[str, float]]:
    return {
        task: {key: defined(value) for key, value in values.items()}
        for task, values in results.items()
    }


def _tiles(results: Mapping[str, Mapping[str, float]]) -> list[tuple[str, float, str]]:
    """Name, value in percent and explanation of the most important results."""
    explained = {"AP": "mean over IoU 0.50 to 0.95", "AP50": "at IoU 0.50", "AP75": "at IoU 0.75"}
    return [
        (f"{name} {metric}", results[key][metric], words)
        for key, name in _TASKS
        if key in results
        for metric, words in explained.items()
    ]


def _category_rows(
    results: Mapping[str, Mapping[str, float]], categories: Sequence[str]
) -> list[dict[str, Any]]:
    """Name and AP of each category, highest AP first and absent ones last."""
    values = np.stack(
        [category_ap(results[key], categories) for key, _ in _TASKS if key in results], axis=1
    )
    # The sort is stable: ties keep the dataset's order.
    order = np.argsort(-np.nan_to_num(values[:, 0], nan=-1), kind="stable")
    return [{"name": categories[index], "ap": values[index].tolist()} for index in order]


def category_ap(results: Mapping[str, float], categories: Sequence[str]) -> np.ndarray:
    """AP of each category in percent; NaN if it has none."""
    if len(categories) == 1:  # Detectron2 returns only the mean
        return np.array([results["AP"]])
    return np.array([results.get(f"AP-{name}", np.nan) for name in categories])


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
    priors, legend = _priors(model, output, record, image.shape[:2], dataset_name, masks=masks)
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


def _priors(
    model: nn.Module,
    output: Mapping[str, Any],
    record: Mapping[str, Any],
    size: tuple[int, ...],
    dataset_name: str,
    *,
    masks: bool,
) -> tuple[tuple[Picture, ...], tuple[tuple[str, tuple[int, ...]], ...]]:
    """The pictures of the priors, and names and colours of their classes."""
    if not output.get("priors"):
        return (), ()
    number = next(iter(output["priors"].values())).shape[0]
    classes, colors = prior_classes_of(dataset_name, number)
    truth = _prior_truth(record, size, number, dataset_name, masks=masks)
    pictures = prior_pictures(output, prior_strides_of(model), truth, classes, colors)
    return pictures, tuple(zip(classes, map(tuple, colors.tolist()), strict=True))


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
