"""What an importer reads: images with regions or label maps, whatever format they come from."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from semask.errors import DataError

IGNORE = 255
"""Value of ignored pixels, in every label map that is written."""

SPLITS = ("train", "val", "test")


@dataclass
class Region:
    """A region of an image with a class: an instance, or a part of one.

    One of polygons, RLE and box is given; a box alone has an unknown outline.

    Attributes:
        name: of the class, as the source writes it.
        polygons: (2 n,) float64 each, x and y in pixels of the labelled image; together one region.
        holes: polygons that are cut out of it.
        rle: a mask of the whole labelled image, as pycocotools has it ("size", "counts").
        box: (x0, y0, x1, y1) in pixels.
        crowd: several objects that are not told apart.
        order: regions of a higher order lie over those of a lower one. Where all are the same, the
            smaller ones lie over the larger ones.
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
        image: the file; None = there is none, and ``pixels`` makes it.
        name: what the image is to be called: a relative path with "/", the suffix included.
        source: the file of the labels, for messages.
        split: one of ``SPLITS``; "" = the source does not say.
        size: (width, height) that the source states; None = it does not.
        regions: from (height, width) of the labelled image to its regions; None = there is a map.
        label_map: reads the (H, W) map of indices of ``Labels.classes``, or ``IGNORE``; None =
            there are regions.
        pixels: the encoded image file, for a source that holds it itself.
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
        file: which file, as precisely as known.
        reason: what and why.
    """

    kind: str
    file: str
    reason: str


@dataclass
class Labels:
    """Everything that a source has.

    Attributes:
        classes: names of the classes, as the source writes them, in its order.
        images: in the order of their names.
        colors: (red, green, blue) of classes, by name, where the source has them.
        background: pixels in no region are a class of their own, "background"; else the maps name
            every pixel.
        layout: what the source is nearest to: "folder" (label maps) or "coco" (instances).
        notes: what has been left out or changed.
    """

    classes: list[str]
    images: list[ImportedImage]
    colors: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    background: bool = True
    layout: str = "folder"
    notes: list[Note] = field(default_factory=list)

    def leave_out(self, file: str | Path, reason: str) -> None:
        """Note something that does not get into the output."""
        self.notes.append(Note("left out", str(file), reason))


@dataclass
class Source:
    """What is imported, as the user gives it.

    Attributes:
        root: the folder, or the annotation file.
        images: folder of the images, where it is another one; None = ``root``.
        palette: file with the colours and names of label maps; None = to be found.
        classes: names that replace those of the files, in their order; () = none.
        palette_target: where the colours of unnamed label maps are listed.
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
        name: what ``--format`` calls it.
        title: what people call it.
        fallback: it counts where no other format is recognised.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    fallback: ClassVar[bool] = False

    @abstractmethod
    def recognise(self, source: Source) -> str:
        """What speaks for this format, such as the name of a file; "" = nothing does.

        It looks at few files and raises nothing.
        """

    @abstractmethod
    def read(self, source: Source) -> Labels:
        """Everything that there is.

        Raises:
            DataError: it cannot be read without loss of meaning; the message names the file.
        """


FORMATS: dict[str, Importer] = {}
"""The formats by their names."""

AnyImporter = TypeVar("AnyImporter", bound=type[Importer])


def register_format(importer: AnyImporter) -> AnyImporter:
    """A class decorator: enter a format into ``FORMATS``."""
    FORMATS[importer.name] = importer()
    return importer


class LabelFileError(DataError):
    """A label file of one image that cannot be read; the others may be sound."""
