"""What can be wrong with a dataset of instances, found before it is trained on.

The kinds of problems, and their words, are those of training's own check
(``semask.engine.check_run``): both come from ``semask.data.annotations``.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from detectron2.data import MetadataCatalog

from semask.data.annotations import check_stated_size, describe, inspect
from semask.data.checks.instance_report import InstanceDatasetReport, InstancesOfImage
from semask.data.checks.report import Problem, dark_words
from semask.data.checks.semantic import (
    BAD_IMAGE,
    BAD_SIZE,
    DARK,
    UNLISTED,
    Record,
    evenly_spaced,
    image_mode,
    list_dataset,
    noted,
    registered_metadata,
)
from semask.data.datasets.coco_folder import AnnotationFileError
from semask.data.reading import is_nearly_black, read_image
from semask.errors import ConfigError, DataError

UNKNOWN_CATEGORY, NO_INSTANCES = "unknown category", "nothing annotated"

Progress = Callable[..., Iterable[InstancesOfImage]]


def has_instances(name: str) -> bool:
    """Whether a registered dataset is one of instances, and no semantic one.

    Raises:
        ConfigError: there is no such dataset.
    """
    metadata = registered_metadata(name)
    kind = metadata.get("evaluator_type", "")
    return kind.startswith("coco") or bool(
        metadata.get("thing_classes") and not metadata.get("stuff_classes")
    )


def check_instance_dataset(
    name: str, *, sample: int = 0, threads: int = 1, progress: Progress | None = None
) -> InstanceDatasetReport:
    """Read the images of a dataset, and see what is wrong with them and their annotations.

    Args:
        name: a registered dataset.
        sample: number of images to look at, evenly spaced; 0 = all.
        threads: number of images that are read at once.
        progress: wraps the iteration over the images, as ``tqdm`` does: ``progress(images,
            total=number)``.

    Returns:
        The report, in which everything is that is wrong.

    Raises:
        ConfigError: there is no such dataset, or it has no category names.
    """
    registered_metadata(name)
    records: Sequence[Record] = ()
    problems = []
    try:
        records = list_dataset(name)  # which may be what reads the names of the categories
    except AnnotationFileError as error:
        problems = [Problem(UNLISTED, message) for message in error.messages]
    except DataError as error:
        problems = [Problem(UNLISTED, str(error))]
    categories = MetadataCatalog.get(name).get("thing_classes")
    if not categories and records:
        raise ConfigError(f"Dataset '{name}' has no categories: its metadata need thing_classes.")
    report = InstanceDatasetReport(name, categories or [])
    report.problems += problems
    report.listed = len(records)
    chosen = evenly_spaced(records, sample)
    pool = ThreadPoolExecutor(threads)
    try:
        examine = partial(examine_instances, num_categories=len(report.categories))
        images: Iterable[InstancesOfImage] = pool.map(examine, chosen)
        for image in progress(images, total=len(chosen)) if progress else images:
            report.add(image)
    finally:  # also where somebody has lost patience
        pool.shutdown(cancel_futures=True)
    if report.examined and not report.instances:
        message = f"Dataset '{name}' has no annotated instance to train on."
        report.problems.append(Problem(NO_INSTANCES, message))
    if report.examined and report.dark == report.examined:
        report.problems.append(Problem(DARK, dark_words(report.dark, report.examined)))
    return report


def examine_instances(record: Record, num_categories: int) -> InstancesOfImage:
    """Read an image, as training does, and see what is wrong with it and its annotations.

    Args:
        record: the dataset dict.
        num_categories: N; category ids are 0..N-1.
    """
    report = InstancesOfImage()
    with noted(report, BAD_IMAGE):
        image = read_image(record["file_name"])
        report.size = (image.shape[1], image.shape[0])
        report.mode = image_mode(record["file_name"])
        report.dark = is_nearly_black(image, report.mode)
    width, height = report.size or (record.get("width", 0), record.get("height", 0))
    with noted(report, BAD_SIZE):
        check_stated_size(record, height, width)
    # The annotations belong to the size that the dataset states.
    height, width = record.get("height", height), record.get("width", width)
    if not height or not width:
        return report
    for annotation in record.get("annotations", ()):
        _examine_annotation(annotation, record, (height, width), num_categories, report)
    return report


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
