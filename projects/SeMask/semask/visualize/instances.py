"""Pictures of instances (masks, boxes, scores, category names) and of segments over an image.

Detectron2's Visualizer uses other colours each time, and takes 205 ms for 20 instances on 640 x 480
pixels instead of 14 ms.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw

from semask.utils.palette import class_colors
from semask.visualize.drawing import text_width, write_text

# Number of colours that separate neighbouring instances of one category.
_INSTANCE_COLORS = 24
# In an image with more instances, only instances as wide as their label get one.
_ALWAYS_NAMED = 30
_TEXT_SIZE = 12
_LINE = _TEXT_SIZE + 3
_KERNEL = np.ones((3, 3), np.uint8)


def draw_instances(
    image: np.ndarray,
    boxes: np.ndarray,
    masks: np.ndarray | Sequence[np.ndarray] | None = None,
    *,
    texts: Sequence[str] = (),
    alpha: float = 0.5,
) -> np.ndarray:
    """An image with instances blended over it, each in its own colour.

    Args:
        image: (H, W, 3) uint8, RGB.
        boxes: (N, 4) x0, y0, x1, y1 in pixels.
        masks: N times (H, W) bool; None = boxes only.
        texts: N labels for the boxes; () = none. A label is above the box, or inside or below it if
            another label is there. In crowded images it is left out if it is wider than the box
            or no place is free.
        alpha: opacity of the masks, 0 to 1; their contours are opaque.

    Returns:
        (H, W, 3) uint8, RGB.
    """
    colors = instance_colors(len(boxes))
    picture = image.copy()
    # The first ones have the highest scores and are on top.
    for index in reversed(range(len(boxes) if masks is not None else 0)):
        assert masks is not None
        _lay_over(picture, masks[index], colors[index], alpha)
    drawn = Image.fromarray(picture)
    draw = ImageDraw.Draw(drawn)
    rectangles = np.round(boxes).astype(int).tolist()
    for (x0, y0, x1, y1), color in reversed(list(zip(rectangles, colors, strict=True))):
        corners = (x0, y0, max(x0, x1 - 1), max(y0, y1 - 1))
        draw.rectangle(corners, outline=tuple(color.tolist()))
    taken: list[tuple[int, int, int]] = []
    for text, (x0, y0, x1, y1) in zip(texts, rectangles, strict=False):
        width = text_width(text, _TEXT_SIZE)
        crowded = len(texts) > _ALWAYS_NAMED
        if not text or (crowded and x1 - x0 < width + 2):
            continue
        left = min(max(x0, 0), max(0, drawn.width - width - 2))
        tops = [top for top in (y0 - _LINE, y0, y1 - _LINE, y1) if 0 <= top < drawn.height - _LINE]
        free = [top for top in tops if not _overlaps((left, top, width), taken)]
        if not free and crowded:
            continue
        top = (free or tops or [max(0, y0)])[0]
        taken.append((left, top, width))
        _label(draw, text, left, top, width)
    return np.array(drawn)


def instance_colors(number: int) -> np.ndarray:
    """(number, 3) uint8, RGB, for instances in order."""
    return class_colors(_INSTANCE_COLORS)[np.arange(number) % _INSTANCE_COLORS]


class DrawnSegment(NamedTuple):
    """The appearance of a segment of a panoptic map.

    Attributes:
        text: written on it, if it is large enough.
        color: (R, G, B); None = from the palette that separates neighbouring things.
    """

    text: str
    color: Sequence[int] | None = None


def draw_segments(
    image: np.ndarray,
    panoptic: np.ndarray,
    segments: Mapping[int, DrawnSegment],
    *,
    alpha: float = 0.5,
) -> np.ndarray:
    """An image with the segments of a panoptic map blended over it.

    Args:
        image: (H, W, 3) uint8, RGB.
        panoptic: (H, W) segment ids.
        segments: the appearance of segments, by id; others are not drawn.
        alpha: opacity of the segments, 0 to 1; their contours are opaque.

    Returns:
        (H, W, 3) uint8, RGB.
    """
    picture = image.copy()
    places = []
    for (number, segment), color in zip(segments.items(), segment_colors(segments), strict=True):
        mask = panoptic == number
        if not mask.any():
            continue
        _lay_over(picture, mask, color, alpha)
        # Where the segment is thickest, which is inside it whatever its shape.
        depth = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 3)[1:-1, 1:-1]
        if depth.max() >= _TEXT_SIZE:
            y, x = divmod(int(depth.argmax()), mask.shape[1])
            places.append((segment.text, x, y))
    drawn = Image.fromarray(picture)
    draw = ImageDraw.Draw(drawn)
    for text, x, y in places:
        width = text_width(text, _TEXT_SIZE)
        left = min(max(x - width // 2, 0), max(0, drawn.width - width - 2))
        _label(draw, text, left, y - _TEXT_SIZE // 2, width)
    return np.array(drawn)


def segment_colors(segments: Mapping[int, DrawnSegment]) -> np.ndarray:
    """(N, 3) uint8, RGB, for segments in order; those without a colour get one of the palette."""
    series = itertools.cycle(class_colors(_INSTANCE_COLORS))
    colors = [next(series) if each.color is None else each.color for each in segments.values()]
    return np.array(colors, np.uint8).reshape(-1, 3)


def detection_texts(
    classes: np.ndarray, scores: np.ndarray | None, names: Sequence[str]
) -> list[str]:
    """Texts such as "name 0.97"; without a name if there is a single category.

    Args:
        classes: (N,) indices into ``names``.
        scores: (N,) in 0..1; None = ground truth, without scores.
        names: of the categories.
    """
    named = [names[index] if len(names) > 1 else "" for index in classes.tolist()]
    if scores is None:
        return named
    return [f"{name} {score:.2f}".strip() for name, score in zip(named, scores, strict=True)]


def _overlaps(label: tuple[int, int, int], others: Sequence[tuple[int, int, int]]) -> bool:
    """Whether a label (left, top, width) overlaps one of the others."""
    left, top, width = label
    return any(
        left <= x + w + 2 and x <= left + width + 2 and abs(top - y) < _LINE for x, y, w in others
    )


def _label(draw: ImageDraw.ImageDraw, text: str, left: int, top: int, width: int) -> None:
    draw.rectangle((left, top, left + width + 2, top + _TEXT_SIZE + 2), fill=(30, 30, 30))
    write_text(draw, (left + 1, top), text, _TEXT_SIZE, (255, 255, 255))


def _lay_over(picture: np.ndarray, mask: np.ndarray, color: np.ndarray, alpha: float) -> None:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return
    window = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    inside = mask[window].astype(np.uint8)
    shown = picture[window]
    shown[inside > 0] = (1 - alpha) * shown[inside > 0] + alpha * color
    # Pixels outside the window count as outside the mask.
    inner = cv2.erode(cv2.copyMakeBorder(inside, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0), _KERNEL)
    shown[(inside > 0) & (inner[1:-1, 1:-1] == 0)] = color
