"""A few images of a dataset beside their label maps, as one picture."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog

from semask.data.reading import DataError, read_image, read_label

from .drawing import Panel, compose_panels
from .palette import class_colors


def render_samples(dataset_name: str, records: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
    """Draw images and label maps (ignored pixels and values that are no class hatched).

    Args:
        dataset_name: a registered dataset with class names.
        records: dicts of the images to draw; those that cannot be read are left out.

    Returns:
        (height, width, 3) uint8, RGB; None where none of them can be read.
    """
    metadata = MetadataCatalog.get(dataset_name)
    names = metadata.stuff_classes
    panels = [panel for record in records if (panel := _panel(record)) is not None]
    if not panels:
        return None
    return compose_panels(
        panels,
        colors=class_colors(len(names), metadata.get("stuff_colors")),
        ignore_label=metadata.get("ignore_label", 255),
        class_names=names,
    )


def _panel(record: Mapping[str, Any]) -> Panel | None:
    try:
        image = read_image(record["file_name"])
        label = read_label(record["sem_seg_file_name"], record.get("label_map"))
    except (DataError, KeyError):  # The report that the picture goes with names it.
        return None
    return Panel(image, label, caption=os.path.basename(record["file_name"]))
