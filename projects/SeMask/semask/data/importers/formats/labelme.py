"""LabelMe: a JSON file for each image, with "shapes" in pixels.

Shapes of the same group and label are one instance. "__ignore__" marks ignored pixels,
"_background_" is the background. Points and lines have no area. If the image file is missing, it is
decoded from the JSON's "imageData".
"""

import base64
import binascii
import io
import math
from collections.abc import Callable, Mapping
from functools import partial
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
    first_file,
    load_json,
    load_lines,
    some_files,
    split_of,
    stated_size,
    unused_images,
)
from semask.data.importers.formats.coco import rle_of_mask

_CIRCLE_POINTS = 64
_NO_AREA = ("point", "points", "line", "linestrip")


@register_format
class LabelMe(Importer):
    """See the module."""

    name = "labelme"
    title = "LabelMe"

    def recognise(self, source: Source) -> str:
        files = some_files(source.folder, ".json", limit=4)
        found = first_file(files, lambda path: _is_labelme(load_json(path)))
        return f"'{found.name}' has shapes and an imagePath" if found else ""

    def read(self, source: Source) -> Labels:
        images = ImageFiles(source.images, source.folder)
        labels = Labels([], [])
        used: set[Path] = set()
        found: set[str] = set()
        for path in files_below(source.folder, ".json"):
            try:
                content = load_json(path)
                if not _is_labelme(content):
                    raise LabelFileError("a JSON file that is not LabelMe's")
                size = stated_size(
                    content.get("imageWidth"), content.get("imageHeight"), f"'{path}'"
                )
            except LabelFileError as error:
                labels.leave_out(path, str(error))
                continue
            name = str(content.get("imagePath") or path.with_suffix(".jpg").name)
            image = images.find(name, path) or images.find_stem(path.stem, path)
            data = content.get("imageData")
            if image is None and not data:
                labels.leave_out(path, f"labels without an image: there is no '{name}'")
                continue
            if image is not None and image in used:
                labels.leave_out(path, f"a second file of labels for '{image}'")
                continue
            relative = path.relative_to(source.folder).with_suffix(Path(name).suffix or ".png")
            used |= {image} if image else set()
            found |= {str(s.get("label")) for s in content["shapes"]} - {"None", "__ignore__"}
            labels.images.append(
                ImportedImage(
                    image,
                    images.relative(image) if image else relative.as_posix(),
                    path,
                    split_of(*path.relative_to(source.folder).parts),
                    size,
                    regions=_regions(content["shapes"], path),
                    pixels=partial(_decoded, data, path) if image is None and data else None,
                )
            )
        labels.classes = [n for n in _listed(source.folder) if n != "__ignore__"]
        labels.classes += sorted(found - set(labels.classes))
        for path in unused_images(images, used):
            labels.leave_out(path, "an image without labels")
        return labels


def _is_labelme(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and isinstance(content.get("shapes"), list)
        and all(isinstance(shape, dict) for shape in content["shapes"])
        and ("imagePath" in content or "imageData" in content)
    )


def _listed(folder: Path) -> list[str]:
    """The names in labels.txt, which LabelMe's own converters need."""
    for path in files_below(folder, "labels.txt"):
        return [line.strip() for line in load_lines(path) if line.strip()]
    return []


def _decoded(data: str, path: Path) -> bytes:
    try:
        return base64.b64decode(data, validate=False)
    except (binascii.Error, ValueError, TypeError) as error:
        raise LabelFileError(f"'{path}': its imageData is not an image ({error})") from error


def _regions(shapes: list[Mapping[str, Any]], path: Path) -> Callable[[int, int], list[Region]]:
    def regions(height: int, width: int) -> list[Region]:
        found: list[Region] = []
        groups: dict[tuple[str, Any], Region] = {}
        for order, shape in enumerate(shapes):
            region = _region(shape, path, height, width, order)
            key = (region.name, shape.get("group_id"))
            first = groups.get(key)
            if shape.get("group_id") is None or first is None or region.rle or first.rle:
                groups[key] = region
                found.append(region)
            else:
                first.polygons += region.polygons
        return found

    return regions


def _region(shape: Mapping[str, Any], path: Path, height: int, width: int, order: int) -> Region:
    name, kind = str(shape.get("label")), shape.get("shape_type") or "polygon"
    try:
        points = np.array(shape.get("points"), dtype=np.float64).reshape(-1, 2)
    except (TypeError, ValueError) as error:
        raise LabelFileError(f"'{path}': a shape '{name}' has points that are not x, y") from error
    if kind in _NO_AREA:
        return Region(name, order=order)
    if kind == "mask":
        return Region(name, rle=_pasted(shape, points, path, height, width), order=order)
    if kind == "rectangle" and len(points) >= 2:
        (x0, y0), (x1, y1) = points.min(axis=0), points.max(axis=0)
        points = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
    elif kind == "circle" and len(points) == 2:
        angles = np.linspace(0, 2 * math.pi, _CIRCLE_POINTS, endpoint=False)
        radius = float(np.hypot(*(points[1] - points[0])))
        points = points[0] + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    elif kind not in ("polygon", "oriented_rectangle"):
        raise LabelFileError(f"'{path}': a shape '{name}' is of the unknown kind '{kind}'")
    return Region(name, [points.reshape(-1)], order=order)


def _pasted(
    shape: Mapping[str, Any], points: np.ndarray, path: Path, height: int, width: int
) -> dict[str, Any]:
    """A shape of kind "mask": a PNG of its box, whose corners are the points."""
    try:
        data = io.BytesIO(base64.b64decode(shape["mask"]))
        with Image.open(data, formats=["PNG"]) as picture:
            part = np.asarray(picture.convert("L")) > 0
    except MemoryError:
        raise
    except Exception as error:  # Decoders raise many kinds of errors on damaged data.
        raise LabelFileError(f"'{path}': a mask cannot be read ({error})") from error
    x, y = (int(value) for value in points[0])
    mask = np.zeros((height, width), bool)
    target = mask[max(0, y) : y + part.shape[0], max(0, x) : x + part.shape[1]]
    part = part[max(0, -y) :, max(0, -x) :]
    target[:] = part[: target.shape[0], : target.shape[1]]
    return rle_of_mask(mask)
