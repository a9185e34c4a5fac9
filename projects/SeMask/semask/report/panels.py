"""A picture of a few images of a dataset with their predictions."""

import copy
import logging
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import nn

from semask.data.bands import reader_of
from semask.data.reading import read_label
from semask.errors import ConfigError, DataError, UnreadableError
from semask.inference.model_outputs import Mapper, class_map, evaluating, predict
from semask.utils.palette import class_colors
from semask.visualize.drawing import Panel, compose_panels

logger = logging.getLogger(__name__)


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

    records = _evenly_spaced(DatasetCatalog.get(dataset_name), num_images, dataset_name)
    with evaluating(model) as model:
        panels = list(_readable_panels(model, records, mapper, ignore_label))
    return compose_panels(panels, colors=colors, ignore_label=ignore_label, class_names=names)


def _evenly_spaced(
    records: list[dict[str, Any]], number: int, dataset_name: str
) -> list[dict[str, Any]]:
    if number < 1:
        raise ValueError(f"num_images must be at least 1, not {number}.")
    if not records:
        raise DataError(f"Dataset '{dataset_name}' has no images.")
    positions = np.linspace(0, len(records) - 1, min(number, len(records))).round().astype(int)
    return [records[position] for position in positions]


def _readable_panels(
    model: nn.Module, records: list[dict[str, Any]], mapper: Mapper, ignore_label: int
) -> Iterator[Panel]:
    """The panels of the readable files: an unreadable one must not end a training."""
    unreadable: list[UnreadableError] = []
    for record in records:
        try:
            yield _panel(model, record, mapper, ignore_label)
        except UnreadableError as error:
            logger.warning("Left out of the picture: %s", error)
            unreadable.append(error)
    if len(unreadable) == len(records):
        raise unreadable[0]


def _panel(model: nn.Module, record: dict[str, Any], mapper: Mapper, ignore_label: int) -> Panel:
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
