"""The complete import: recognise, read, number the classes, split, write."""

import csv
import io
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from semask.data.importers.classes import BACKGROUND, ClassTable, class_table
from semask.data.importers.contract import (
    FORMATS,
    IGNORE,
    ImportedImage,
    Importer,
    LabelFileError,
    Labels,
    Note,
    Source,
)
from semask.data.importers.files import cached_json, files_below
from semask.data.importers.images import band_keys, output_names, place
from semask.data.importers.output import PALETTE_FILE, check_empty, partial_folder, take_place
from semask.data.importers.raster import LEFT_OUT
from semask.data.importers.writers import CocoWriter, FolderWriter
from semask.errors import ConfigError, DataError
from semask.utils.files import write_text
from semask.utils.palette import class_colors
from semask.utils.text import as_value, pluralize

Writer = FolderWriter | CocoWriter

LAYOUTS: dict[str, type[FolderWriter] | type[CocoWriter]] = {
    "folder": FolderWriter,
    "coco": CocoWriter,
}

NOTES_FILE = "import_notes.csv"
SPLIT_FILE = "split.csv"
CLASSES_FILE = "classes.json"

Progress = Callable[..., Iterable[tuple[ImportedImage, str]]]


@dataclass
class Options:
    """Options of an import.

    Attributes:
        format: a name in ``FORMATS``; "" = detected.
        layout: "folder", "coco" or "" = the closest to the source.
        images, palette, classes: see ``Source``.
        unlabelled: label of pixels outside all regions, "background" or "ignore".
        val: share of the images for validation, if the source has no splits.
        seed: of the random split.
        link: hard-link the images instead of copying them.
    """

    format: str = ""
    layout: str = ""
    images: Path | None = None
    palette: Path | None = None
    classes: Sequence[str] = ()
    unlabelled: str = BACKGROUND
    val: float = 0.2
    seed: int = 0
    link: bool = False


@dataclass
class Result:
    """The result of an import.

    Attributes:
        folder: the output folder.
        layout: "folder" or "coco".
        format: title of the source's format.
        evidence: how the format was recognised.
        classes: names, in the order of the indices.
        images: number of images of each split.
        counts: for each class a row of the summary: name, images, and pixels or instances.
        unit: of the counts, "pixels" or "instances".
        boxes_alone: there are no masks.
        band_keys: config keys for images that are not photographs; see ``band_keys``.
        notes: what was left out or changed.
    """

    folder: Path
    layout: str
    format: str
    evidence: str
    classes: list[str]
    images: Counter[str]
    counts: list[tuple[str, int, int]]
    unit: str
    boxes_alone: bool = False
    band_keys: list[str] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    def config_keys(self) -> list[str]:
        """The config keys that describe the imported data, as KEY=VALUE."""
        found = [f"DATASETS.FOLDER_ROOT={as_value(os.path.relpath(self.folder))}"]
        if self.layout == "folder":
            names = json.dumps(self.classes, ensure_ascii=False)
            found.append(f"DATASETS.FOLDER_CLASSES={names}")
        elif self.boxes_alone:
            found += ["MODEL.MASK_ON=False", "TEST.BEST_METRIC=bbox/AP"]
        return [*found, *self.band_keys]


def convert_labels(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: Options | None = None,
    *,
    progress: Progress | None = None,
) -> Result:
    """Convert labels of any known format into a dataset folder for training.

    Args:
        path: the folder with the labels, or one annotation file.
        output: the folder to create, atomically; or an existing one that is empty, except for the
            list of colours.
        options: None = the defaults.
        progress: wraps the iteration over the images, as ``tqdm`` does.

    Raises:
        ConfigError: an option or a path cannot be used.
        DataError: the labels are of no known format, or cannot be read without loss of meaning.
    """
    options = options or Options()
    target = Path(os.path.abspath(os.path.expanduser(output)))
    source = _source(path, target, options)
    importer, evidence = recognised(source, options.format)
    labels = importer.read(source)
    cached_json.cache_clear()
    if not labels.images:
        reasons = Counter(note.reason for note in labels.notes).most_common(3)
        listed = "; ".join(f"{reason} ({count})" for reason, count in reasons)
        raise DataError(
            f"'{source.root}' ({importer.title}) has no image with labels. {listed or ''}".strip()
        )
    layout = options.layout or labels.layout
    named = source.classes if importer.name not in ("masks", "yolo") else ()
    table = class_table(
        labels, order=named, background=layout == "folder", unlabelled=options.unlabelled
    )
    with partial_folder(target) as folder:
        writer, rows, channels = _write(labels, table, layout, folder, options, progress)
        writer.finish()
        _write_lists(folder, rows, labels, table)
        images = [folder / row[1] for row in rows]
        keys = band_keys(images, channels) if channels else []
        take_place(folder, target)
    return Result(
        target,
        layout,
        importer.title,
        evidence,
        table.names,
        Counter(row[0] for row in rows),
        writer.counts(),
        writer.unit,
        writer.boxes_alone,
        keys,
        labels.notes,
    )


def _source(path: str | os.PathLike[str], target: Path, options: Options) -> Source:
    root = Path(os.path.abspath(os.path.expanduser(path)))
    if not root.exists():
        raise ConfigError(f"There is no '{root}'.")
    if root.suffix.lower() in (".zip", ".tar", ".gz", ".7z", ".rar"):
        raise ConfigError(f"'{root}' is an archive: unpack it, and pass the folder.")
    for option, given in (("--images", options.images), ("--palette", options.palette)):
        if given is not None and not given.exists():
            raise ConfigError(f"{option}: there is no '{given}'.")
    if not 0 < options.val < 1:
        raise ConfigError(f"--val is {options.val}; it must be between 0 and 1.")
    check_empty(target)
    return Source(
        root,
        None if options.images is None else options.images.absolute(),
        options.palette,
        tuple(options.classes),
        target / PALETTE_FILE,
    )


def recognised(source: Source, name: str = "") -> tuple[Importer, str]:
    """The format of a source, and the evidence for it.

    Args:
        source: the input.
        name: of the format, if the user specified it.

    Raises:
        ConfigError: there is no format of that name.
        DataError: none is recognised, or several are.
    """
    if name:
        if name not in FORMATS:
            raise ConfigError(f"--format is '{name}'; set it to one of {', '.join(FORMATS)}.")
        return FORMATS[name], "set by --format"
    found = {
        importer: evidence
        for importer in FORMATS.values()
        if (evidence := importer.recognise(source))
    }
    sure = [importer for importer in found if not importer.fallback] or list(found)
    if len(sure) > 1:
        raise DataError(
            f"'{source.root}' has labels of several formats: "
            + " and ".join(f"{importer.title} ({found[importer]})" for importer in sure)
            + ".",
            f"Select one: --format {' or --format '.join(i.name for i in sure)}.",
        )
    if sure:
        return sure[0], found[sure[0]]
    suffixes = Counter(file.suffix.lower() for file in files_below(source.folder))
    there = ", ".join(f"{count} {suffix or 'without'}" for suffix, count in suffixes.most_common(5))
    titles = ", ".join(importer.title for importer in FORMATS.values())
    raise DataError(
        f"'{source.root}' has labels of no known format; it has {there or 'no files'}.",
        f"Known formats are {titles}; --format selects one.",
    )


def divide(images: Sequence[ImportedImage], share: float, seed: int) -> list[str]:
    """The split of each image: the source's, or random if the source has no validation split.

    Args:
        images: at least one.
        share: of the images for validation, at least one image.
        seed: of the choice, which depends on the images' names, not on their order.

    Raises:
        DataError: a single image cannot be split.
    """
    given = [image.split for image in images]
    train = [i for i, split in enumerate(given) if split in ("", "train")]
    if train and "val" in given:
        return [split or "train" for split in given]
    pool = (
        train or [i for i, split in enumerate(given) if split == "val"] or list(range(len(given)))
    )
    if len(pool) < 2:
        raise DataError(
            f"There is only {pluralize(len(pool), 'image')} with labels to train on; validation "
            "needs one more."
        )
    pool.sort(key=lambda index: images[index].name)
    number = min(len(pool) - 1, max(1, round(share * len(pool))))
    chosen = set(random.Random(seed).sample(pool, number))
    return [
        "val" if i in chosen else "train" if i in pool else split for i, split in enumerate(given)
    ]


Row = tuple[str, str, str, str]


def _write(
    labels: Labels,
    table: ClassTable,
    layout: str,
    folder: Path,
    options: Options,
    progress: Progress | None,
) -> tuple[Writer, list[Row], int]:
    """Split and write all images; if a split has no usable image, split the others again.

    Raises:
        DataError: there are too few images that can be used.
    """
    notes = list(labels.notes)
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        writer = LAYOUTS[layout](folder, table)
        splits = divide(labels.images, options.val, options.seed)
        rows, failed, channels = _write_images(
            labels, splits, writer, folder, link=options.link, progress=progress
        )
        if {"train", "val"} <= {row[0] for row in rows}:
            return writer, rows, channels
        if len(rows) < 2:
            raise DataError(
                f"{len(failed)} of {pluralize(len(splits), 'image')} cannot be used, and two are "
                f"needed. The first reason: {labels.notes[len(notes)].reason}"
            )
        labels.notes = notes = notes + [
            note for note in labels.notes[len(notes) :] if note.kind == "left out"
        ]
        labels.images = [image for image in labels.images if image not in failed]


def _write_images(
    labels: Labels,
    splits: Sequence[str],
    writer: Writer,
    folder: Path,
    *,
    link: bool,
    progress: Progress | None,
) -> tuple[list[Row], list[ImportedImage], int]:
    """Write every usable image.

    Returns:
        The rows of ``SPLIT_FILE``, the images that cannot be used, and the number of channels of
        all others; 0 = they are photographs, or differ.
    """
    rows: list[Row] = []
    failed: list[ImportedImage] = []
    channels: Counter[int] = Counter()
    entries = list(zip(labels.images, output_names(labels), strict=True))
    wrapped = progress(entries, total=len(entries)) if progress else entries
    for (image, name), split in zip(wrapped, splits, strict=True):
        target = folder / "images" / split / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            facts = place(image, target, link=link)
        except DataError as error:  # an error of the image; errors of labels may concern all
            target.unlink(missing_ok=True)
            reason = str(error).replace(str(target), str(image.image))
            labels.leave_out(str(image.image or image.source), reason)
            failed.append(image)
            continue
        try:
            changes = writer.add(image, split, name, facts)
        except LabelFileError as error:
            target.unlink(missing_ok=True)
            labels.leave_out(str(image.source), str(error))
            failed.append(image)
            continue
        channels[facts.channels] += 1
        where = f"{image.source}: {image.name}"
        labels.notes += [
            Note("left out" if change.endswith(LEFT_OUT) else "changed", where, change)
            for change in changes
        ]
        rows.append((split, f"images/{split}/{name}", str(image.image or ""), str(image.source)))
    return rows, failed, next(iter(channels)) if len(channels) == 1 else 0


def _write_lists(folder: Path, rows: list[Row], labels: Labels, table: ClassTable) -> None:
    _write_csv(folder / SPLIT_FILE, ("part", "image", "from image", "from labels"), rows)
    notes = [(note.kind, note.file, note.reason) for note in labels.notes]
    _write_csv(folder / NOTES_FILE, ("kind", "file", "reason"), notes)
    colors = class_colors(len(table.names)).tolist()
    entries = [
        {"index": index, "name": name, "color": list(table.colors[index] or colors[index])}
        for index, name in enumerate(table.names)
    ]
    content = {"classes": entries, "ignore": IGNORE}
    write_text(str(folder / CLASSES_FILE), json.dumps(content, indent=1, ensure_ascii=False))


def _write_csv(path: Path, heading: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([heading, *rows])
    write_text(str(path), text.getvalue())
