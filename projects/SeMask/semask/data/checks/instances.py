"""Problems of a dataset of instances or segments, found before training.

The kinds of problems, and their words, are those of training's own check
(``semask.engine.check_run``): both come from ``semask.data.annotations``.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog

from semask.data.annotations import check_stated_size, describe, inspect
from semask.data.bands import RGB, ImageReader
from semask.data.checks.report import (
    UNKNOWN_CATEGORY,
    ImagesReport,
    InstancesOfImage,
    Problem,
    absent_lines,
    dark_words,
)
from semask.data.checks.semantic import (
    BAD_IMAGE,
    BAD_SIZE,
    DARK,
    UNLISTED,
    Progress,
    Record,
    examine_sample,
    image_mode,
    list_dataset,
    recorded_problems,
    registered_metadata,
)
from semask.data.datasets.coco_folder import AnnotationFileError
from semask.data.reading import check_same_size, is_nearly_black
from semask.data.segments import compare, has_category, has_id, read_segment_ids
from semask.errors import ConfigError, DataError
from semask.utils.text import pluralize, table

# Detectron2's default of TEST.DETECTIONS_PER_IMAGE.
USUAL_LIMIT = 100

BAD_MAP = "unusable panoptic map"


class InstanceDatasetReport(ImagesReport):
    """What a dataset of instances, or of segments, is like.

    Attributes:
        noun: "instance" or "segment".
        categories: their N names.
        instances: number of usable annotations of each category.
        images: number of images that have each category.
        crowds: number of crowds.
        boxes_alone: number of instances without a mask.
        empty: images without any instance.
        most: the largest number of instances in an image.
    """

    def __init__(self, name: str, categories: Sequence[str], noun: str = "instance") -> None:
        """
        Args:
            name, categories, noun: the attributes of these names; all counts start at 0.
        """
        super().__init__(name)
        self.noun = noun
        self.categories = list(categories)
        self.instances: Counter[int] = Counter()
        self.images: Counter[int] = Counter()
        self.crowds = self.boxes_alone = self.empty = self.most = 0

    @property
    def absent(self) -> list[str]:
        """The categories that no examined image has."""
        return [name for index, name in enumerate(self.categories) if not self.instances[index]]

    def add(self, image: InstancesOfImage) -> None:
        """Count an image and its annotations."""
        self.add_image(image)
        self.instances.update(image.instances)
        self.images.update(image.instances.keys())
        self.crowds += image.crowds
        self.boxes_alone += image.boxes_alone
        self.empty += not image.instances
        self.most = max(self.most, image.instances.total())

    def as_dict(self) -> dict[str, Any]:
        """The report in plain types, for JSON."""
        return {
            "dataset": self.name,
            "images": self.listed,
            "examined": self.examined,
            **self.images_as_dict(),
            "categories": [
                {"name": name, "instances": self.instances[index], "images": self.images[index]}
                for index, name in enumerate(self.categories)
            ],
            "absent_categories": self.absent,
            "crowds": self.crowds,
            "instances_without_mask": self.boxes_alone,
            "images_without_instances": self.empty,
            "most_instances_in_an_image": self.most,
            "problems": [vars(problem) for problem in self.problems],
        }

    def text(self) -> str:
        """The report for people: several lines, without a final line break."""
        first = f"Dataset '{self.name}': {self.listed} images with {self.noun}s"
        return self.as_text(first, self._table(), self._notes())

    def _table(self) -> str:
        rows = [
            (index, name, f"{self.instances[index]:,}", f"{self.images[index]:,}")
            for index, name in enumerate(self.categories)
        ]
        return table(rows, ["index", "category", f"{self.noun}s", "images"], names=1)

    def _notes(self) -> list[str]:
        lines = absent_lines(self.absent, len(self.categories), "categories")
        if self.empty:
            article = "an" if self.noun[0] in "aeiou" else "a"
            lines.append(f"Note: {pluralize(self.empty, 'image')} without {article} {self.noun}.")
        if self.boxes_alone:
            lines.append(
                f"Note: {self.boxes_alone} instances have a box and no mask: a detector of masks "
                "skips them, one of boxes (MODEL.MASK_ON False) does not."
            )
        if self.crowds:
            what = "annotations" if self.noun == "instance" else "segments"
            lines.append(f"Note: {self.crowds} {what} are crowds, which are not trained on.")
        if self.most > USUAL_LIMIT:
            lines.append(
                f"Note: an image has {self.most} {self.noun}s; set TEST.DETECTIONS_PER_IMAGE, and "
                "for mask classification MODEL.MASK_FORMER.NUM_OBJECT_QUERIES, to more than that "
                f"(the defaults are {USUAL_LIMIT})."
            )
        return lines


NO_INSTANCES = "nothing annotated"


def has_instances(name: str) -> bool:
    """Whether a registered dataset has instances, not label maps.

    Raises:
        ConfigError: there is no such dataset.
    """
    metadata = registered_metadata(name)
    kind = metadata.get("evaluator_type", "")
    return kind.startswith("coco") or bool(
        metadata.get("thing_classes") and not metadata.get("stuff_classes")
    )


def check_instance_dataset(
    name: str,
    *,
    sample: int = 0,
    threads: int = 1,
    progress: Progress | None = None,
    reader: ImageReader = RGB,
) -> InstanceDatasetReport:
    """Read the images of a dataset and find problems of them and their annotations.

    Of a panoptic dataset, whose records have segments instead of annotations, the segments of
    things and stuff are counted.

    Args:
        name: a registered dataset.
        sample: number of images to look at, evenly spaced; 0 = all.
        threads: number of images that are read at once.
        progress: wraps the iteration over the images, as ``tqdm`` does: ``progress(images,
            total=number)``.
        reader: reads the images.

    Returns:
        The report, with all problems.

    Raises:
        ConfigError: there is no such dataset, or it has no category names.
    """
    registered_metadata(name)
    records: Sequence[Record] = ()
    problems = []
    try:
        records = list_dataset(name)  # this may read the names of the categories
    except AnnotationFileError as error:
        problems = [Problem(UNLISTED, message) for message in error.messages]
    except DataError as error:
        problems = [Problem(UNLISTED, str(error))]
    panoptic = bool(records) and is_panoptic(records[0])
    key = "stuff_classes" if panoptic else "thing_classes"  # of panoptic data: all classes
    categories = MetadataCatalog.get(name).get(key)
    if not categories and records:
        raise ConfigError(f"Dataset '{name}' has no categories: its metadata need {key}.")
    noun = "segment" if panoptic else "instance"
    report = InstanceDatasetReport(name, categories or [], noun)
    report.problems += problems
    report.listed = len(records)
    look = examine_segments if panoptic else examine_instances
    examine = partial(look, num_categories=len(report.categories), reader=reader)
    for image in examine_sample(records, examine, sample, threads, progress):
        report.add(image)
    if report.examined and not report.instances:
        message = f"Dataset '{name}' has no annotated {noun} to train on."
        report.problems.append(Problem(NO_INSTANCES, message))
    if report.examined and report.dark == report.examined:
        report.problems.append(Problem(DARK, dark_words(report.dark, report.examined)))
    return report


def examine_instances(
    record: Record, num_categories: int, reader: ImageReader = RGB
) -> InstancesOfImage:
    """Read an image, as training does, and find problems of it and its annotations.

    Args:
        record: the dataset dict.
        num_categories: N; category ids are 0..N-1.
        reader: reads the image.
    """
    report = InstancesOfImage()
    _read_image(record, reader, report)
    width, height = report.size or (record.get("width", 0), record.get("height", 0))
    with recorded_problems(report, BAD_SIZE):
        check_stated_size(record, height, width)
    # The annotations belong to the size that the dataset states.
    height, width = record.get("height", height), record.get("width", width)
    if not height or not width:
        return report
    for annotation in record.get("annotations", ()):
        _examine_annotation(annotation, record, (height, width), num_categories, report)
    return report


def _read_image(record: Record, reader: ImageReader, report: InstancesOfImage) -> np.ndarray | None:
    """The image, whose properties go into the report; None = it cannot be read."""
    image = None
    with recorded_problems(report, BAD_IMAGE):
        image = reader.read(record["file_name"])
        report.size = (image.shape[1], image.shape[0])
        report.mode = image_mode(record["file_name"], reader)
        report.dark = is_nearly_black(image, report.mode)
    return image


def _examine_annotation(
    annotation: dict[str, Any],
    record: Record,
    size: tuple[int, int],
    num_categories: int,
    report: InstancesOfImage,
) -> None:
    words = describe(annotation, record)
    category = annotation.get("category_id")
    found = inspect(annotation, *size)
    report.problems += [Problem(kind, words) for kind in found.problems]
    if not isinstance(category, int) or not 0 <= category < num_categories:
        message = f"{words} has the category {category!r}; there are 0..{num_categories - 1}"
        report.problems.append(Problem(UNKNOWN_CATEGORY, message))
    elif annotation.get("iscrowd", 0):
        report.crowds += 1
    elif found.box is not None:
        report.instances[category] += 1
        report.boxes_alone += found.segmentation is None


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
    image = _read_image(record, reader, report)
    if image is not None:
        with recorded_problems(report, BAD_SIZE):
            check_stated_size(record, *image.shape[:2])
    path = record.get("pan_seg_file_name")
    ids = None
    with recorded_problems(report, BAD_MAP):
        if path is None:
            raise DataError(f"Image '{record['file_name']}' has no 'pan_seg_file_name'.")
        ids = read_segment_ids(path)
    if ids is not None and image is not None:
        with recorded_problems(report, BAD_SIZE):
            check_same_size(image, ids, record["file_name"], str(path))
    segments = record["segments_info"]
    found = set() if ids is None else set(np.unique(ids).tolist())
    report.instances = Counter()
    for segment in segments:
        number, category = segment.get("id"), segment.get("category_id")
        if not has_id(segment):
            message = f"A segment of '{path}' has the id {number!r}; ids must be integers from 1"
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
