"""What can be wrong with an image's panoptic map and its segments."""

from collections import Counter
from typing import Any

import numpy as np

from semask.data.annotations import check_stated_size
from semask.data.bands import RGB, ImageReader
from semask.data.checks.report import UNKNOWN_CATEGORY, InstancesOfImage, Problem
from semask.data.checks.semantic import BAD_IMAGE, BAD_SIZE, Record, image_mode, noted
from semask.data.reading import check_same_size, is_nearly_black, read_image
from semask.errors import DataError

BAD_MAP, NO_PIXELS, NO_SEGMENT = (
    "unusable panoptic map",
    "segment without pixels",
    "pixels without a segment",
)


def is_panoptic(record: Record) -> bool:
    """Whether a dataset dict has segments, and no instances beside them."""
    return "segments_info" in record and "annotations" not in record


def examine_segments(
    record: Record, num_categories: int, reader: ImageReader = RGB
) -> InstancesOfImage:
    """Read an image and its map, and compare the map with the segments of the JSON file.

    Args:
        record: the dataset dict.
        num_categories: K of things and stuff; category ids are 0..K-1.
        reader: reads the image.

    Returns:
        What it is like; its "instances" are its segments.
    """
    report = InstancesOfImage()
    image = None
    with noted(report, BAD_IMAGE):
        image = reader.read(record["file_name"])
        report.size = (image.shape[1], image.shape[0])
        report.mode = image_mode(record["file_name"], reader)
        report.dark = is_nearly_black(image, report.mode)
    if image is not None:
        with noted(report, BAD_SIZE):
            check_stated_size(record, *image.shape[:2])
    path = record.get("pan_seg_file_name")
    picture = None
    with noted(report, BAD_MAP):
        if path is None:
            raise DataError(f"Image '{record['file_name']}' has no 'pan_seg_file_name'.")
        picture = read_image(path)
    if picture is not None and image is not None:
        with noted(report, BAD_SIZE):
            check_same_size(image, picture[..., 0], record["file_name"], str(path))
    found = set() if picture is None else _ids(picture)
    segments = {segment["id"]: segment for segment in record["segments_info"]}
    report.instances = Counter()
    for number, segment in segments.items():
        category = segment["category_id"]
        if not 0 <= category < num_categories:
            message = (
                f"Segment {number} of '{path}' has the category {category!r}; there are "
                f"0..{num_categories - 1}"
            )
            report.problems.append(Problem(UNKNOWN_CATEGORY, message))
        elif segment.get("iscrowd", 0):
            report.crowds += 1
        elif picture is None or number in found:
            report.instances[category] += 1
    if picture is not None:
        _compare(report, str(path), segments, found)
    return report


def _compare(
    report: InstancesOfImage, path: str, segments: dict[int, Any], found: set[int]
) -> None:
    lacking = sorted(segments.keys() - found)
    if lacking:
        message = f"'{path}' has no pixel of the segments {_listed(lacking)} of the JSON file"
        report.problems.append(Problem(NO_PIXELS, message))
    unknown = sorted(found - segments.keys() - {0})
    if unknown:
        message = f"'{path}' has pixels of {_listed(unknown)}, no segments in the JSON file"
        report.problems.append(Problem(NO_SEGMENT, message))


def _ids(picture: np.ndarray) -> set[int]:
    """The ids in a map (H, W, 3), R + 256 G + 65536 B."""
    return set(np.unique(picture.astype(np.int64) @ np.array([1, 256, 65536])).tolist())


def _listed(numbers: list[int]) -> str:
    more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
    return ", ".join(map(str, numbers[:5])) + more
