"""Supervisely: meta.json with the classes, DATASET/ann/NAME.json and DATASET/img/NAME.

Polygons can have holes ("interior"); a bitmap is a compressed PNG of a crop of the image.
"""

import base64
import io
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

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
    load_json,
    some_files,
    split_of,
    stated_size,
    unused_images,
)
from semask.data.importers.formats.coco import rle_of_mask

_NO_AREA = ("point", "line", "graph", "cuboid")


@register_format
class Supervisely(Importer):
    """See the module."""

    name = "supervisely"
    title = "Supervisely"

    def recognise(self, source: Source) -> str:
        found = [path for path in some_files(source.folder, "meta.json") if _classes(path)]
        return f"'{found[0]}' has classes with titles" if found else ""

    def read(self, source: Source) -> Labels:
        images = ImageFiles(source.images, source.folder)
        labels = Labels([], [])
        for path in files_below(source.folder, "meta.json"):
            for entry in _classes(path):
                title, color = str(entry["title"]), str(entry.get("color", ""))
                if title not in labels.classes:
                    labels.classes.append(title)
                if re.fullmatch("#[0-9a-fA-F]{6}", color):
                    value = int(color[1:], 16)
                    labels.colors[title] = (value >> 16, value >> 8 & 255, value & 255)
        used: set[Path] = set()
        for path in files_below(source.folder, ".json"):
            if path.parent.name != "ann":
                continue
            try:
                content = load_json(path)
                objects, size = content["objects"], content["size"]
                stated = stated_size(size["width"], size["height"], f"'{path}'")
            except LabelFileError as error:
                labels.leave_out(path, str(error))
                continue
            except (KeyError, TypeError):
                labels.leave_out(path, "a JSON file without 'objects' and 'size'")
                continue
            if not isinstance(objects, list):
                labels.leave_out(path, f"its 'objects' are no list but {str(objects)[:100]}")
                continue
            image = images.find(f"../img/{path.stem}", path)
            if image is None or image in used:
                reason = "labels without an image" if image is None else "its image has labels"
                labels.leave_out(path, reason)
                continue
            used.add(image)
            relative = images.relative(image).replace("/img/", "/").removeprefix("img/")
            labels.images.append(
                ImportedImage(
                    image,
                    relative,
                    path,
                    split_of(*path.relative_to(source.folder).parts[:-1]),
                    stated,
                    regions=_regions(objects, path),
                )
            )
        for path in unused_images(images, used):
            labels.leave_out(path, "an image without labels")
        return labels


def _classes(path: Path) -> list[Mapping[str, Any]]:
    try:
        content = load_json(path)
    except LabelFileError:
        return []
    classes = content.get("classes") if isinstance(content, dict) else None
    if not isinstance(classes, list):
        return []
    return [entry for entry in classes if isinstance(entry, dict) and "title" in entry]


def _regions(objects: list[Mapping[str, Any]], path: Path) -> Callable[[int, int], list[Region]]:
    def regions(height: int, width: int) -> list[Region]:
        found = []
        for order, entry in enumerate(objects):
            try:
                region = _region(entry, height, width)
            except MemoryError:
                raise
            except Exception as error:  # Decoders raise many kinds of errors on damaged data.
                raise LabelFileError(f"'{path}': an object cannot be read ({error})") from error
            region.order = order
            found.append(region)
        return found

    return regions


def _region(entry: Mapping[str, Any], height: int, width: int) -> Region:
    name, kind = str(entry["classTitle"]), entry.get("geometryType", "polygon")
    if kind in _NO_AREA:
        return Region(name)
    if kind == "bitmap":
        data = io.BytesIO(zlib.decompress(base64.b64decode(entry["bitmap"]["data"])))
        with Image.open(data, formats=["PNG"]) as picture:
            part = np.asarray(picture.convert("RGBA"))[:, :, 3] > 0
        x, y = (int(value) for value in entry["bitmap"]["origin"])
        mask = np.zeros((height, width), bool)
        target = mask[y : y + part.shape[0], x : x + part.shape[1]]
        target[:] = part[: target.shape[0], : target.shape[1]]
        return Region(name, rle=rle_of_mask(mask))
    points = entry["points"]
    outline = np.array(points["exterior"], dtype=np.float64).reshape(-1, 2)
    if kind == "rectangle":
        (x0, y0), (x1, y1) = (
            outline.min(axis=0),
            outline.max(axis=0) + 1,
        )  # pixel indices, inclusive
        outline = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
    elif kind != "polygon":
        raise ValueError(f"its kind '{kind}' is unknown")
    holes = [np.array(hole, dtype=np.float64).reshape(-1) for hole in points.get("interior") or ()]
    return Region(name, [outline.reshape(-1)], holes)
