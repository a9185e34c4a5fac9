"""Pictures of semantic segmentation: images with their labels, predictions and prior maps.

Ignored pixels of the ground truth are hatched in grey, in the maps and in the legend, which
Detectron2's Visualizer does not support; it also takes twelve times as long.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from semask.utils.files import replacing
from semask.visualize.fonts import font_for

TITLES = ("Image", "Ground truth", "Prediction", "Semantic prior")
# Every image is shrunk to fit into this (width, height), or enlarged by an integer factor.
MAP_BOX = (400, 360)
MARGIN = 16
GAP = 8
TITLE_SIZE = 16
TEXT_SIZE = 13
SWATCH = 14
# With more classes than this, the legend lists only those in the picture.
FULL_LEGEND = 32

_PAPER = (255, 255, 255)
_INK = (40, 40, 40)
FAINT = (110, 110, 110)
HATCH = (175, 175, 175), (125, 125, 125)
_HATCH_PERIOD = 8


@dataclass(frozen=True)
class Panel:
    """The content of one row.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        label: (H, W) integers, classes or the ignore value.
        prediction: (H, W) integers, classes; None = no prediction and no prior.
        prior: integers of any height and width, the classes of the semantic prior; None = the
            model has no prior.
        caption: a line below the row; "" = none.
    """

    image: np.ndarray
    label: np.ndarray
    prediction: np.ndarray | None = None
    prior: np.ndarray | None = None
    caption: str = ""


def compose_panels(
    panels: Sequence[Panel],
    *,
    colors: np.ndarray,
    ignore_label: int,
    class_names: Sequence[str],
) -> np.ndarray:
    """Compose rows of pictures, with column titles at the top and a legend at the bottom.

    The columns of predictions and of semantic priors are shown if any row has one.

    Args:
        panels: at least one.
        colors: (K, 3) uint8, RGB of each class.
        ignore_label: label value of ignored pixels (hatched).
        class_names: the K names of the legend.

    Returns:
        (height, width, 3) uint8, RGB.
    """
    rows = [_maps(panel, colors, ignore_label) for panel in panels]
    number = max(len(row) for row in rows)
    column = max(picture.width for row in rows for picture in row)
    column = max(column, *(text_width(title, TITLE_SIZE) for title in TITLES[:number]))
    width = 2 * MARGIN + number * column + (number - 1) * GAP
    legend = _legend(panels, colors, ignore_label, class_names, width - 2 * MARGIN)

    title_height = TITLE_SIZE + GAP
    heights = [
        row[0].height + (TEXT_SIZE + 6 if panel.caption else 0)
        for row, panel in zip(rows, panels, strict=True)
    ]
    height = 2 * MARGIN + title_height + sum(heights) + GAP * (len(rows) - 1)
    height += legend.height + MARGIN
    canvas = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(canvas)

    lefts = [MARGIN + index * (column + GAP) for index in range(number)]
    for left, title in zip(lefts, TITLES, strict=False):
        centred = left + (column - text_width(title, TITLE_SIZE)) // 2
        write_text(draw, (centred, MARGIN - 4), title, TITLE_SIZE, _INK)
    top = MARGIN + title_height
    for row, panel, row_height in zip(rows, panels, heights, strict=True):
        indent = (column - row[0].width) // 2
        for left, picture in zip(lefts, row, strict=False):
            canvas.paste(picture, (left + indent, top))
        below = (MARGIN + indent, top + row[0].height + 3)
        write_text(draw, below, panel.caption, TEXT_SIZE, FAINT)
        top += row_height + GAP
    canvas.paste(legend, (MARGIN, height - MARGIN - legend.height))
    return np.array(canvas)


def _maps(panel: Panel, colors: np.ndarray, ignore_label: int) -> list[Image.Image]:
    size = _shown_size(panel.image.shape[1], panel.image.shape[0])
    pictures = [
        resized(panel.image, size),
        painted(np.where(panel.label == ignore_label, -1, panel.label), colors, size),
    ]
    for classes in (panel.prediction, panel.prior):
        if classes is not None:
            pictures.append(painted(classes, colors, size))
    return pictures


def _shown_size(width: int, height: int) -> tuple[int, int]:
    scale = min(MAP_BOX[0] / width, MAP_BOX[1] / height)
    if scale > 1:
        scale = int(scale)
    return max(1, round(width * scale)), max(1, round(height * scale))


def resized(pixels: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Resize: shrink by averaging, so that thin objects stay visible; enlarge by repeating
    pixels.
    """
    picture = Image.fromarray(np.ascontiguousarray(pixels, dtype=np.uint8))
    shrinks = size[0] < picture.width or size[1] < picture.height
    return picture.resize(size, Image.Resampling.BOX if shrinks else Image.Resampling.NEAREST)


def painted(classes: np.ndarray, colors: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """A class map in the classes' colours; other pixels are hatched."""
    classes = classes.astype(np.int64)
    known = (classes >= 0) & (classes < len(colors))
    shades = np.where(known[..., None], colors[np.where(known, classes, 0)], HATCH[0])
    picture = resized(shades, size)
    if not known.all():
        unknown = Image.fromarray((~known).astype(np.uint8) * 255)
        mask = unknown.resize(size, Image.Resampling.NEAREST)
        picture.paste(hatching(size), mask=mask)
    return picture


def hatching(size: tuple[int, int]) -> Image.Image:
    """Diagonal stripes of ``size`` (width, height), for ignored pixels."""
    rows, columns = np.indices((size[1], size[0]))
    dark = (rows + columns) % _HATCH_PERIOD < _HATCH_PERIOD // 3
    return Image.fromarray(np.array(HATCH, dtype=np.uint8)[dark.astype(int)])


def _legend(
    panels: Sequence[Panel],
    colors: np.ndarray,
    ignore_label: int,
    class_names: Sequence[str],
    width: int,
) -> Image.Image:
    """Coloured squares with names, in as many columns as fit."""
    swatch = (SWATCH, SWATCH)
    entries = [
        (class_names[index], Image.new("RGB", swatch, tuple(int(part) for part in colors[index])))
        for index in _listed_classes(panels, len(class_names))
    ]
    if any((panel.label == ignore_label).any() for panel in panels):
        entries.append(("ignored", hatching(swatch)))
    return _swatches(entries, width)


def draw_legend(class_names: Sequence[str], colors: np.ndarray, width: int = 640) -> np.ndarray:
    """Coloured squares with the names of classes.

    Args:
        class_names: K names.
        colors: (K, 3) uint8, RGB.
        width: of the picture, in pixels.

    Returns:
        (H, width, 3) uint8, RGB.
    """
    entries = [
        (name, Image.new("RGB", (SWATCH, SWATCH), tuple(int(part) for part in color)))
        for name, color in zip(class_names, colors, strict=True)
    ]
    legend = _swatches(entries, width - 2 * MARGIN)
    canvas = Image.new("RGB", (width, legend.height + 2 * MARGIN), _PAPER)
    canvas.paste(legend, (MARGIN, MARGIN))
    return np.array(canvas)


def _swatches(entries: Sequence[tuple[str, Image.Image]], width: int) -> Image.Image:
    """Squares, each with its text, in as many columns as fit."""
    pitch = SWATCH + 6 + max(text_width(name, TEXT_SIZE) for name, _ in entries) + 2 * GAP
    per_line = max(1, (width + 2 * GAP) // pitch)
    line_height = SWATCH + GAP
    lines = -(-len(entries) // per_line)
    canvas = Image.new("RGB", (width, lines * line_height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for index, (name, square) in enumerate(entries):
        left, top = index % per_line * pitch, index // per_line * line_height
        canvas.paste(square, (left, top))
        write_text(draw, (left + SWATCH + 6, top - 1), name, TEXT_SIZE, _INK)
    return canvas


def _listed_classes(panels: Sequence[Panel], num_classes: int) -> list[int]:
    if num_classes <= FULL_LEGEND:
        return list(range(num_classes))
    seen: set[int] = set()
    for panel in panels:
        for classes in (panel.label, panel.prediction, panel.prior):
            if classes is not None:
                seen.update(np.unique(classes).tolist())
    return sorted(index for index in seen if 0 <= index < num_classes)


def text_width(text: str, size: int) -> int:
    """The width of one line, in pixels."""
    return int(np.ceil(font_for(text, size).getlength(text)))


def write_text(
    draw: ImageDraw.ImageDraw,
    position: tuple[int, int],
    text: str,
    size: int,
    color: tuple[int, int, int],
) -> None:
    """Draw one line of text with its upper left corner at ``position`` (x, y)."""
    draw.text(position, text, font=font_for(text, size), fill=color)


def save_picture(picture: np.ndarray, path: str) -> None:
    """Write an RGB picture as PNG, atomically.

    Args:
        picture: (H, W, 3) uint8.
        path: the file to write; missing folders are created.
    """
    with replacing(path) as file:
        Image.fromarray(picture).save(file, format="PNG")
