"""The data model of importers: images with regions or label maps, independent of the format."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from semask.errors import DataError

IGNORE = 255
"""Value of ignored pixels in every written label map."""

SPLITS = ("train", "val", "test")


@dataclass
class Region:
    """A region of an image with a class: an instance, or a part of one.

    Exactly one of polygons, RLE and box is set; a box has an unknown outline.

    Attributes:
        name: of the class, as in the source.
        polygons: (2 n,) float64 each, x and y in pixels of the labelled image; their union is the
            region.
        holes: polygons that are subtracted from it.
        rle: a mask of the whole labelled image, as pycocotools' RLE ("size", "counts").
        box: (x0, y0, x1, y1) in pixels.
        crowd: a group of objects that are not separated.
        order: regions of a higher order cover those of a lower one. If all are equal, smaller
            regions cover larger ones.
    """

    name: str
    polygons: list[np.ndarray] = field(default_factory=list)
    holes: list[np.ndarray] = field(default_factory=list)
    rle: dict[str, Any] | None = None
    box: tuple[float, float, float, float] | None = None
    crowd: bool = False
    order: int = 0


@dataclass
class ImportedImage:
    """An image and its labels.

    Attributes:
        image: the file; None = it is created from ``pixels``.
        name: the image's name in the output: a relative path with "/" and suffix.
        source: the file of the labels, for messages.
        split: one of ``SPLITS``; "" = not stated.
        size: (width, height) stated by the source; None = not stated.
        regions: from (height, width) of the labelled image to its regions; None = there is a map.
        label_map: reads the (H, W) map of indices of ``Labels.classes``, or ``IGNORE``; None =
            there are regions.
        pixels: the encoded image file, if the source embeds it.
    """

    image: Path | None
    name: str
    source: Path
    split: str = ""
    size: tuple[int, int] | None = None
    regions: Callable[[int, int], list[Region]] | None = None
    label_map: Callable[[], np.ndarray] | None = None
    pixels: Callable[[], bytes] | None = None


@dataclass
class Note:
    """Something that was left out or changed.

    Attributes:
        kind: "left out", "changed" or "note".
        file: the file, and the place in it if known.
        reason: what was done, and why.
    """

    kind: str
    file: str
    reason: str


@dataclass
class Labels:
    """The content of a source.

    Attributes:
        classes: class names, spelt and ordered as in the source.
        images: in the order of their names.
        colors: (red, green, blue) of classes, by name, if the source has them.
        background: pixels outside all regions are a class "background"; otherwise the maps label
            every pixel.
        layout: the closest layout: "folder" (label maps) or "coco" (instances).
        notes: what was left out or changed.
    """

    classes: list[str]
    images: list[ImportedImage]
    colors: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    background: bool = True
    layout: str = "folder"
    notes: list[Note] = field(default_factory=list)

    def leave_out(self, file: str | Path, reason: str) -> None:
        """Add a note on something that is not in the output."""
        self.notes.append(Note("left out", str(file), reason))


@dataclass
class Source:
    """The input, as specified by the user.

    Attributes:
        root: the folder, or the annotation file.
        images: folder of the images; None = ``root``.
        palette: file with the colours and names of label maps; None = searched for.
        classes: names that replace those of the files, in order; () = none.
        palette_target: file to which unnamed colours of label maps are written.
    """

    root: Path
    images: Path | None = None
    palette: Path | None = None
    classes: tuple[str, ...] = ()
    palette_target: Path = Path("palette.csv")

    @property
    def folder(self) -> Path:
        """The folder that is searched for labels."""
        return self.root if self.root.is_dir() else self.root.parent


class Importer(ABC):
    """One format.

    Attributes:
        name: value of ``--format``.
        title: name in messages.
        fallback: used if no other format is recognised.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    fallback: ClassVar[bool] = False

    @abstractmethod
    def recognise(self, source: Source) -> str:
        """The evidence for this format, such as the name of a file; "" = none.

        It reads few files and does not raise.
        """

    @abstractmethod
    def read(self, source: Source) -> Labels:
        """Read the source.

        Raises:
            DataError: the labels cannot be read without loss of meaning; the message names the
                file.
        """


FORMATS: dict[str, Importer] = {}
"""The formats by their names."""

AnyImporter = TypeVar("AnyImporter", bound=type[Importer])


def register_format(importer: AnyImporter) -> AnyImporter:
    """A class decorator that registers a format in ``FORMATS``."""
    FORMATS[importer.name] = importer()
    return importer


class LabelFileError(DataError):
    """A label file of one image that cannot be read; the others may be sound."""
