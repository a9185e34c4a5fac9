"""ADE20K's instances and segments from ``annotations`` and ``annotations_instance``.

The second folder comes from the archive ``annotations_instance.tar`` of the Places Challenge 2017
(http://sceneparsing.csail.mit.edu), unpacked into ``ADEChallengeData2016``: PNGs whose red channel
is the category, 1 to 100, and whose green channel numbers the instances of the image.
"""

import os
from collections.abc import Sequence
from functools import partial

import numpy as np

from semask.data.datasets.ade20k import CLASSES, FOLDERS, THINGS, ade20k_roots, prepared_paths
from semask.data.datasets.catalog import datasets_root, layout_hint
from semask.data.datasets.pairs import find_files, pair_files
from semask.data.preparation.coco_files import (
    Annotated,
    Prepared,
    Progress,
    Segment,
    describe_segments,
    prepare_split,
    save_ids,
)
from semask.data.reading import check_same_size, read_image, read_label
from semask.errors import DataError

_LAYOUT = (
    "ADEChallengeData2016/images/{training,validation}/NAME.jpg                  photographs",
    "ADEChallengeData2016/annotations/{training,validation}/NAME.png             0..150",
    "ADEChallengeData2016/annotations_instance/{training,validation}/NAME.png    instances",
)


def prepare_ade20k(*, workers: int = 0, progress: Progress | None = None) -> list[Prepared]:
    """Write ``ade20k_instance_{train,val}.json`` and ``ade20k_panoptic_{train,val}{.json,/}``.

    A pixel of a thing class outside all instances is in no segment. Category ids are the classes'
    indices in the list of 150, from 0.

    Args:
        workers: number of worker processes; 0 = this process.
        progress: wraps the iteration over the images.

    Returns:
        What was written for each split.

    Raises:
        DataError: files are missing or unpaired, or have invalid values.
    """
    return [_prepare(split, workers, progress) for split in FOLDERS]


def _prepare(split: str, workers: int, progress: Progress | None) -> Prepared:
    hint = layout_hint(_LAYOUT)
    image_root, label_root = ade20k_roots(split)
    instance_root = os.path.join(
        datasets_root(), "ADEChallengeData2016", "annotations_instance", FOLDERS[split]
    )
    labels = find_files(label_root, ".png", "label maps", hint)
    instances = find_files(instance_root, ".png", "maps of instances", hint)
    images = find_files(image_root, ".jpg", "images", hint)
    pair_files(images, labels, image_root, label_root, hint=hint)
    pair_files(images, instances, image_root, instance_root, hint=hint)
    paths = prepared_paths(split)
    task = partial(_convert, label_root, instance_root, paths["panoptic_root"])
    categories = [
        {"id": index, "name": name, "isthing": int(index in THINGS)}
        for index, name in enumerate(CLASSES)
    ]
    return prepare_split(
        *(split, task, sorted(images), categories, paths),
        image_name="{}.jpg".format,
        map_name="{}.png".format,
        workers=workers,
        progress=progress,
    )


def _convert(label_root: str, instance_root: str, target: str, stem: str) -> Annotated:
    """Paint stuff first, then instances over it."""
    path = os.path.join(instance_root, f"{stem}.png")
    label_path = os.path.join(label_root, f"{stem}.png")
    picture, label = read_image(path), read_label(label_path)
    check_same_size(picture, label, path, label_path)
    categories, numbers = picture[..., 0].astype(np.int64), picture[..., 1].astype(np.int64)
    ids = np.zeros(label.shape, np.int64)
    segments: list[Segment] = []
    for value in np.unique(label[label > 0]).tolist():
        if value - 1 not in THINGS:
            segments.append(Segment(len(segments) + 1, value - 1, thing=False))
            ids[label == value] = len(segments)
    for number in np.unique(numbers[numbers > 0]).tolist():
        inside = numbers == number
        category = _category(categories[inside], number, path)
        segments.append(Segment(len(segments) + 1, category, thing=True))
        ids[inside] = len(segments)
    save_ids(os.path.join(target, f"{stem}.png"), ids)
    return describe_segments(stem, ids, segments)


def _category(values: Sequence[int] | np.ndarray, number: int, path: str) -> int:
    """The class of an instance, 0..149, from the red channel of its pixels."""
    found = np.unique(values).tolist()
    if len(found) != 1 or not 1 <= found[0] <= len(THINGS):
        raise DataError(
            f"In '{path}' instance {number} (green channel) has the categories {found} (red "
            f"channel); it needs exactly one of 1..{len(THINGS)}."
        )
    return THINGS[found[0] - 1]
