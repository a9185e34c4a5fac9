"""The results of a dataset's check, as numbers and as text."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from semask.utils.text import first_of, pluralize, table

# Number of problems of a kind, or of absent classes, listed in the text.
SHOWN = 10
# The kind of a problem with instances and with segments.
UNKNOWN_CATEGORY = "unknown category"


@dataclass(frozen=True)
class Problem:
    """A reason why a dataset, or an image of it, cannot be used.

    Attributes:
        kind: a few words, such as "unreadable".
        message: what is wrong, with the names of the files, and what to do.
        advice: the part of the message that is the same for many files, or "".
    """

    kind: str
    message: str
    advice: str = ""

    @property
    def fact(self) -> str:
        """The message without the advice."""
        return self.message.removesuffix(self.advice).rstrip()


@dataclass
class ImageReport:
    """Properties and problems of one image.

    Attributes:
        mode: Pillow's name of the file's pixel format; "" = not known.
        size: (width, height) of the image, in pixels, upright; None = not known.
        dark: the image is nearly black.
        problems: what is wrong with the image and what belongs to it.
    """

    mode: str = ""
    size: tuple[int, int] | None = None
    dark: bool = False
    problems: list[Problem] = field(default_factory=list)


@dataclass
class PairReport(ImageReport):
    """Properties and problems of one image and its label map.

    Attributes:
        counts: (256,) pixels of each label value; None = not known.
    """

    counts: np.ndarray | None = None


@dataclass
class InstancesOfImage(ImageReport):
    """Properties and problems of one image and its annotations.

    Attributes:
        instances: number of usable annotations of each category (0..N-1).
        crowds: number of those that are crowds, which are not among the instances.
        boxes_alone: number of instances without a mask.
    """

    instances: Counter[int] = field(default_factory=Counter)
    crowds: int = 0
    boxes_alone: int = 0


class ImagesReport:
    """What the images of a dataset are like, whatever is annotated in them.

    Attributes:
        name: of the dataset.
        listed: number of images.
        examined: number of those that were read.
        modes: number of images of each pixel format.
        sizes: number of images of each (width, height).
        dark: images that are nearly black.
        problems: all that were found.
    """

    def __init__(self, name: str) -> None:
        """
        Args:
            name: of the dataset; all counts start at 0.
        """
        self.name = name
        self.listed = self.examined = self.dark = 0
        self.modes: Counter[str] = Counter()
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.problems: list[Problem] = []

    def add_image(self, image: ImageReport) -> None:
        """Count an image."""
        self.examined += 1
        self.problems += image.problems
        if image.mode:
            self.modes[image.mode] += 1
        if image.size is not None:
            self.sizes[image.size] += 1
        self.dark += image.dark

    def images_as_dict(self) -> dict[str, Any]:
        """The images' statistics, in plain types."""
        return {
            "modes": dict(self.modes),
            "sizes": {f"{width}x{height}": n for (width, height), n in self.sizes.most_common()},
            "images_nearly_black": self.dark,
        }

    def as_text(self, first: str, table: str, notes: Sequence[str]) -> str:
        """The report for people: several lines, without a final line break.

        Args:
            first: the first line, without the number of examined images.
            table, notes: about the annotations; left out where no image was examined.
        """
        if self.examined != self.listed:
            first += f", of which {self.examined} were examined"
        parts = [[first], problem_lines(self.problems)]
        if self.examined:
            notes = [*notes, *dark_lines(self.dark, self.examined)]
            parts = [[first, *image_lines(self.modes, self.sizes)], [table], notes, parts[1]]
        return "\n\n".join("\n".join(part) for part in parts if part)


def absent_lines(absent: Sequence[str], number: int, noun: str) -> list[str]:
    """The note about classes that no image has, if there are any.

    Args:
        absent: their names.
        number: of all classes.
        noun: for the classes, in the plural.
    """
    if not absent:
        return []
    return [f"Note: {len(absent)} of {number} {noun} are in no image: {first_of(absent, SHOWN)}."]


class DatasetReport(ImagesReport):
    """Statistics and problems of a dataset of images with label maps.

    Attributes:
        classes: names of the K classes.
        ignore: value of ignored label pixels.
        images_alone, labels_alone: files without a counterpart.
        pixels: (K,) pixels of each class.
        images: (K,) images that have each class.
        ignored_pixels: pixels with the ignore value.
        unlabelled: images without any labelled pixel.
    """

    def __init__(self, name: str, classes: Sequence[str], ignore: int) -> None:
        """
        Args:
            name, classes, ignore: the attributes of these names; all counts start at 0.
        """
        super().__init__(name)
        self.classes = list(classes)
        self.ignore = ignore
        self.images_alone: list[str] = []
        self.labels_alone: list[str] = []
        self.pixels = np.zeros(len(self.classes), np.int64)
        self.images = np.zeros(len(self.classes), np.int64)
        self.ignored_pixels = self.unlabelled = 0

    @property
    def absent(self) -> list[str]:
        """The classes that no examined image has."""
        return [name for name, count in zip(self.classes, self.images, strict=True) if not count]

    def add(self, pair: PairReport) -> None:
        """Count an image and its label map."""
        self.add_image(pair)
        if pair.counts is not None:
            counts = pair.counts[: len(self.classes)]
            self.pixels += counts
            self.images += counts > 0
            self.ignored_pixels += int(pair.counts[self.ignore])
            self.unlabelled += int(not counts.any())

    def as_dict(self) -> dict[str, Any]:
        """The report in plain types, for JSON."""
        rows = zip(self.classes, self.pixels.tolist(), self.images.tolist(), strict=True)
        return {
            "dataset": self.name,
            "pairs": self.listed,
            "examined": self.examined,
            "images_without_label_map": self.images_alone,
            "label_maps_without_image": self.labels_alone,
            **self.images_as_dict(),
            "classes": [
                {"name": name, "pixels": pixels, "images": images} for name, pixels, images in rows
            ],
            "absent_classes": self.absent,
            "ignored_pixels": self.ignored_pixels,
            "images_without_labelled_pixel": self.unlabelled,
            "problems": [vars(problem) for problem in self.problems],
        }

    def text(self) -> str:
        """The report for people: several lines, without a final line break."""
        first = f"Dataset '{self.name}': {pluralize(self.listed, 'image')} with label maps"
        return self.as_text(first, self._class_table(), self._notes())

    def _class_table(self) -> str:
        total = max(1, int(self.pixels.sum()) + self.ignored_pixels)
        rows: list[tuple[object, ...]] = [
            (index, name, f"{100 * pixels / total:.3f}", images)
            for index, (name, pixels, images) in enumerate(
                zip(self.classes, self.pixels.tolist(), self.images.tolist(), strict=True)
            )
        ]
        rows.append((self.ignore, "(ignored)", f"{100 * self.ignored_pixels / total:.3f}", ""))
        return table(rows, ["index", "class", "pixels (%)", "images"], names=1)

    def _notes(self) -> list[str]:
        lines = absent_lines(self.absent, len(self.classes), "classes")
        if self.unlabelled:
            lines.append(f"Note: {pluralize(self.unlabelled, 'image')} without a labelled pixel.")
        return lines


def dark_lines(dark: int, examined: int) -> list[str]:
    """The note about nearly black images, if some but not all are.

    Args:
        dark: their number.
        examined: number of examined images.
    """
    return [f"Note: {dark_words(dark, examined)}"] if 0 < dark < examined else []


def dark_words(dark: int, examined: int) -> str:
    """The number of nearly black images, and possible reasons."""
    verb = "is" if dark == 1 else "are"
    found = "The image is" if examined == 1 else f"{dark} of {examined} images {verb}"
    return (
        f"{found} nearly black. If the values are 0..1, or 10 to 14 bits in 16-bit files, of which "
        "the upper eight bits are read, set their range, such as INPUT.VALUE_RANGE=[0,4095] for "
        "12 bits, or save files with the full range."
    )


def image_lines(modes: Counter[str], sizes: Counter[tuple[int, int]]) -> list[str]:
    """The pixel formats and sizes of images.

    Args:
        modes: number of images by the way that they store pixels.
        sizes: number of images of each (width, height).
    """
    if not sizes:
        return []
    shown = ", ".join(
        f"{mode} ({pluralize(count, 'image')})" for mode, count in modes.most_common()
    )
    widths, heights = zip(*sizes, strict=True)
    (width, height), number = sizes.most_common(1)[0]
    most = f"{width}x{height} ({pluralize(number, 'image')})"
    if len(sizes) == 1:
        return [f"Modes: {shown}", f"Size: {most}"]
    return [
        f"Modes: {shown}",
        f"Sizes: {len(sizes)} different, widths {min(widths)} to {max(widths)}, heights "
        f"{min(heights)} to {max(heights)}; most often {most}",
    ]


def problem_lines(problems: Sequence[Problem]) -> list[str]:
    """All problems by kind, with the first few of each; the same advice once."""
    if not problems:
        return ["No problems."]
    lines = [f"{pluralize(len(problems), 'problem')}:"]
    by_kind: dict[str, list[Problem]] = {}
    for problem in problems:
        by_kind.setdefault(problem.kind, []).append(problem)
    for kind, listed in by_kind.items():
        lines.append(f"  {kind} ({len(listed)}):")
        for problem in listed[:SHOWN]:
            lines.append(f"    {problem.message if len(listed) == 1 else problem.fact}")
        if len(listed) > SHOWN:
            lines.append(f"    ... and {len(listed) - SHOWN} more")
        if len(listed) > 1:
            advice = dict.fromkeys(problem.advice for problem in listed[:SHOWN] if problem.advice)
            lines += [f"    {text}" for text in advice]
    return lines
