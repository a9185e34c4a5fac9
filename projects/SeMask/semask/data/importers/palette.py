"""Colours of label maps: their names from a file, and the colours that a set of maps has.

A colour is an integer, red * 65536 + green * 256 + blue; a grey value v is the colour v, v, v.
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from scipy import ndimage

from semask.data.image_files import opened_image
from semask.data.importers.files import load_json, load_lines
from semask.errors import DataError
from semask.utils.files import replacing

Palette = dict[int, str]

NOISE_RADIUS = 40
"""Colours whose channels differ by at most this may be one colour, changed by compression."""

# A file with more colours than this has compression noise or soft edges.
_MANY_COLORS = 256
# Pixels whose neighbourhood varies by at most this, per channel, are inside a class.
_FLAT = 24
# In noisy maps, colours with a smaller share of flat pixels than this are not classes.
_LEAST_SHARE = 2e-5


def rgb(color: int) -> tuple[int, int, int]:
    """(red, green, blue) of a colour."""
    return color >> 16 & 255, color >> 8 & 255, color & 255


def color_number(red: int, green: int, blue: int) -> int:
    """The integer of a colour."""
    return red << 16 | green << 8 | blue


def read_colors(path: Path) -> np.ndarray:
    """The colour of each pixel of a label map.

    Grey values become grey colours (16-bit values must be at most 255); palette images have their
    palette's colours, or the indices if two indices have the same colour. Transparent pixels are
    black.

    Returns:
        (H, W) int64.

    Raises:
        DataError: it cannot be read.
    """
    with opened_image(path, "label map") as image:
        if image.mode == "P":
            return _palette_colors(image)
        if image.mode in ("1", "L") or image.mode.startswith("I"):
            values = np.asarray(image).astype(np.int64)
            if values.max(initial=0) > 255:
                raise DataError(
                    f"Label map '{path}' has values up to {values.max()}; the maximum is 255."
                )
            if image.mode == "1":
                values = values * 255
            return values * 0x010101
        pixels = np.asarray(image.convert("RGBA")).astype(np.int64)
    colors = pixels[:, :, 0] << 16 | pixels[:, :, 1] << 8 | pixels[:, :, 2]
    return np.where(pixels[:, :, 3] == 0, 0, colors)


def _palette_colors(image: Image.Image) -> np.ndarray:
    indices = np.asarray(image)
    palette = np.zeros((256, 3), np.int64)
    given = np.array(image.getpalette("RGB") or [], np.int64).reshape(-1, 3)
    palette[: len(given)] = given
    used = np.unique(indices)
    numbers = palette @ np.array([65536, 256, 1])
    if len(np.unique(numbers[used])) < len(used):
        return indices.astype(np.int64) * 0x010101
    return numbers[indices]


def is_noisy(colors: np.ndarray, path: Path) -> bool:
    """Whether a label map's colours are not exact: a JPEG, or a map with very many colours."""
    if path.suffix.lower() in (".jpg", ".jpeg", ".jpe", ".jfif"):
        return True
    return len(np.unique(colors)) > _MANY_COLORS


# ---- palette files


def read_palette(path: Path) -> Palette:
    """Read the names of colours.

    Supported are CVAT's labelmap.txt ("name:r,g,b:parts:actions"), lines "r g b name" or
    "name r g b" with spaces, commas or tabs (class_dict.csv; a heading is ignored), and JSON:
    {"name": [r, g, b]}, {"name": "#rrggbb"} or a list of mappings with "name" and "color".
    Several colours may have the same name.

    Raises:
        DataError: the file has no named colours, or two names for a colour.
    """
    if path.suffix.lower() == ".json":
        pairs = list(_json_pairs(load_json(path)))
    else:
        lines = load_lines(path)
        pairs = [pair for line in lines if (pair := _line_pair(line)) is not None]
    palette: Palette = {}
    for name, color in pairs:
        if palette.setdefault(color, name) != name:
            raise DataError(
                f"Palette '{path}' has two names for the colour {rgb(color)}: '{palette[color]}' "
                f"and '{name}'."
            )
    if not palette:
        raise DataError(
            f"Palette '{path}' has no named colours.",
            "Write lines of 'red green blue name', such as '128 64 128 road'.",
        )
    return palette


def unnamed_colors(path: Path) -> list[int]:
    """The colours without a name in a list written by :func:`write_colors`."""
    lines = [line.split(",") for line in load_lines(path)[1:]]
    return [
        color_number(*(int(field) for field in fields[:3]))
        for fields in lines
        if len(fields) >= 4 and not fields[3].strip()
    ]


def _json_pairs(content: Any) -> Iterable[tuple[str, int]]:
    if isinstance(content, list):
        content = {
            str(entry.get("name", entry.get("title", ""))): entry.get("color", entry.get("rgb"))
            for entry in content
            if isinstance(entry, dict)
        }
    for key, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, list) and len(value) >= 3:
            yield str(key), color_number(*(int(part) for part in value[:3]))
        elif isinstance(value, str) and re.fullmatch("#[0-9a-fA-F]{6}", value):
            yield str(key), int(value[1:], 16)
        elif isinstance(value, str) and re.fullmatch("#[0-9a-fA-F]{6}", str(key)):
            yield value, int(str(key)[1:], 16)


def _line_pair(line: str) -> tuple[str, int] | None:
    text = line.split("#")[0].strip() if not line.strip().startswith("#") else ""
    if match := re.fullmatch(r"([^:]+):(\d+)\s*,\s*(\d+)\s*,\s*(\d+)(:.*)?", text):
        return match[1].strip(), color_number(*(int(match[i]) for i in (2, 3, 4)))
    fields = next(csv.reader(io.StringIO(text)), []) if "," in text else re.split(r"\s+", text)
    fields = [field.strip() for field in fields]
    for first, names in ((0, fields[3:]), (len(fields) - 3, fields[:-3]), (1, fields[:1])):
        numbers = fields[first : first + 3] if first >= 0 else []
        if len(numbers) == 3 and all(n.isdecimal() and int(n) <= 255 for n in numbers):
            name = names[0] if "," in text and names else " ".join(names)
            if name:
                return name, color_number(*(int(number) for number in numbers))
    return None


# ---- the colours of a set of maps


@dataclass
class MapColors:
    """The colours of a set of label maps.

    Attributes:
        pixels: number of pixels of each colour of a class.
        images: number of maps that have the colour.
        noisy: the maps whose colours are not exact.
    """

    pixels: Counter[int]
    images: Counter[int]
    noisy: set[Path]


def collect_colors(paths: Iterable[Path]) -> tuple[MapColors, dict[Path, str]]:
    """Count the colours of all maps.

    In exact maps all colours are counted. In noisy maps only pixels inside a class are counted, and
    similar colours are merged into the most frequent one.

    Returns:
        The colours, and the unreadable maps with the reasons.
    """
    found = MapColors(Counter(), Counter(), set())
    failed: dict[Path, str] = {}
    noise: Counter[int] = Counter()
    noise_images: Counter[int] = Counter()
    for path in paths:
        try:
            colors = read_colors(path)
        except DataError as error:
            failed[path] = str(error)
            continue
        if is_noisy(colors, path):
            found.noisy.add(path)
            values, counts = np.unique(colors[_flat(colors)], return_counts=True)
            noise.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
            noise_images.update(values.tolist())
        else:
            values, counts = np.unique(colors, return_counts=True)
            found.pixels.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
            found.images.update(values.tolist())
    _merge_noise(found, noise, noise_images)
    return found, failed


def _merge_noise(found: MapColors, noise: Counter[int], images: Counter[int]) -> None:
    total = sum(noise.values())
    main = list(found.pixels)
    groups: Counter[int] = Counter()
    for color, count in noise.most_common():
        known = np.array([rgb(each) for each in main]).reshape(-1, 3)
        distance = np.abs(known - np.array(rgb(color))).max(axis=1) if main else np.array([256])
        if distance.min() <= NOISE_RADIUS:
            nearest = main[int(distance.argmin())]
        else:
            nearest = color
            main.append(color)
        groups[nearest] += count
        found.images[nearest] = max(found.images[nearest], images[color])
    for color, count in groups.items():
        if color in found.pixels or count > max(8, _LEAST_SHARE * total):
            found.pixels[color] += count
    for color in found.images.keys() - found.pixels.keys():
        del found.images[color]


def _flat(colors: np.ndarray) -> np.ndarray:
    """Whether each pixel's 3 x 3 neighbourhood has nearly one colour."""
    flat = np.ones(colors.shape, bool)
    for shift in (16, 8, 0):
        channel = (colors >> shift & 255).astype(np.uint8)
        kernel = np.ones((3, 3), np.uint8)
        spread = cv2.dilate(channel, kernel).astype(np.int16) - cv2.erode(channel, kernel)
        flat &= spread <= _FLAT
    return flat


def write_colors(path: Path, found: MapColors) -> None:
    """Write a list of colours with their counts and an empty column for names."""
    lines = ["red,green,blue,name,pixels,images"]
    for color, count in found.pixels.most_common():
        red, green, blue = rgb(color)
        lines.append(f"{red},{green},{blue},,{count},{found.images[color]}")
    with replacing(str(path)) as file:
        file.write(("\n".join(lines) + "\n").encode())


# ---- from colours to indices


def to_indices(
    colors: np.ndarray, indices: Mapping[int, int], *, noisy: bool
) -> tuple[np.ndarray, Counter[int]]:
    """The index of each pixel's colour.

    Args:
        colors: (H, W), as returned by :func:`read_colors`.
        indices: 0..255 of each colour.
        noisy: use the most similar colour inside classes; pixels at edges get the index of the
            nearest pixel inside a class.

    Returns:
        (H, W) uint8, and the number of pixels of each unknown colour; these pixels are 255.
    """
    known = np.array(sorted(indices), np.int64)
    table = np.array([indices[color] for color in known.tolist()], np.uint8)
    positions = np.searchsorted(known, colors).clip(max=len(known) - 1)
    exact = known[positions] == colors
    labels = np.where(exact, table[positions], 255).astype(np.uint8)
    if not noisy:
        values, counts = np.unique(colors[~exact], return_counts=True)
        return labels, Counter(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    values, inverse = np.unique(colors, return_inverse=True)
    channels = np.array([rgb(color) for color in values.tolist()])
    distances = np.stack(
        [np.abs(channels - np.array(rgb(color))).max(axis=1) for color in known.tolist()], axis=1
    )
    near = distances.min(axis=1) <= NOISE_RADIUS
    nearest = table[distances.argmin(axis=1)]
    sure = (_flat(colors) & near[inverse].reshape(colors.shape)) | exact
    unknown = _flat(colors) & ~near[inverse].reshape(colors.shape)
    if not sure.any():
        sure = near[inverse].reshape(colors.shape)
    labels = nearest[inverse].reshape(colors.shape)
    if sure.any() and not sure.all():
        places = ndimage.distance_transform_edt(~sure, return_distances=False, return_indices=True)
        labels = labels[tuple(places)]
    labels = np.where(unknown, 255, labels).astype(np.uint8)
    lost, counts = np.unique(colors[unknown], return_counts=True)
    return labels, Counter(dict(zip(lost.tolist(), counts.tolist(), strict=True)))


def is_grey(colors: Iterable[int]) -> bool:
    """Whether all colours are grey values."""
    return all(len(set(rgb(color))) == 1 for color in colors)


def listed(colors: Sequence[int]) -> str:
    """Colours for a message: grey values as numbers."""
    if is_grey(colors):
        return ", ".join(str(color & 255) for color in colors)
    return ", ".join(str(rgb(color)) for color in colors)
