"""The problems of single instance annotations, and their usable parts.

An annotation that cannot be used is skipped and counted; its image stays in the training.
``inspect`` names the problems, with the same words before and during a run.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.structures import BoxMode

from semask.errors import DataError

# The kinds of problems.
NO_BOX, BAD_BOX = "no box of four numbers", "box without area"
BOX_OUTSIDE = "box outside the image"
SHORT_POLYGON, BAD_POLYGON = (
    "polygon with fewer than three points",
    "polygon that is not a list of x, y",
)
OTHER_SIZE, BAD_RLE = "mask (RLE) of another size than the image", "damaged mask (RLE)"
EMPTY_MASK, NO_MASK = "empty mask", "no mask"

Segmentation = list[np.ndarray] | dict[str, Any]


@dataclass
class Inspected:
    """The usable parts of an annotation.

    Attributes:
        box: (x0, y0, x1, y1) in pixels of the image file; None = there is none to use.
        segmentation: polygons, (2 n,) float64 each, or a compressed RLE; None as above.
        problems: their kinds, each once.
    """

    box: list[float] | None = None
    segmentation: Segmentation | None = None
    problems: list[str] = field(default_factory=list)


def inspect(annotation: Mapping[str, Any], height: int, width: int) -> Inspected:
    """Find the usable parts of an annotation.

    A box that cannot be used is replaced by the segmentation's, unless this is outside the image
    as well; of several polygons the valid ones are kept.

    Args:
        annotation: in Detectron2's form ("bbox", "bbox_mode", "segmentation") or COCO's. Beside
            COCO's polygons, [[x, y, x, y, ...], ...], one alone may be [x, y, ...], and the points
            of each may be pairs.
        height, width: of the image, in pixels.
    """
    found = Inspected()
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, Mapping):
        found.segmentation = _rle(segmentation, height, width, found.problems)
    elif segmentation is not None and not _is_empty(segmentation):
        found.segmentation = _polygons(segmentation, found.problems)
    found.box = _box(annotation, height, width, found.problems)
    if found.box is None and found.segmentation is not None:
        found.box = _inside(_box_around(found.segmentation), height, width, found.problems)
    found.problems = list(dict.fromkeys(found.problems))
    return found


def is_usable(
    annotation: Mapping[str, Any], record: Mapping[str, Any], *, masks: bool = False
) -> bool:
    """Whether an annotation is an instance to train on, not a crowd.

    Args:
        annotation: as for :func:`inspect`.
        record: the dataset dict of its image; without "height" and "width" it counts as usable.
        masks: the detector learns masks, for which a box is not enough.
    """
    if annotation.get("iscrowd", 0):
        return False
    if "height" not in record or "width" not in record:
        return True
    found = inspect(annotation, record["height"], record["width"])
    return found.box is not None and not (masks and found.segmentation is None)


def list_problems(
    records: Iterable[Mapping[str, Any]], *, masks: bool = False
) -> tuple[Counter[str], dict[str, str]]:
    """Count the problems of a dataset's annotations, without reading its images.

    Args:
        records: dataset dicts with "height" and "width"; others are ignored.
        masks: an instance without a mask is a problem, too.

    Returns:
        The number of annotations of each kind of problem, and one example of each.
    """
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for record in records:
        if "height" not in record or "width" not in record:
            continue
        for annotation in record.get("annotations", ()):
            found = inspect(annotation, record["height"], record["width"])
            kinds = found.problems
            crowd = annotation.get("iscrowd", 0)
            if masks and not (kinds or crowd) and found.segmentation is None:
                kinds = [NO_MASK]
            for kind in kinds:
                counts[kind] += 1
                examples.setdefault(kind, describe(annotation, record))
    return counts, examples


def check_stated_size(record: Mapping[str, Any], height: int, width: int) -> None:
    """Check the image's size against the one in the dataset dict, if it has one.

    Args:
        record: the dataset dict.
        height, width: of the image file, upright, in pixels.

    Raises:
        DataError: they differ.
    """
    stated = (record.get("height", height), record.get("width", width))
    if stated != (height, width):
        raise DataError(
            f"Image '{record['file_name']}' is {width}x{height} pixels (width x height, upright), "
            f"but its dataset states {stated[1]}x{stated[0]}: its annotations would not fit. "
            "Correct the annotation file, or save the image upright."
        )


def describe(annotation: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """An annotation and its image, for messages."""
    number = f"annotation {annotation['id']}" if "id" in annotation else "an annotation"
    return f"{number} of '{record['file_name']}'"


def _box(
    annotation: Mapping[str, Any], height: int, width: int, problems: list[str]
) -> list[float] | None:
    given = annotation.get("bbox")
    try:
        numbers = [float(value) for value in given]  # type: ignore[union-attr]
    except (TypeError, ValueError, OverflowError):
        numbers = []
    if len(numbers) != 4 or not all(map(math.isfinite, numbers)):
        problems.append(NO_BOX)
        return None
    mode = annotation.get("bbox_mode", BoxMode.XYWH_ABS)
    x0, y0, x1, y1 = BoxMode.convert(numbers, mode, BoxMode.XYXY_ABS)
    if x1 <= x0 or y1 <= y0:
        problems.append(BAD_BOX)
        return None
    return _inside([x0, y0, x1, y1], height, width, problems)


def _inside(
    box: list[float] | None, height: int, width: int, problems: list[str]
) -> list[float] | None:
    """A box that is at least partly in the image; None if there is none."""
    if box is None:
        return None
    x0, y0, x1, y1 = box
    if x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
        problems.append(BOX_OUTSIDE)
        return None
    return box


def _polygons(given: Any, problems: list[str]) -> list[np.ndarray] | None:
    kept = []
    for entry in _separate(given):
        try:
            polygon = np.asarray(entry, dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            polygon = np.zeros(1)
        if polygon.ndim == 2 and polygon.shape[1] == 2:  # points
            polygon = polygon.reshape(-1)
        if polygon.ndim != 1 or polygon.size % 2 or not np.isfinite(polygon).all():
            problems.append(BAD_POLYGON)
        elif polygon.size < 6:
            problems.append(SHORT_POLYGON)
        else:
            kept.append(polygon)
    return kept or None


def _separate(given: Any) -> Sequence[Any]:
    """The polygons as a list; a single one may be given as numbers or as points.

    A list of pairs is one polygon: a polygon has at least three points.
    """
    if not isinstance(given, Sequence | np.ndarray) or isinstance(given, str):
        return [given]
    if all(isinstance(entry, int | float | np.number) for entry in given):
        return [given]
    if all(isinstance(entry, Sequence | np.ndarray) and _is_point(entry) for entry in given):
        return [given]
    return list(given)


def _is_empty(given: Any) -> bool:
    return isinstance(given, Sequence | np.ndarray) and not len(given)


def _is_point(entry: Any) -> bool:
    return len(entry) == 2 and all(isinstance(value, int | float | np.number) for value in entry)


def _rle(
    given: Mapping[str, Any], height: int, width: int, problems: list[str]
) -> dict[str, Any] | None:
    counts, size = given.get("counts"), given.get("size")
    if not isinstance(size, Sequence) or list(size) != [height, width]:
        problems.append(OTHER_SIZE)
        return None
    try:
        if isinstance(counts, list):
            if sum(counts) != height * width or min(counts) < 0:
                raise ValueError("the runs do not fill the image")
            rle = mask_util.frPyObjects({"counts": counts, "size": list(size)}, height, width)
        elif isinstance(counts, str | bytes):
            rle = {"counts": counts, "size": list(size)}
        else:
            raise ValueError("it has no counts")
        mask = mask_util.decode(rle)
    except (ValueError, TypeError, OverflowError):
        problems.append(BAD_RLE)
        return None
    if not mask.any():
        problems.append(EMPTY_MASK)
        return None
    return dict(rle)


def _box_around(segmentation: Segmentation) -> list[float] | None:
    if isinstance(segmentation, dict):
        x, y, w, h = mask_util.toBbox(segmentation).tolist()
        return [x, y, x + w, y + h]
    points = np.concatenate([polygon.reshape(-1, 2) for polygon in segmentation])
    (x0, y0), (x1, y1) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    return [x0, y0, x1, y1] if x1 > x0 and y1 > y0 else None
