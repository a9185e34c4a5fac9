"""The two output layouts.

The project's folder layout has images/SPLIT/a.jpg and annotations/SPLIT/a.png, the COCO layout
images/SPLIT/a.jpg and annotations/instances_SPLIT.json.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image

from semask.data.importers.classes import ClassTable
from semask.data.importers.contract import IGNORE, ImportedImage, LabelFileError, Region
from semask.data.importers.raster import NOT_COUNTED, Drawn, ImageFacts, draw, paint
from semask.errors import ConfigError
from semask.utils.files import write_text


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


class CocoWriter:
    """Collects instances, and writes a file for each split.

    Attributes:
        unit: what :meth:`counts` counts.
    """

    unit = "instances"

    def __init__(self, folder: Path, table: ClassTable) -> None:
        """
        Args:
            folder: of the dataset.
            table: its classes; category ids are 1..K.
        """
        self.folder = folder
        self.table = table
        self.images: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
        self.annotations: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
        self._instances: Counter[int] = Counter()
        self._images_with: Counter[int] = Counter()
        self._masks = 0

    @property
    def boxes_alone(self) -> bool:
        """Whether no instance has a mask."""
        return not self._masks

    def add(self, image: ImportedImage, split: str, name: str, facts: ImageFacts) -> list[str]:
        """Add an image and its instances.

        Args, Returns:
            As for ``FolderWriter.add``.

        Raises:
            ConfigError: the source has label maps, which have no instances.
            LabelFileError: the labels cannot be used.
        """
        if image.regions is None:
            raise ConfigError(
                "These labels are maps of classes, which do not separate objects; "
                "import them with --to folder."
            )
        width, height = facts.labelled_size(image.size)
        number = 1 + sum(map(len, self.images.values()))
        entry = {
            "id": number,
            "file_name": name,
            "width": facts.upright[0],
            "height": facts.upright[1],
        }
        changes: list[str] = []
        annotations: list[dict[str, Any]] = []
        for region in image.regions(height, width):
            category = self.table.index[region.name]
            drawn = draw(region, height, width)
            changes += [f"'{region.name}': {text}" for text in dict.fromkeys(drawn.problems)]
            if category == IGNORE:
                changes.append(f"'{region.name}': {NOT_COUNTED}")
            elif drawn.mask is not None:
                annotations.append(_annotation(region, drawn, category, facts))
        first = 1 + sum(map(len, self.annotations.values()))
        for index, annotation in enumerate(annotations):
            annotation |= {"id": first + index, "image_id": number}
        self._instances.update(annotation["category_id"] - 1 for annotation in annotations)
        self._images_with.update({annotation["category_id"] - 1 for annotation in annotations})
        self._masks += sum("segmentation" in annotation for annotation in annotations)
        self.images.setdefault(split, []).append(entry)
        self.annotations.setdefault(split, []).extend(annotations)
        return changes

    def finish(self) -> None:
        """Write the files."""
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(self.table.names)]
        for split, images in self.images.items():
            content = {
                "images": images,
                "categories": categories,
                "annotations": self.annotations.get(split, []),
            }
            path = self.folder / "annotations" / f"instances_{split}.json"
            write_text(str(path), json.dumps(content, ensure_ascii=False))

    def counts(self) -> list[tuple[str, int, int]]:
        """Name, images and instances of each class."""
        return [
            (name, self._images_with[index], self._instances[index])
            for index, name in enumerate(self.table.names)
        ]


def _annotation(region: Region, drawn: Drawn, category: int, facts: ImageFacts) -> dict[str, Any]:
    """An upright instance in COCO's format; as polygons if that is lossless, else as RLE."""
    assert drawn.mask is not None
    turned = (drawn.mask.shape[1], drawn.mask.shape[0]) != facts.upright
    mask = np.asfortranarray(facts.turn(drawn.mask).astype(np.uint8))
    rle = mask_util.encode(mask)
    annotation: dict[str, Any] = {
        "category_id": category + 1,
        "iscrowd": int(region.crowd),
        "area": float(mask_util.area(rle)),
        "bbox": mask_util.toBbox(rle).tolist(),
    }
    if region.box is not None:
        if not turned:
            x, y = (polygon := drawn.polygons[0].reshape(-1, 2)).min(axis=0).tolist()
            w, h = np.ptp(polygon, axis=0).tolist()
            annotation["bbox"] = [x, y, w, h]
        return annotation
    if drawn.polygons and not turned and not region.crowd:
        annotation["segmentation"] = [polygon.round(2).tolist() for polygon in drawn.polygons]
    else:
        annotation["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
    return annotation
