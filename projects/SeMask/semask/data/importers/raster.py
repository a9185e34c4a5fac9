"""Rasterisation of regions to masks and label maps, upright like the images."""

from dataclasses import dataclass, field

import numpy as np
import pycocotools.mask as mask_util

from semask.data.bands import upright
from semask.data.importers.classes import ClassTable
from semask.data.importers.contract import IGNORE, LabelFileError, Region

OUTSIDE, CLIPPED = "outside the image", "beyond the image's edge: clipped"
NO_AREA = "a point, a line or something else without area"
BOX_ALONE = "a box without an outline: its pixels are ignored"
EMPTY = "too small for a single pixel"
NOT_COUNTED = "of a class of ignored pixels"

# Regions with these problems are not in the output.
LEFT_OUT = (OUTSIDE, NO_AREA, EMPTY, NOT_COUNTED)


@dataclass(frozen=True)
class ImageFacts:
    """The properties of an image file that its labels depend on.

    Attributes:
        stored: (width, height) of the pixels in the file.
        upright: (width, height) after its EXIF orientation has been applied, as images are read.
        orientation: the EXIF orientation, 1..8.
        channels: number of channels; 0 = a photograph.
    """

    stored: tuple[int, int]
    upright: tuple[int, int]
    orientation: int = 1
    channels: int = 0

    def labelled_size(self, stated: tuple[int, int] | None) -> tuple[int, int]:
        """(width, height) of the labelled image, upright or as stored.

        Raises:
            LabelFileError: the labels have another size.
        """
        if stated is None or stated == self.upright:
            return self.upright
        if stated == self.stored:
            return self.stored
        raise LabelFileError(
            f"its labels are for an image of {stated[0]}x{stated[1]} pixels (width x height), but "
            f"the file has {self.upright[0]}x{self.upright[1]}"
        )

    def turn(self, labels: np.ndarray) -> np.ndarray:
        """Rotate labels of the stored image to the upright one; labels of the upright one are
        unchanged.
        """
        height, width = labels.shape
        return labels if (width, height) == self.upright else upright(labels, self.orientation)


@dataclass
class Drawn:
    """A rasterised region.

    Attributes:
        mask: (H, W) bool; None = it has no area in the image.
        polygons: its outlines within the image; empty if it has holes or was a mask.
        problems: what was left out or changed.
    """

    mask: np.ndarray | None = None
    polygons: list[np.ndarray] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def draw(region: Region, height: int, width: int) -> Drawn:
    """Rasterise a region in an image of this size."""
    if region.rle is not None:
        mask = mask_util.decode(region.rle).astype(bool)
        return Drawn(mask if mask.any() else None, problems=[] if mask.any() else [EMPTY])
    outlines = region.polygons
    if region.box is not None:
        x0, y0, x1, y1 = region.box
        outlines = [np.array([x0, y0, x1, y0, x1, y1, x0, y1])]
    drawn = Drawn()
    if not any(len(outline) >= 6 for outline in outlines):
        drawn.problems.append(NO_AREA)
        return drawn
    for outline in outlines:
        if len(outline) < 6:
            drawn.problems.append(NO_AREA)
            continue
        clipped = clip(outline, height, width)
        if len(clipped) < 6:
            drawn.problems.append(OUTSIDE)
            continue
        if clipped is not outline:
            drawn.problems.append(CLIPPED)
        drawn.polygons.append(clipped)
    if drawn.polygons:
        mask = _filled(drawn.polygons, height, width)
        holes = [clip(hole, height, width) for hole in region.holes if len(hole) >= 6]
        if holes := [hole for hole in holes if len(hole) >= 6]:
            mask &= ~_filled(holes, height, width)
            drawn.polygons = []
        if mask.any():
            drawn.mask = mask
        else:
            drawn.problems.append(EMPTY)
    return drawn


def _filled(polygons: list[np.ndarray], height: int, width: int) -> np.ndarray:
    rles = mask_util.frPyObjects([polygon.tolist() for polygon in polygons], height, width)
    return mask_util.decode(mask_util.merge(rles)).astype(bool)


def clip(polygon: np.ndarray, height: int, width: int) -> np.ndarray:
    """Clip a polygon to the image (Sutherland-Hodgman).

    Args:
        polygon: (2 n,) x and y.
        height, width: of the image.

    Returns:
        (2 m,); fewer than three points if nothing is left.
    """
    points = polygon.reshape(-1, 2)
    if points.min() >= 0 and (points <= [width, height]).all():
        return polygon
    for axis, bound, sign in ((0, 0, 1), (0, width, -1), (1, 0, 1), (1, height, -1)):
        if not len(points):
            break
        inside = sign * (points[:, axis] - bound) >= 0
        kept = []
        for index, point in enumerate(points):
            before = points[index - 1]
            if inside[index] != inside[index - 1]:
                share = (bound - before[axis]) / (point[axis] - before[axis])
                kept.append(before + share * (point - before))
            if inside[index]:
                kept.append(point)
        points = np.array(kept).reshape(-1, 2)
    spans = len(points) and (np.ptp(points, axis=0) > 0).all()
    return points.reshape(-1) if spans else np.zeros(0)


def paint(
    regions: list[Region], table: ClassTable, height: int, width: int
) -> tuple[np.ndarray, list[str]]:
    """Paint regions into a label map.

    Later regions cover earlier ones if the source orders them, otherwise smaller ones cover larger
    ones; crowds are below all others.

    Returns:
        (H, W) uint8, and what was left out or changed, one line per region.
    """
    labels = np.full((height, width), table.fill, np.uint8)
    notes: list[str] = []
    drawn = []
    ordered = len({region.order for region in regions}) > 1
    for region in regions:
        pixels = draw(region, height, width)
        problems = list(dict.fromkeys(pixels.problems))
        value = table.index[region.name]
        if pixels.mask is not None:
            if region.box is not None:
                value, problems = IGNORE, [*problems, BOX_ALONE]
            rank = region.order if ordered else -int(pixels.mask.sum())
            # Thousands of full-size masks would not fit into memory.
            rle = mask_util.encode(np.asfortranarray(pixels.mask.view(np.uint8)))
            drawn.append((not region.crowd, rank, value, rle))
        notes += [f"'{region.name}': {problem}" for problem in problems]
    taken = np.zeros((height, width), bool)
    overlap = 0
    for _, _, value, rle in sorted(drawn, key=lambda entry: entry[:2]):
        mask = mask_util.decode(rle).view(bool)
        overlap += int((taken & mask & (labels != value)).sum())
        labels[mask] = value
        taken |= mask
    if overlap:
        rule = "the later" if ordered else "the smaller"
        notes.append(
            f"regions of different classes overlap: {rule} one lies on top ({overlap} pixels)"
        )
    return labels, notes
