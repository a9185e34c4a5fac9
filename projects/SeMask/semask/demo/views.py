"""A prediction as parts of the page: pictures with what each of their pixels is, and files.

Each holds its content as data URIs.
"""

import base64
import json
import mimetypes
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from semask.inference.prediction import ImagePrediction
from semask.inference.regions import Regions
from semask.report.page import percent
from semask.report.pictures import data_uri
from semask.visualize.drawing import resized

# The maximum side of shown pictures, in pixels; downloads keep the image's size.
SIDE = 1600

# Descriptions of the folders and files of ``ImagePrediction.save``.
_KINDS = {"labels": "Label map", "panoptic": "Segments"}


@dataclass(frozen=True)
class LegendEntry:
    """A region of a picture.

    Attributes:
        name: of its class, or of the class and number of an instance.
        color: "#rrggbb".
        share: of the picture's pixels, 0..1.
        certainty: the score of an instance, or the mean confidence of the pixels; 0..1.
    """

    name: str
    color: str
    share: float
    certainty: float


@dataclass(frozen=True)
class View:
    """A picture with the region of each pixel.

    Attributes:
        title, details: the caption, and additional text.
        width, height: of the image.
        layers: data URIs; the second is blended over the first with the opacity of the page's
            slider.
        map: data URI of an RGB picture: R + 256 G is the pixel's region plus 1, 0 = none; B is its
            confidence, 0..255. "" = unknown.
        names: of the regions, in JSON; a region's score is appended to its name.
        has_confidence: whether B is used.
        legend: the visible regions.
    """

    title: str
    details: str
    width: int
    height: int
    layers: tuple[str, ...]
    map: str = ""
    names: str = "[]"
    has_confidence: bool = False
    legend: tuple[LegendEntry, ...] = ()


@dataclass(frozen=True)
class Download:
    """A file embedded in the page.

    Attributes:
        name: of the file.
        uri: a data URI with its content.
        text: a description.
    """

    name: str
    uri: str
    text: str


def view(
    title: str,
    pictures: tuple[np.ndarray, ...],
    regions: Regions | None,
    *,
    legend: bool = True,
) -> View:
    """A picture with what its pixels are.

    Args:
        title: "" where it needs none.
        pictures: (H, W, 3) uint8, RGB; a second one is laid over the first.
        regions: of the picture; None = not known.
        legend: list the regions.
    """
    height, width = pictures[0].shape[:2]
    details = ""
    if regions is not None and regions.index.shape != (height, width):
        details = f"{regions.index.shape[1]} × {regions.index.shape[0]}"
    # Photographs as JPEG; pictures with hard edges, such as coloured classes, as PNG.
    kinds = ("JPEG", "PNG") if len(pictures) > 1 else ("PNG",)
    layers = tuple(
        data_uri(Image.fromarray(shrunk(picture, SIDE)), kind)
        for picture, kind in zip(pictures, kinds, strict=True)
    )
    if regions is None:
        return View(title, details, width, height, layers)
    return View(
        title,
        details,
        width,
        height,
        layers,
        map=_region_map(regions),
        names=json.dumps(_hover_names(regions)),
        has_confidence=regions.confidence is not None,
        legend=_legend(regions) if legend else (),
    )


def _hover_names(regions: Regions) -> list[str]:
    if regions.scores is None:
        return list(regions.names)
    scores = regions.scores.tolist()
    return [
        name if np.isnan(score) else f"{name} · {percent(score, 0)}"
        for name, score in zip(regions.names, scores, strict=True)
    ]


def _legend(regions: Regions) -> tuple[LegendEntry, ...]:
    """Classes by area, instances by score, highest first."""
    shares, certainties = regions.shares(), regions.certainties()
    order = range(len(shares)) if regions.scores is not None else np.argsort(-shares, kind="stable")
    return tuple(
        LegendEntry(
            regions.names[index],
            _hexadecimal(regions.colors[index]),
            float(shares[index]),
            float(certainties[index]),
        )
        for index in order
        if shares[index] > 0
    )


def _region_map(regions: Regions) -> str:
    """The map of :class:`View`, resized like the shown picture."""
    step = -(-max(regions.index.shape) // SIDE)
    numbers = regions.index[::step, ::step] + 1
    channels = [numbers & 255, numbers >> 8, np.zeros_like(numbers)]
    if regions.confidence is not None:
        channels[2] = np.rint(255 * regions.confidence[::step, ::step])
    return data_uri(Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8)), "PNG")


def shrunk(picture: np.ndarray, side: int) -> np.ndarray:
    """A picture (H, W, 3) whose longer side has at most ``side`` pixels."""
    height, width = picture.shape[:2]
    if max(height, width) <= side:
        return picture
    scale = side / max(height, width)
    return np.asarray(
        resized(picture, (max(1, round(width * scale)), max(1, round(height * scale))))
    )


def unknown_classes(regions: dict[str, Regions]) -> list[tuple[str, str]]:
    """Names and colours of the classes in the other pictures, if they differ from the overlay's."""
    known = regions.get("overlay")
    found: dict[tuple[str, str], None] = {}
    for other in regions.values():
        if other is known or (known is not None and other.names == known.names):
            continue
        for index in np.unique(other.index[other.index >= 0]).tolist():
            found[other.names[index], _hexadecimal(other.colors[index])] = None
    return sorted(found)


def _hexadecimal(color: np.ndarray) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color.tolist())


def downloads(prediction: ImagePrediction, name: str) -> list[Download]:
    """The files that ``semask predict`` writes for an image, without pictures."""
    with tempfile.TemporaryDirectory() as folder:
        prediction.save(folder, name)
        prediction.save_classes(folder)
        files = (path for path in Path(folder).rglob("*") if path.is_file())
        return [_download(path, path.relative_to(folder)) for path in sorted(files, key=_rank)]


def _rank(path: Path) -> tuple[bool, bool, Path]:
    """Sort key: maps first, then other data of the image, then descriptions of the classes."""
    kind = path.parent.name
    return kind not in (*_KINDS, "instances"), kind not in _KINDS or path.suffix != ".png", path


def _download(path: Path, relative: Path) -> Download:
    """The download of a file such as "labels/NAME.png" or "classes.json"."""
    kind = relative.parts[0] if len(relative.parts) > 1 else relative.stem
    name = f"{relative.stem}_{kind}{path.suffix}" if len(relative.parts) > 1 else relative.name
    size = os.path.getsize(path)
    amount = f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{max(1, round(size / 1e3))} kB"
    words = _KINDS.get(kind, kind.capitalize())
    return Download(name, file_uri(path), f"{words} · {path.suffix[1:].upper()} · {amount}")


def file_uri(path: Path) -> str:
    """A file as a data URI."""
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
