"""A picture of a few images of a dataset with their annotations or predictions."""

import copy
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image, ImageDraw
from torch import nn

from semask.data.annotations import inspect
from semask.data.bands import RGB, ImageReader, reader_of
from semask.data.checks.instances import is_panoptic
from semask.data.checks.semantic import evenly_spaced
from semask.data.mappers.prior_target import annotation_region
from semask.data.reading import check_same_size, read_label
from semask.data.segments import read_segment_ids
from semask.errors import ConfigError, DataError, UnreadableError
from semask.inference.model_outputs import Mapper, class_map, evaluating, predict
from semask.utils.palette import class_colors
from semask.visualize.drawing import FAINT, TEXT_SIZE, Panel, compose_panels, write_text
from semask.visualize.instances import (
    DrawnSegment,
    detection_texts,
    draw_instances,
    draw_segments,
)

logger = logging.getLogger(__name__)

# Size (width, height) of the drawn images with instances, and their number in a row.
_BOX = (480, 400)
_IN_A_ROW = 3
_GAP = 8


def render_panels(
    model: nn.Module, dataset_name: str, mapper: Mapper, num_images: int
) -> np.ndarray:
    """Run a model on evenly spaced images of a dataset and draw the predictions.

    Each row shows the image, its ground truth (ignored pixels hatched), the prediction and, if the
    model's ``inference`` accepts ``return_priors``, the semantic-prior map. Call it in one process
    only. The model's mode is restored afterwards, and no gradient is recorded.

    Args:
        model: called as ``model.inference([inputs], return_priors=True)``, which returns "sem_seg"
            and optionally "prior", both (K, H, W), or as a stock Detectron2 model,
            ``model([inputs])``. A model in ``DistributedDataParallel`` is unwrapped.
        dataset_name: a registered dataset with ``stuff_classes`` and possibly ``stuff_colors``.
        mapper: turns a dataset dict into the model's input, as in evaluation.
        num_images: number of rows; all images if the dataset has fewer.

    Returns:
        (height, width, 3) uint8, RGB. TensorBoard's writer needs (3, height, width):
        ``storage.put_image(name, picture.transpose(2, 0, 1))``.

    Raises:
        DataError: no image can be read, or the dataset is empty or has no label maps.
        ConfigError: the metadata have no class names.
        ValueError: ``num_images`` is not positive, or ``stuff_colors`` do not fit the classes.
    """
    metadata = MetadataCatalog.get(dataset_name)
    names = metadata.get("stuff_classes")
    if not names:
        raise ConfigError(
            f"Dataset '{dataset_name}' has no class names: set stuff_classes in its metadata."
        )
    colors = class_colors(len(names), metadata.get("stuff_colors"))
    ignore_label = metadata.get("ignore_label", 255)

    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, not {num_images}.")
    records = DatasetCatalog.get(dataset_name)
    if not records:
        raise DataError(f"Dataset '{dataset_name}' has no images.")
    with evaluating(model) as model:
        shown = evenly_spaced(records, num_images)
        panels = list(_readable_panels(model, shown, mapper, ignore_label))
    return compose_panels(panels, colors=colors, ignore_label=ignore_label, class_names=names)


def _readable_panels(
    model: nn.Module, records: list[dict[str, Any]], mapper: Mapper, ignore_label: int
) -> Iterator[Panel]:
    """The panels of the readable files: an unreadable one must not end a training."""
    unreadable: list[UnreadableError] = []
    for record in records:
        try:
            yield _predicted_panel(model, record, mapper, ignore_label)
        except UnreadableError as error:
            logger.warning("Left out of the picture: %s", error)
            unreadable.append(error)
    if len(unreadable) == len(records):
        raise unreadable[0]


def _predicted_panel(
    model: nn.Module, record: dict[str, Any], mapper: Mapper, ignore_label: int
) -> Panel:
    if "sem_seg_file_name" not in record:
        raise DataError(f"'{record['file_name']}' has no label map ('sem_seg_file_name').")
    label = read_label(record["sem_seg_file_name"], label_map=record.get("label_map"))
    output = predict(model, mapper(copy.deepcopy(record)))
    prediction = class_map(output["sem_seg"])
    caption = os.path.basename(record["file_name"])
    valid = label != ignore_label
    if valid.any() and prediction.shape == label.shape:
        accuracy = 100 * float((prediction == label)[valid].mean())
        caption += f"   pixel accuracy {accuracy:.1f} %"
    return Panel(
        image=reader_of(mapper).read_picture(record["file_name"]),
        label=label,
        prediction=prediction,
        prior=class_map(output["prior"]) if "prior" in output else None,
        caption=caption,
    )


def render_samples(
    dataset_name: str, records: Sequence[Mapping[str, Any]], reader: ImageReader = RGB
) -> np.ndarray | None:
    """Draw images and label maps (ignored pixels and values that are not classes hatched).

    Args:
        dataset_name: a registered dataset with class names.
        records: dicts of the images to draw; those that cannot be read are left out.
        reader: reads the images.

    Returns:
        (height, width, 3) uint8, RGB; None where none of them can be read.
    """
    metadata = MetadataCatalog.get(dataset_name)
    names = metadata.stuff_classes
    panels = [panel for record in records if (panel := _labelled_panel(record, reader)) is not None]
    if not panels:
        return None
    return compose_panels(
        panels,
        colors=class_colors(len(names), metadata.get("stuff_colors")),
        ignore_label=metadata.get("ignore_label", 255),
        class_names=names,
    )


def _labelled_panel(record: Mapping[str, Any], reader: ImageReader) -> Panel | None:
    try:
        image = reader.read_picture(record["file_name"])
        label = read_label(record["sem_seg_file_name"], record.get("label_map"))
    except (DataError, KeyError):  # The report that the picture goes with names it.
        return None
    return Panel(image, label, caption=os.path.basename(record["file_name"]))


def render_instance_samples(
    dataset_name: str, records: Sequence[Mapping[str, Any]], reader: ImageReader = RGB
) -> np.ndarray | None:
    """Draw images with their usable instances or segments, and their names.

    Args:
        dataset_name: a registered dataset with category names.
        records: dicts of the images to draw; those that cannot be read are left out.
        reader: reads the images.

    Returns:
        (height, width, 3) uint8, RGB; None where none of them can be read.
    """
    metadata = MetadataCatalog.get(dataset_name)
    pictures: list[tuple[str, Image.Image]] = []
    for record in records:
        try:
            image = reader.read_picture(record["file_name"])
            pixels = (
                draw_record_segments(image, record, metadata.stuff_classes)
                if is_panoptic(record)
                else draw_annotations(image, record, metadata.thing_classes)
            )
        except DataError:  # The report that the picture goes with names it.
            continue
        drawn = Image.fromarray(pixels)
        drawn.thumbnail(_BOX)
        pictures.append((os.path.basename(record["file_name"]), drawn))
    if not pictures:
        return None
    columns = min(_IN_A_ROW, len(pictures))
    rows = -(-len(pictures) // columns)
    cell = (_BOX[0] + _GAP, _BOX[1] + TEXT_SIZE + 6 + _GAP)
    canvas = Image.new("RGB", (columns * cell[0] + _GAP, rows * cell[1] + _GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for index, (name, picture) in enumerate(pictures):
        row, column = divmod(index, columns)
        left, top = _GAP + column * cell[0], _GAP + row * cell[1]
        canvas.paste(picture, (left, top))
        write_text(draw, (left, top + picture.height + 3), name, TEXT_SIZE, FAINT)
    return np.array(canvas)


def draw_annotations(
    image: np.ndarray, record: Mapping[str, Any], names: Sequence[str]
) -> np.ndarray:
    """An image with the usable instances of its dataset dict, without crowds.

    Args:
        image: (H, W, 3) uint8, RGB.
        record: the dataset dict.
        names: of the categories.

    Returns:
        (H, W, 3) uint8, RGB.
    """
    size = (image.shape[0], image.shape[1])
    boxes, masks, classes = [], [], []
    for annotation in record.get("annotations", ()):
        found = inspect(annotation, *size)
        if found.box is None or annotation.get("iscrowd", 0):
            continue
        region = annotation_region(
            {
                "category_id": annotation["category_id"],
                "segmentation": found.segmentation,
                "bbox": found.box,
                "bbox_mode": BoxMode.XYXY_ABS,
            }
        )
        boxes.append(found.box)
        masks.append(region.mask_of_image(*size).astype(bool))
        classes.append(annotation["category_id"])
    texts = detection_texts(np.array(classes, np.int64), None, names)
    return draw_instances(image, np.array(boxes).reshape(-1, 4), masks, texts=texts)


def draw_record_segments(
    image: np.ndarray, record: Mapping[str, Any], names: Sequence[str]
) -> np.ndarray:
    """An image with the segments of its dataset dict, without crowds.

    Args:
        image: (H, W, 3) uint8, RGB.
        record: the dataset dict, with "pan_seg_file_name" and "segments_info".
        names: of things and stuff.

    Returns:
        (H, W, 3) uint8, RGB.

    Raises:
        DataError: the map cannot be read, or has another size than the image.
    """
    path = record.get("pan_seg_file_name", "")
    ids = read_segment_ids(path)
    check_same_size(image, ids, record["file_name"], path)
    colors = class_colors(len(names)).tolist()
    segments = {
        segment["id"]: DrawnSegment(
            names[segment["category_id"]],
            None if segment.get("isthing", True) else tuple(colors[segment["category_id"]]),
        )
        for segment in record["segments_info"]
        if not segment.get("iscrowd", 0) and 0 <= segment["category_id"] < len(names)
    }
    return draw_segments(image, ids, segments)
