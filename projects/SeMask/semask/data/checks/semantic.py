"""Problems of the files of a dataset, found before training.

``check_dataset`` reads all of them, ``quick_check`` a sample; both use the same words.
"""

import contextlib
import difflib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from semask.data.bands import RGB, ImageReader
from semask.data.checks.report import DatasetReport, ImageReport, PairReport, Problem, dark_words
from semask.data.datasets.catalog import datasets_root
from semask.data.datasets.pairs import PairingError
from semask.data.image_files import opened_image, unused_channels
from semask.data.reading import (
    check_label_values,
    check_same_size,
    is_nearly_black,
    read_label,
)
from semask.errors import ConfigError, DataError, UnreadableError
from semask.utils.text import one_line, pluralize

logger = logging.getLogger(__name__)

# The kinds of problems.
UNLISTED, UNPAIRED, UNREADABLE = "cannot be listed", "without counterpart", "unreadable"
BAD_IMAGE, BAD_LABEL, BAD_SIZE = "unusable image", "unusable label map", "sizes differ"
NO_LABELS, ONE_CLASS, DARK = "nothing labelled", "one class alone", "nearly black"

Record = dict[str, Any]
Progress = Callable[..., Iterable[Any]]
_Image = TypeVar("_Image", bound=ImageReport)


def list_dataset(name: str) -> list[Record]:
    """The dicts of a registered dataset, at least one.

    Raises:
        DataError: the dataset cannot be listed, or is empty.
    """
    try:
        records = DatasetCatalog.get(name)
    except (OSError, AssertionError) as error:  # from loaders of Detectron2 itself
        root = os.path.abspath(datasets_root())
        reason = one_line(error)
        raise DataError(
            f"Dataset '{name}' cannot be listed: {reason}. Datasets are looked for in '{root}' "
            "(environment variable DETECTRON2_DATASETS)."
        ) from error
    if not records:
        raise DataError(f"Dataset '{name}' has no images.")
    return records


def check_dataset(
    name: str,
    *,
    sample: int = 0,
    threads: int = 1,
    progress: Progress | None = None,
    reader: ImageReader = RGB,
) -> DatasetReport:
    """Read the images and label maps of a dataset and find their problems.

    Args:
        name: a registered dataset.
        sample: number of images to look at, evenly spaced; 0 = all.
        threads: number of images that are read at once.
        progress: wraps the iteration over the images, as ``tqdm`` does: ``progress(images,
            total=number)``.
        reader: reads the images.

    Returns:
        The report, with all problems of the files.

    Raises:
        ConfigError: there is no such dataset, or it has no class names.
    """
    report = DatasetReport(name, *_classes_and_ignore(name))
    records: Sequence[Record] = ()
    try:
        records = list_dataset(name)
    except PairingError as error:
        report.problems.append(Problem(UNPAIRED, str(error)))
        report.images_alone, report.labels_alone = error.images, error.labels
        records = error.records
    except DataError as error:
        report.problems.append(Problem(UNLISTED, str(error)))
    report.listed = len(records)
    examine = partial(
        examine_pair, num_classes=len(report.classes), ignore=report.ignore, reader=reader
    )
    for pair in examine_sample(records, examine, sample, threads, progress):
        report.add(pair)
    sound = not report.problems
    report.problems += [p for p in _meaningless(report) if sound or p.kind == NO_LABELS]
    if report.examined and report.dark == report.examined:
        report.problems.append(Problem(DARK, dark_words(report.dark, report.examined)))
    return report


def examine_sample(
    records: Sequence[Record],
    examine: Callable[[Record], _Image],
    sample: int,
    threads: int,
    progress: Progress | None,
) -> Iterator[_Image]:
    """The report of ``examine`` on each image; several are read at once.

    Args:
        records: of the dataset.
        examine: reads the files of one.
        sample, threads, progress: see :func:`check_dataset`.
    """
    chosen = evenly_spaced(records, sample)
    pool = ThreadPoolExecutor(threads)
    try:
        images: Iterable[_Image] = pool.map(examine, chosen)
        yield from progress(images, total=len(chosen)) if progress else images
    finally:  # after Ctrl-C, do not read the rest
        pool.shutdown(cancel_futures=True)


def _meaningless(report: DatasetReport) -> list[Problem]:
    """Problems of a dataset as a whole, although each of its files is valid."""
    name, ignore = report.name, report.ignore
    present = np.flatnonzero(report.images)
    if not report.examined:
        return []
    if not present.size:
        message = f"No image of dataset '{name}' has a labelled pixel."
        return [Problem(NO_LABELS, message)]
    if present.size > 1:
        return []
    others = (
        f"the others are ignored ({ignore})" if report.ignored_pixels else "there are no others"
    )
    binary = report.ignored_pixels and present[0] == 0
    mapped = f"{{0: 0, {ignore}: 1}}"
    advice = (
        f"If {ignore} means an object: set LABEL_MAP: {mapped} in the entry of DATASETS.FOLDERS, "
        f"or register_folder(..., label_map={mapped})."
        if binary
        else "Check that these are the right label maps."
    )
    message = (
        f"All labelled pixels of dataset '{name}' are of the class {present[0]} "
        f"('{report.classes[present[0]]}'), {others}: a second class is needed. {advice}"
    )
    return [Problem(ONE_CLASS, message)]


def quick_check(
    name: str,
    num_classes: int,
    ignore: int,
    sample: int = 16,
    *,
    is_train: bool = True,
    max_unreadable: int = 0,
    reader: ImageReader = RGB,
) -> list[Record]:
    """Refuse a dataset that cannot be used, judged by a sample of it.

    If the sample has fewer than two classes, further label maps are read until one has a second
    class.

    Args:
        name: a registered dataset.
        num_classes: K; labels are 0..K-1,
        ignore: or this.
        sample: number of images to look at, evenly spaced; 0 = only list the dataset.
        is_train: it is used for training; otherwise a single class is only a warning.
        max_unreadable: up to this number of missing or damaged files is only a warning.
        reader: reads the images.

    Returns:
        The dicts of the dataset.

    Raises:
        DataError: the dataset cannot be listed or is empty, images or label maps of the sample
            cannot be used, or no pixel is labelled.
    """
    records = list_dataset(name)
    chosen = evenly_spaced(records, sample) if sample > 0 else []
    reports = [examine_pair(record, num_classes, ignore, reader) for record in chosen]
    problems = [problem for report in reports for problem in report.problems]
    if not problems and chosen:
        _check_meaning(name, records, reports, is_train=is_train)
    if all(problem.kind == UNREADABLE for problem in problems) and len(problems) <= max_unreadable:
        for problem in problems:
            logger.warning("Dataset '%s': %s", name, problem.message)
        return records
    # First those that training would not skip.
    problems.sort(key=lambda problem: problem.kind == UNREADABLE)
    concerned = sum(bool(report.problems) for report in reports)
    raise DataError(
        f"{problems[0].message} In dataset '{name}', {concerned} of the "
        f"{pluralize(len(reports), 'image')} checked cannot be used; `semask check` checks all."
    )


def _check_meaning(
    name: str, records: Sequence[Record], reports: Sequence[PairReport], *, is_train: bool
) -> None:
    """Check a sample as a whole, and further label maps if it has only one class.

    Raises:
        DataError: no pixel is labelled, or all of the training data has one class.
    """
    report = DatasetReport(name, *_classes_and_ignore(name))
    for pair in reports:
        report.add(pair)
    if report.dark:
        logger.warning("Dataset '%s': %s", name, dark_words(report.dark, report.examined))
    if not (problems := _meaningless(report)):
        return
    for record in records:
        with contextlib.suppress(DataError):
            label = read_label(record["sem_seg_file_name"], record.get("label_map"))
            report.add(PairReport(counts=np.bincount(label.ravel(), minlength=256)))
        if not (problems := _meaningless(report)):
            return
    if is_train or problems[0].kind == NO_LABELS:
        hint = "" if is_train else " Images alone can be segmented with `semask predict`."
        raise DataError(problems[0].message + hint)
    logger.warning("%s", problems[0].message)


def examine_pair(
    record: Record, num_classes: int, ignore: int, reader: ImageReader = RGB
) -> PairReport:
    """Read an image and its label map, as training does, and find their problems.

    Args:
        record: the dataset dict.
        num_classes: K; labels are 0..K-1,
        ignore: or this.
        reader: reads the image.
    """
    report = PairReport()
    image_path, label_path = record["file_name"], record.get("sem_seg_file_name")
    image = label = None
    with recorded_problems(report, BAD_IMAGE):
        image = reader.read(image_path)
        report.size, report.mode = (image.shape[1], image.shape[0]), image_mode(image_path, reader)
        report.dark = is_nearly_black(image, report.mode)
    with recorded_problems(report, BAD_LABEL):
        if label_path is None:
            raise DataError(
                f"Image '{image_path}' has no label map ('sem_seg_file_name').",
                "Images alone can be segmented with `semask predict`.",
            )
        label = read_label(label_path, record.get("label_map"))
        report.counts = np.bincount(label.ravel(), minlength=256)
        check_label_values(label, num_classes, ignore, label_path)
    if image is not None and label is not None:
        with recorded_problems(report, BAD_SIZE):
            check_same_size(image, label, image_path, record["sem_seg_file_name"])
    return report


def evenly_spaced(records: Sequence[Record], number: int) -> list[Record]:
    """``number`` of the records, from first to last; all of them for 0, or if there are fewer."""
    if number == 0 or number >= len(records):
        return list(records)
    positions = np.linspace(0, len(records) - 1, number).round().astype(int)
    return [records[position] for position in positions]


@contextlib.contextmanager
def recorded_problems(report: ImageReport, kind: str) -> Iterator[None]:
    """Record a ``DataError`` of the ``with`` block as a problem of that kind, or as unreadable."""
    try:
        yield
    except UnreadableError as error:
        report.problems.append(Problem(UNREADABLE, str(error), error.advice))
    except DataError as error:
        report.problems.append(Problem(kind, str(error), error.advice))


def image_mode(path: str, reader: ImageReader = RGB) -> str:
    """Pillow's name of a file's pixel format, and the number of unused channels.

    Raises:
        DataError: see ``reader.read``.
    """
    if mode := reader.mode(path):
        return mode
    with opened_image(path, "image") as image:
        unused = unused_channels(image)
        return f"{image.mode} with {pluralize(unused, 'unused channel')}" if unused else image.mode


def registered_metadata(name: str) -> Any:
    """The metadata of a dataset.

    Raises:
        ConfigError: there is no such dataset.
    """
    registered = DatasetCatalog.list()
    if name not in registered:
        raise ConfigError(f"There is no dataset '{name}'. {_similar(name, registered)}")
    return MetadataCatalog.get(name)


def _similar(name: str, registered: Sequence[str]) -> str:
    """Suggestions for a name that is not registered."""
    if near := difflib.get_close_matches(name, registered, n=1):
        return f"Did you mean '{near[0]}'?"
    if alike := sorted(other for other in registered if other.startswith(name.split("_")[0])):
        return f"Similar names are {', '.join(alike)}."
    beginnings = sorted({other.split("_")[0] for other in registered})
    return (
        f"Known names begin with {', '.join(beginnings)}; your own must be described in the config "
        "(DATASETS.FOLDERS, as in the shipped config own_dataset/semask_example) or registered in "
        "Python (semask.data.register_folder)."
    )


def _classes_and_ignore(name: str) -> tuple[list[str], int]:
    metadata = registered_metadata(name)
    classes = metadata.get("stuff_classes")
    if not classes:
        raise ConfigError(f"Dataset '{name}' has no class names: its metadata need stuff_classes.")
    return list(classes), int(metadata.get("ignore_label", 255))


def listed_names(name: str, key: str) -> list[str]:
    """The names that the metadata of a registered dataset have, also where listing it reads them.

    Args:
        name: of the dataset.
        key: "thing_classes" or "stuff_classes".

    Raises:
        ConfigError: the dataset is not registered.
        DataError: it has to be listed, and cannot be.
    """
    if not registered_metadata(name).get(key):
        list_dataset(name)
    return list(MetadataCatalog.get(name).get(key) or ())
