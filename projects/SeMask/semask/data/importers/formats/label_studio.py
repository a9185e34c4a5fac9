"""Label Studio's JSON exports (JSON and JSON_MIN), including brush masks.

Coordinates are percent of the image. A brush mask is a bit stream of its RGBA pixels, whose last
channel is the mask. Its COCO and YOLO exports are read by other importers; its brush PNGs do not
state their image, and are refused.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

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
    cached_json,
    files_below,
    first_file,
    split_of,
    stated_size,
    unused_images,
)
from semask.data.importers.formats.coco import json_files, rle_of_mask
from semask.errors import DataError

_KINDS = ("brushlabels", "polygonlabels", "rectanglelabels", "ellipselabels")
_BRUSH_PNG = re.compile(r"task-\d+-annotation-\d+-by-.*-tag-.*\.(png|npy)")

Result = Mapping[str, Any]


@register_format
class LabelStudio(Importer):
    """See the module."""

    name = "label-studio"
    title = "Label Studio"

    def recognise(self, source: Source) -> str:
        labelled = first_file(
            json_files(source),
            lambda path: any(_results(task) for task in _tasks(cached_json(path))[:50]),
        )
        if labelled:
            return f"'{labelled.name}' has tasks with results"
        pngs = files_below(source.folder, ".png", ".npy")
        found = next((path.name for path in pngs if _BRUSH_PNG.fullmatch(path.name)), "")
        return f"'{found}' is a brush mask" if found else ""

    def read(self, source: Source) -> Labels:
        files = [source.root] if source.root.is_file() else files_below(source.folder, ".json")
        images = ImageFiles(source.images, source.folder)
        labels = Labels([], [])
        used: set[Path] = set()
        exports = 0
        for path in files:
            try:
                tasks = _tasks(cached_json(path))
            except LabelFileError as error:
                labels.leave_out(path, str(error))
                continue
            exports += bool(tasks)
            for task in tasks:
                self._read_task(task, path, source, images, labels, used)
        if not exports:
            raise DataError(
                f"'{source.root}' has Label Studio's brush masks, which do not state their image.",
                "Export the project as JSON, and put the images next to it (or use --images DIR).",
            )
        for path in unused_images(images, used):
            labels.leave_out(path, "an image that no task lists")
        return labels

    def _read_task(
        self,
        task: Mapping[str, Any],
        path: Path,
        source: Source,
        images: ImageFiles,
        labels: Labels,
        used: set[Path],
    ) -> None:
        results = _results(task)
        name = next(_image_names(task), "")
        where = f"{path}: task {task.get('id', '?')} ({name})"
        if not results:
            labels.leave_out(where, "a task without a finished annotation")
            return
        if not all(isinstance(result.get("value"), Mapping) for result in results):
            raise DataError(f"{where} has a result without a 'value' of keys and values.")
        image = _find(images, name, path)
        if image is None or image in used:
            reason = "labels without an image" if image is None else "a second task of an image"
            labels.leave_out(where, reason)
            return
        used.add(image)
        for result in results:
            for label in _names(result):
                if label not in labels.classes:
                    labels.classes.append(label)
        sizes = {(r.get("original_width"), r.get("original_height")) for r in results}
        width, height = next(iter(sizes)) if len(sizes) == 1 else (None, None)
        labels.images.append(
            ImportedImage(
                image,
                images.relative(image),
                path,
                split_of(images.relative(image)),
                stated_size(width, height, where),
                regions=_regions(results, where),
            )
        )


def _tasks(content: Any) -> list[Mapping[str, Any]]:
    """The tasks of an export; empty if the content is not an export."""
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list) or not all(isinstance(task, Mapping) for task in content):
        return []
    is_export = any(
        ("annotations" in task and "data" in task) or _min_results(task) for task in content
    )
    return content if is_export else []


def _results(task: Mapping[str, Any]) -> list[Result]:
    """The labelled regions of the first annotation that was not cancelled."""
    annotations = task.get("annotations") or task.get("completions")
    if not isinstance(annotations, list):
        return _min_results(task)
    for annotation in annotations:
        if isinstance(annotation, Mapping) and not annotation.get("was_cancelled"):
            results = annotation.get("result") or []
            return [
                entry
                for entry in results
                if isinstance(entry, Mapping) and entry.get("type") in _KINDS
            ]
    return []


def _min_results(task: Mapping[str, Any]) -> list[Result]:
    """The same for JSON_MIN, with the values in lists named after the control."""
    found: list[Result] = []
    for values in task.values():
        for value in values if isinstance(values, list) else ():
            if not isinstance(value, Mapping):
                continue
            kind = next((kind for kind in _KINDS if kind in value), None)
            if kind is not None and "original_width" in value:
                sizes = {key: value[key] for key in ("original_width", "original_height")}
                found.append({"type": kind, "value": value, **sizes})
    return found


def _names(result: Result) -> list[str]:
    return [str(name) for name in result["value"].get(result["type"]) or ()]


def _image_names(task: Mapping[str, Any]) -> Iterator[str]:
    """Strings of a task that may be the image's path or URL."""
    data = task.get("data") if isinstance(task.get("data"), Mapping) else task
    for value in data.values():  # type: ignore[union-attr]
        if isinstance(value, str) and re.search(r"\.\w{2,5}($|\?)|\?d=", value):
            yield value


def _find(images: ImageFiles, address: str, path: Path) -> Path | None:
    """The image at a path or URL; the random prefix of uploads may be missing."""
    parts = urlparse(address)
    name = parse_qs(parts.query).get("d", [unquote(parts.path)])[0]
    found = images.find(name, path) if name else None
    if found is None and (match := re.fullmatch(r"[0-9a-f]{8}-(.+)", Path(name).name)):
        return images.find(match[1], path)
    return found


def _regions(results: list[Result], where: str) -> Callable[[int, int], list[Region]]:
    def regions(height: int, width: int) -> list[Region]:
        found = []
        for order, result in enumerate(results):
            for name in _names(result):
                try:
                    region = _region(name, result, height, width)
                except (KeyError, TypeError, ValueError, IndexError) as error:
                    raise LabelFileError(f"{where}: a result cannot be read ({error})") from error
                region.order = order
                found.append(region)
        return found

    return regions


def _region(name: str, result: Result, height: int, width: int) -> Region:
    value = result["value"]
    scale = np.array([width, height]) / 100
    if result["type"] == "polygonlabels":
        points = np.array(value["points"], dtype=np.float64).reshape(-1, 2)
        return Region(name, [(points * scale).reshape(-1)])
    if result["type"] == "brushlabels":
        mask = decode_brush(value["rle"]).reshape(height, width, 4)[:, :, 3] > 0
        return Region(name, rle=rle_of_mask(mask))
    angle = np.deg2rad(float(value.get("rotation", 0)))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    start = np.array([value["x"], value["y"]], dtype=np.float64) * scale
    if result["type"] == "rectanglelabels":
        w, h = np.array([value["width"], value["height"]], dtype=np.float64) * scale
        corners = np.array([[0, 0], [w, 0], [w, h], [0, h]])
        return Region(name, [(start + corners @ turn.T).reshape(-1)])
    radii = np.array([value["radiusX"], value["radiusY"]], dtype=np.float64) * scale
    circle = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    outline = np.stack([np.cos(circle), np.sin(circle)], axis=1) * radii
    return Region(name, [(start + outline @ turn.T).reshape(-1)])


def decode_brush(rle: list[int]) -> np.ndarray:
    """Decode Label Studio's bit stream of a mask.

    Header: 32 bits, the number of values; 5 bits, bits per value - 1; four times 4 bits, bits per
    length - 1. Then runs until all values are read: 1 bit, whether one value repeats; 2 bits, which
    of the four length sizes is used; the length - 1; and one value, or ``length`` values.

    Args:
        rle: the bytes, 0..255.

    Returns:
        (values,) uint8: of RGBA pixels, row by row.

    Raises:
        ValueError: the stream is truncated.
    """
    bits = "".join(f"{byte:08b}" for byte in rle)
    position = 0

    def read(count: int) -> int:
        nonlocal position
        if position + count > len(bits):
            raise ValueError("the brush mask is truncated")
        position += count
        return int(bits[position - count : position], 2)

    number, word = read(32), read(5) + 1
    sizes = [read(4) + 1 for _ in range(4)]
    values = np.zeros(number, np.uint8)
    done = 0
    while done < number:
        repeats = read(1)
        length = read(sizes[read(2)]) + 1
        end = min(done + length, number)
        if repeats:
            values[done:end] = read(word)
        else:
            values[done:end] = [read(word) for _ in range(end - done)]
        done += length
    return values
