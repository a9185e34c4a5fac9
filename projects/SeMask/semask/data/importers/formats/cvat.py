"""CVAT's XML for images: polygons, boxes, ellipses and masks of each image, in their z order.

CVAT's other exports are read by other importers: COCO, YOLO, and coloured masks with labelmap.txt.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np

from semask.data.importers.contract import (
    ImportedImage,
    Importer,
    LabelFileError,
    Labels,
    Region,
    Source,
    register_format,
)
from semask.data.importers.files import (
    ImageFiles,
    files_below,
    load_xml,
    some_files,
    split_of,
    stated_size,
    unused_images,
)
from semask.data.importers.formats.coco import rle_of_mask
from semask.errors import DataError

_ELLIPSE_POINTS = 64
_NO_AREA = ("polyline", "points", "tag", "cuboid", "skeleton")


@register_format
class Cvat(Importer):
    """See the module."""

    name = "cvat"
    title = "CVAT for images"

    def recognise(self, source: Source) -> str:
        files = [source.root] if source.root.is_file() else some_files(source.folder, ".xml")
        found = [path for path in files if _is_cvat(path)]
        return f"'{found[0].name}' has CVAT's <annotations>" if found else ""

    def read(self, source: Source) -> Labels:
        files = [source.root] if source.root.is_file() else files_below(source.folder, ".xml")
        images = ImageFiles(source.images, source.folder)
        labels = Labels([], [])
        used: set[Path] = set()
        for path in files:
            if not _is_cvat(path):
                labels.leave_out(path, "an XML file that is not CVAT's")
                continue
            root = load_xml(path)
            if root.find("track") is not None:
                raise DataError(
                    f"'{path}' is in the format 'CVAT for video', whose frames are not files.",
                    "Export the task as 'CVAT for images', with 'Save images'.",
                )
            self._read_classes(root, labels)
            for element in root.iterfind("image"):
                name = element.get("name", "")
                image = images.find(name, path) if name else None
                if image is None:
                    labels.leave_out(f"{path}: {name}", "labels without an image")
                    continue
                if image in used:
                    labels.leave_out(f"{path}: {name}", "a second entry of labels for an image")
                    continue
                used.add(image)
                where = f"'{path}', image '{name}'"
                split = split_of(element.get("subset", ""))
                labels.images.append(
                    ImportedImage(
                        image,
                        images.relative(image),
                        path,
                        split or split_of(images.relative(image)),
                        stated_size(element.get("width"), element.get("height"), where),
                        regions=_regions(element, where),
                    )
                )
        for path in unused_images(images, used):
            labels.leave_out(path, "an image that no annotation file lists")
        return labels

    def _read_classes(self, root: Element, labels: Labels) -> None:
        for label in root.iterfind(".//labels/label"):
            name = (label.findtext("name") or "").strip()
            if not name or label.findtext("parent"):
                continue
            if name not in labels.classes:
                labels.classes.append(name)
            if match := re.fullmatch(r"#([0-9a-fA-F]{6})", (label.findtext("color") or "").strip()):
                value = int(match[1], 16)
                labels.colors[name] = (value >> 16, value >> 8 & 255, value & 255)
        for shape in root.iterfind("image/*[@label]"):
            if shape.get("label") not in labels.classes:
                labels.classes.append(shape.get("label", ""))


def _is_cvat(path: Path) -> bool:
    try:
        root = load_xml(path)
    except LabelFileError:
        return False
    return root.tag == "annotations" and any(
        root.find(part) is not None for part in ("image", "track", "meta/task", "meta/job")
    )


def _regions(image: Element, where: str) -> Callable[[int, int], list[Region]]:
    def regions(height: int, width: int) -> list[Region]:
        found = []
        for index, shape in enumerate(image):
            if "label" not in shape.attrib:
                continue
            try:
                region = _region(shape, height, width)
                # Shapes of equal z order cover earlier ones.
                region.order = int(float(shape.get("z_order", "0"))) * 100_000 + index
            except (KeyError, ValueError, OverflowError) as error:
                raise LabelFileError(f"{where}: a {shape.tag} cannot be read ({error})") from error
            found.append(region)
        return found

    return regions


def _region(shape: Element, height: int, width: int) -> Region:
    name, given = shape.attrib["label"], shape.attrib
    if shape.tag in _NO_AREA:
        return Region(name)
    if shape.tag == "polygon":
        pairs = [pair.split(",") for pair in given["points"].split(";")]
        return Region(name, [np.array(pairs, dtype=np.float64).reshape(-1)])
    if shape.tag == "box":
        x0, y0, x1, y1 = (float(given[key]) for key in ("xtl", "ytl", "xbr", "ybr"))
        corners = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
        return Region(name, [_turned(corners, given).reshape(-1)])
    if shape.tag == "ellipse":
        cx, cy, rx, ry = (float(given[key]) for key in ("cx", "cy", "rx", "ry"))
        angles = np.linspace(0, 2 * math.pi, _ELLIPSE_POINTS, endpoint=False)
        outline = np.stack([cx + rx * np.cos(angles), cy + ry * np.sin(angles)], axis=1)
        return Region(name, [_turned(outline, given).reshape(-1)])
    if shape.tag == "mask":
        left, top, w, h = (int(float(given[key])) for key in ("left", "top", "width", "height"))
        runs = np.array(given["rle"].split(","), dtype=np.int64)
        if runs.min() < 0 or runs.sum() > w * h:
            raise ValueError("the runs do not fit its box")
        values = np.zeros(w * h, bool)
        filled = np.repeat(np.arange(len(runs)) % 2 == 1, runs)  # The first run is background.
        values[: filled.size] = filled
        mask = np.zeros((height, width), bool)
        target = mask[max(0, top) : max(0, top + h), max(0, left) : max(0, left + w)]
        part = values.reshape(h, w)[max(0, -top) :, max(0, -left) :]
        target[:] = part[: target.shape[0], : target.shape[1]]
        return Region(name, rle=rle_of_mask(mask))
    raise ValueError(f"its kind '{shape.tag}' is unknown")


def _turned(points: np.ndarray, given: Mapping[str, str]) -> np.ndarray:
    """Points rotated about their centre, clockwise in the image, by the attribute "rotation"."""
    angle = math.radians(float(given.get("rotation", "0")))
    middle = (points.min(axis=0) + points.max(axis=0)) / 2
    x, y = (points - middle).T
    turned = [x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)]
    return middle + np.stack(turned, axis=1)
