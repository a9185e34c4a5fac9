"""What has been found out about the files of a dataset, as numbers and as text."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tabulate import tabulate

from semask.utils.text import pluralize

# So many problems of a kind, or absent classes, are listed in the text.
SHOWN = 10


@dataclass(frozen=True)
class Problem:
    """Something that keeps a dataset, or an image of it, from being used.

    Attributes:
        kind: a few words, such as "unreadable".
        message: what is wrong, with the names of the files, and what to do.
        advice: the end of the message where it is the same for many files; or "".
    """

    kind: str
    message: str
    advice: str = ""

    @property
    def fact(self) -> str:
        """The message without the advice."""
        return self.message.removesuffix(self.advice).rstrip()


@dataclass
class PairReport:
    """What one image and its label map are like.

    Attributes:
        mode: how the image file stores pixels, as Pillow calls it; "" = not known.
        size: (width, height) of the image, in pixels, upright; None = not known.
        dark: the image is nearly black.
        counts: (256,) pixels of each label value; None = not known.
        problems: what is wrong with the two.
    """

    mode: str = ""
    size: tuple[int, int] | None = None
    dark: bool = False
    counts: np.ndarray | None = None
    problems: list[Problem] = field(default_factory=list)


class DatasetReport:
    """What a dataset is like.

    Attributes:
        name: of the dataset.
        classes: names of the K classes.
        ignore: value of label pixels that do not count.
        pairs: number of images with a label map.
        examined: number of those that have been looked at.
        images_alone, labels_alone: files without a counterpart.
        modes: number of images by the way that they store pixels.
        sizes: number of images of each (width, height).
        dark: images that are nearly black.
        pixels: (K,) pixels of each class.
        images: (K,) images that have each class.
        ignored_pixels: pixels with the ignore value.
        unlabelled: images without any labelled pixel.
        problems: everything that is wrong.
    """

    def __init__(self, name: str, classes: Sequence[str], ignore: int) -> None:
        """
        Args:
            name, classes, ignore: the attributes of these names; all counts start at 0.
        """
        self.name = name
        self.classes = list(classes)
        self.ignore = ignore
        self.pairs = self.examined = 0
        self.images_alone: list[str] = []
        self.labels_alone: list[str] = []
        self.modes: Counter[str] = Counter()
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.pixels = np.zeros(len(self.classes), np.int64)
        self.images = np.zeros(len(self.classes), np.int64)
        self.ignored_pixels = self.unlabelled = self.dark = 0
        self.problems: list[Problem] = []

    @property
    def absent(self) -> list[str]:
        """The classes that no examined image has."""
        return [name for name, count in zip(self.classes, self.images, strict=True) if not count]

    def add(self, pair: PairReport) -> None:
        """Count an image and its label map."""
        self.examined += 1
        self.problems += pair.problems
        if pair.mode:
            self.modes[pair.mode] += 1
        if pair.size is not None:
            self.sizes[pair.size] += 1
        self.dark += pair.dark
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
            "pairs": self.pairs,
            "examined": self.examined,
            "images_without_label_map": self.images_alone,
            "label_maps_without_image": self.labels_alone,
            "modes": dict(self.modes),
            "sizes": {f"{width}x{height}": n for (width, height), n in self.sizes.most_common()},
            "images_nearly_black": self.dark,
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
        first = f"Dataset '{self.name}': {pluralize(self.pairs, 'image')} with label maps"
        if self.examined != self.pairs:
            first += f", of which {self.examined} have been looked at"
        parts = [[first], problem_lines(self.problems)]
        if self.examined:
            first_lines = [first, *image_lines(self.modes, self.sizes)]
            parts = [first_lines, [self._class_table()], self._notes(), parts[1]]
        return "\n\n".join("\n".join(part) for part in parts if part)

    def _class_table(self) -> str:
        total = max(1, int(self.pixels.sum()) + self.ignored_pixels)
        rows: list[tuple[object, ...]] = [
            (index, name, f"{100 * pixels / total:.3f}", images)
            for index, (name, pixels, images) in enumerate(
                zip(self.classes, self.pixels.tolist(), self.images.tolist(), strict=True)
            )
        ]
        rows.append((self.ignore, "(ignored)", f"{100 * self.ignored_pixels / total:.3f}", ""))
        return tabulate(
            rows,
            headers=["index", "class", "pixels (%)", "images"],
            tablefmt="pipe",
            colalign=["right", "left", "right", "right"],
            disable_numparse=True,
        )

    def _notes(self) -> list[str]:
        lines = []
        if absent := self.absent:
            more = f" and {len(absent) - SHOWN} more" if len(absent) > SHOWN else ""
            lines.append(
                f"Note: {len(absent)} of {len(self.classes)} classes are in no image: "
                f"{', '.join(absent[:SHOWN])}{more}."
            )
        if self.unlabelled:
            lines.append(f"Note: {pluralize(self.unlabelled, 'image')} without a labelled pixel.")
        return lines + dark_lines(self.dark, self.examined)


def dark_lines(dark: int, examined: int) -> list[str]:
    """What to say about images that are nearly black, where there are any but not all are.

    Args:
        dark: their number.
        examined: images that have been looked at.
    """
    return [f"Note: {dark_words(dark, examined)}"] if 0 < dark < examined else []


def dark_words(dark: int, examined: int) -> str:
    """How many images are nearly black, and what that can come from."""
    return (
        f"{dark} of {pluralize(examined, 'image')} are nearly black. Are their values 0..1, or of "
        "10 to 14 bits in files of 16 bits, of which the upper eight are read? Then name their "
        "range, as in INPUT.VALUE_RANGE=[0,4095] for 12 bits, or save them with the full range."
    )


def image_lines(modes: Counter[str], sizes: Counter[tuple[int, int]]) -> list[str]:
    """How many images store pixels in which way, and how large they are.

    Args:
        modes: number of images by the way that they store pixels.
        sizes: number of images of each (width, height).
    """
    if not sizes:
        return []
    shown = ", ".join(f"{count} {mode}" for mode, count in modes.most_common())
    widths, heights = zip(*sizes, strict=True)
    (width, height), number = sizes.most_common(1)[0]
    most = f"{width}x{height} ({pluralize(number, 'image')})"
    return [
        f"Modes: {shown}",
        f"Sizes: {len(sizes)} different, widths {min(widths)} to {max(widths)}, heights "
        f"{min(heights)} to {max(heights)}; most often {most}",
    ]


def problem_lines(problems: Sequence[Problem]) -> list[str]:
    """Everything that is wrong, by its kind, the first of each in words; the same advice once."""
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
