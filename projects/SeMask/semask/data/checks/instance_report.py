"""What has been found out about a dataset of instances, as numbers and as text."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tabulate import tabulate

from semask.data.checks.report import SHOWN, Problem, dark_lines, image_lines, problem_lines

# Detectron2's default of TEST.DETECTIONS_PER_IMAGE.
USUAL_LIMIT = 100


@dataclass
class InstancesOfImage:
    """What one image and its annotations are like.

    Attributes:
        mode: how the image file stores pixels, as Pillow calls it; "" = not known.
        size: (width, height) of the image, in pixels, upright; None = not known.
        dark: the image is nearly black.
        instances: number of usable annotations of each category (0..N-1).
        crowds: number of those that are crowds, which are not among the instances.
        boxes_alone: number of instances without a mask.
        problems: what is wrong with the image and its annotations.
    """

    mode: str = ""
    size: tuple[int, int] | None = None
    dark: bool = False
    instances: Counter[int] = field(default_factory=Counter)
    crowds: int = 0
    boxes_alone: int = 0
    problems: list[Problem] = field(default_factory=list)


class InstanceDatasetReport:
    """What a dataset of instances is like.

    Attributes:
        name: of the dataset.
        categories: their N names.
        listed: number of images.
        examined: number of those that have been looked at.
        modes: number of images by the way that they store pixels.
        sizes: number of images of each (width, height).
        dark: images that are nearly black.
        instances: number of usable annotations of each category.
        images: number of images that have each category.
        crowds: number of crowds.
        boxes_alone: number of instances without a mask.
        empty: images without any instance.
        most: instances in the image that has the most.
        problems: everything that is wrong.
    """

    def __init__(self, name: str, categories: Sequence[str]) -> None:
        """
        Args:
            name, categories: the attributes of these names; all counts start at 0.
        """
        self.name = name
        self.categories = list(categories)
        self.listed = self.examined = 0
        self.modes: Counter[str] = Counter()
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.instances: Counter[int] = Counter()
        self.images: Counter[int] = Counter()
        self.crowds = self.boxes_alone = self.empty = self.most = self.dark = 0
        self.problems: list[Problem] = []

    @property
    def absent(self) -> list[str]:
        """The categories that no examined image has."""
        return [name for index, name in enumerate(self.categories) if not self.instances[index]]

    def add(self, image: InstancesOfImage) -> None:
        """Count an image and its annotations."""
        self.examined += 1
        self.problems += image.problems
        if image.mode:
            self.modes[image.mode] += 1
        if image.size is not None:
            self.sizes[image.size] += 1
        self.dark += image.dark
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
            "modes": dict(self.modes),
            "sizes": {f"{width}x{height}": n for (width, height), n in self.sizes.most_common()},
            "images_nearly_black": self.dark,
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
        first = f"Dataset '{self.name}': {self.listed} images with instances"
        if self.examined != self.listed:
            first += f", of which {self.examined} have been looked at"
        parts = [[first], problem_lines(self.problems)]
        if self.examined:
            first_lines = [first, *image_lines(self.modes, self.sizes)]
            parts = [first_lines, [self._table()], self._notes(), parts[1]]
        return "\n\n".join("\n".join(part) for part in parts if part)

    def _table(self) -> str:
        rows = [
            (index, name, f"{self.instances[index]:,}", f"{self.images[index]:,}")
            for index, name in enumerate(self.categories)
        ]
        return tabulate(
            rows,
            headers=["index", "category", "instances", "images"],
            tablefmt="pipe",
            colalign=["right", "left", "right", "right"],
            disable_numparse=True,
        )

    def _notes(self) -> list[str]:
        lines = []
        if absent := self.absent:
            more = f" and {len(absent) - SHOWN} more" if len(absent) > SHOWN else ""
            lines.append(
                f"Note: {len(absent)} of {len(self.categories)} categories are in no image: "
                f"{', '.join(absent[:SHOWN])}{more}."
            )
        if self.empty:
            lines.append(f"Note: {self.empty} images have no instance.")
        if self.boxes_alone:
            lines.append(
                f"Note: {self.boxes_alone} instances have a box and no mask: a detector of masks "
                "skips them, one of boxes (MODEL.MASK_ON False) does not."
            )
        if self.crowds:
            lines.append(f"Note: {self.crowds} annotations are crowds, which are not trained on.")
        if self.most > USUAL_LIMIT:
            lines.append(
                f"Note: an image has {self.most} instances; set TEST.DETECTIONS_PER_IMAGE to more "
                f"than that (Detectron2's default is {USUAL_LIMIT})."
            )
        return lines + dark_lines(self.dark, self.examined)
