"""The project's folder layout: images/SPLIT/a.jpg and annotations/SPLIT/a.png."""

from pathlib import Path

import numpy as np
from PIL import Image

from semask.data.importers.classes import ClassTable
from semask.data.importers.contract import IGNORE, ImportedImage, LabelFileError
from semask.data.importers.raster import ImageFacts, paint


class FolderWriter:
    """Writes a label map for each image.

    Attributes:
        unit: what :meth:`counts` counts.
        boxes_alone: False.
    """

    unit = "pixels"
    boxes_alone = False

    def __init__(self, folder: Path, table: ClassTable) -> None:
        """
        Args:
            folder: of the dataset.
            table: its classes.
        """
        self.folder = folder
        self.table = table
        self.pixels = np.zeros(256, np.int64)
        self.images = np.zeros(256, np.int64)

    def add(self, image: ImportedImage, split: str, name: str, facts: ImageFacts) -> list[str]:
        """Write the label map of an image.

        Args:
            image: the image.
            split: "train", "val" or "test".
            name: of the image file, below ``images/split``.
            facts: about that file.

        Returns:
            What was changed in its labels or left out.

        Raises:
            LabelFileError: the labels cannot be used.
        """
        if image.label_map is not None:
            changes: list[str] = []
            labels = self._mapped(image)
            facts.labelled_size((labels.shape[1], labels.shape[0]))
        elif image.regions is not None:
            width, height = facts.labelled_size(image.size)
            labels, changes = paint(image.regions(height, width), self.table, height, width)
        else:
            raise LabelFileError("it has neither regions nor a map")
        labels = facts.turn(labels)
        target = (self.folder / "annotations" / split / name).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(labels).save(target)
        counts = np.bincount(labels.ravel(), minlength=256)
        self.pixels += counts
        self.images += counts > 0
        return changes

    def _mapped(self, image: ImportedImage) -> np.ndarray:
        assert image.label_map is not None
        raw = image.label_map()
        lookup = np.full(256, IGNORE, np.uint8)
        lookup[: len(self.table.of_source)] = self.table.of_source
        return lookup[raw]

    def finish(self) -> None:
        """Do nothing: all files are written."""

    def counts(self) -> list[tuple[str, int, int]]:
        """Name, images and pixels of each class, and of ignored pixels."""
        rows = [
            (name, int(self.images[index]), int(self.pixels[index]))
            for index, name in enumerate(self.table.names)
        ]
        return [*rows, ("(ignored)", int(self.images[IGNORE]), int(self.pixels[IGNORE]))]
