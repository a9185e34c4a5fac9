"""Problems of an image's panoptic map and its segments."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from semask.data.annotations import check_stated_size
from semask.data.bands import RGB, ImageReader
from semask.data.checks.report import UNKNOWN_CATEGORY, InstancesOfImage, Problem
from semask.data.checks.semantic import BAD_IMAGE, BAD_SIZE, Record, image_mode, noted
from semask.data.reading import check_same_size, is_nearly_black
from semask.data.segments import compare, has_category, has_id, read_segment_ids
from semask.errors import DataError

BAD_MAP = "unusable panoptic map"


def is_panoptic(record: Mapping[str, Any]) -> bool:
    """Whether a dataset dict has segments and no instances."""
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
        Its report, whose "instances" are the segments.
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
    ids = None
    with noted(report, BAD_MAP):
        if path is None:
            raise DataError(f"Image '{record['file_name']}' has no 'pan_seg_file_name'.")
        ids = read_segment_ids(path)
    if ids is not None and image is not None:
        with noted(report, BAD_SIZE):
            check_same_size(image, ids, record["file_name"], str(path))
    segments = record["segments_info"]
    found = set() if ids is None else set(np.unique(ids).tolist())
    report.instances = Counter()
    for segment in segments:
        number, category = segment.get("id"), segment.get("category_id")
        if not has_id(segment):
            message = f"A segment of '{path}' has the id {number!r}; ids are whole numbers from 1"
            report.problems.append(Problem(BAD_MAP, message))
        elif not has_category(segment, num_categories):
            message = (
                f"Segment {number} of '{path}' has the category {category!r}; there are "
                f"0..{num_categories - 1}"
            )
            report.problems.append(Problem(UNKNOWN_CATEGORY, message))
        elif segment.get("iscrowd", 0):
            report.crowds += 1
        elif ids is None or number in found:
            report.instances[category] += 1
    if ids is not None:
        sentences = compare(found, segments).sentences(str(path))
        report.problems += [Problem(kind, message) for kind, message in sentences]
    return report
