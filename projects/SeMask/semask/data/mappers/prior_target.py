"""The semantic map that supervises the priors of a detector, from what its dataset has.

Classes 0..N-1 of a painted map are the N categories in Detectron2's order, class N is the
background, as in Detectron2's box heads.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.structures import BoxMode

from semask.data.segments import translated

# A rectangle of an image: rows from..to, columns from..to, the ends not included.
Window = tuple[slice, slice]


@dataclass(frozen=True)
class Region:
    """The pixels of an instance: from the mask, or else polygons, or else the box.

    Attributes:
        category: 0..N-1; None = its pixels are ignored, unless another instance has them.
        box: (x0, y0, x1, y1), in pixels.
        polygons: flat [x0, y0, x1, y1, ...] each, at least three points.
        mask: (H, W) of the whole image, not zero where the instance is.
    """

    category: int | None
    box: Sequence[float] | None = None
    polygons: Sequence[np.ndarray] | None = None
    mask: np.ndarray | None = None

    def pixels(self, height: int, width: int) -> tuple[Window, np.ndarray]:
        """A window of the image, and the (h, w) bool mask of the instance in it.

        Raises:
            ValueError: the mask has another size than the image, or there is no mask, polygon or
                box.
        """
        if self.mask is not None:
            if self.mask.shape != (height, width):
                raise ValueError(
                    f"an instance's mask is {self.mask.shape}, the image {(height, width)}"
                )
            mask = self.mask.astype(bool)
            window = _window(np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0)))
            return window, mask[window]
        if self.polygons is not None:
            return _rasterised(self.polygons, height, width)
        if self.box is None:
            raise ValueError("an instance has neither mask nor polygons nor box")
        x0, y0, x1, y1 = (math.ceil(value - 0.5) for value in self.box)  # pixels by their centres
        rows, columns = _clipped(y0, y1, height), _clipped(x0, x1, width)
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        return (rows, columns), np.ones(shape, dtype=bool)

    def mask_of_image(self, height: int, width: int) -> np.ndarray:
        """(height, width) uint8, 1 where the instance is."""
        window, pixels = self.pixels(height, width)
        mask = np.zeros((height, width), dtype=np.uint8)
        mask[window] = pixels
        return mask


def paint(
    regions: Sequence[Region], size: tuple[int, int], background: int, ignore_value: int = 255
) -> np.ndarray:
    """One map of all instances, the smaller ones over the larger ones.

    Args:
        regions: the instances. Of those of the same size the later ones are on top; ignored ones
            are below all others, as the class of an outlined instance is known.
        size: (height, width) of the map.
        background: value of the pixels that are in none,
        ignore_value: and of those that are in ignored ones alone.

    Returns:
        (H, W) uint8.

    Raises:
        ValueError: a mask has another size, or a region has neither mask, polygons nor box.
    """
    height, width = size
    painted = np.full(size, background, dtype=np.uint8)
    drawn = [(region.category, *region.pixels(height, width)) for region in regions]
    drawn.sort(key=lambda entry: (entry[0] is not None, -np.count_nonzero(entry[2])))
    for category, window, mask in drawn:
        painted[window][mask] = ignore_value if category is None else category
    return painted


class PriorTarget:
    """Paints the target of one image, after augmentation."""

    def __init__(
        self, *, num_categories: int, ignore_value: int = 255, ignore_outside: bool = False
    ) -> None:
        """
        Args:
            num_categories: N; the map has N + 1 classes.
            ignore_value: of ignored pixels, N+1..255.
            ignore_outside: pixels in no instance are ignored instead of background: for datasets
                in which not every object is annotated.

        Raises:
            ValueError: there are more classes than fit.
        """
        if num_categories < 1 or not num_categories < ignore_value <= 255:
            raise ValueError(
                f"a painted map of {num_categories} categories and the background needs an ignore "
                f"value in {num_categories + 1}..255, not {ignore_value}; more categories than 254 "
                "do not fit"
            )
        self.num_categories = num_categories
        self.ignore_value = ignore_value
        self.ignore_outside = ignore_outside

    @property
    def background(self) -> int:
        """The class N."""
        return self.num_categories

    def from_annotations(
        self, annotations: Sequence[Mapping[str, Any]], size: tuple[int, int]
    ) -> np.ndarray:
        """Paint annotations, those of crowds as ignored.

        Args:
            annotations: of the image after its augmentation, as Detectron2's
                ``transform_instance_annotations`` gives them: "category_id", "iscrowd", "bbox",
                and "segmentation" where there is one: polygons, an RLE or an (H, W) mask.
            size: (height, width).

        Returns:
            (H, W) uint8.
        """
        outside = self.ignore_value if self.ignore_outside else self.background
        regions = [annotation_region(entry) for entry in annotations]
        return paint(regions, size, outside, self.ignore_value)


def annotation_region(annotation: Mapping[str, Any]) -> Region:
    """The region of an annotation in Detectron2's form."""
    category = None if annotation.get("iscrowd", 0) else int(annotation["category_id"])
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, np.ndarray):
        return Region(category, mask=segmentation)
    if isinstance(segmentation, Mapping):
        return Region(category, mask=mask_util.decode(segmentation))
    if segmentation is not None and len(segmentation):
        return Region(category, polygons=[np.asarray(polygon) for polygon in segmentation])
    mode = annotation.get("bbox_mode", BoxMode.XYXY_ABS)
    return Region(category, box=BoxMode.convert(list(annotation["bbox"]), mode, BoxMode.XYXY_ABS))


def panoptic_to_semantic(
    ids: np.ndarray, segments: Sequence[Mapping[str, Any]], ignore_value: int = 255
) -> np.ndarray:
    """The semantic map of a panoptic one, as COCO stores it.

    Args:
        ids: (H, W), the segment of each pixel, 0 = none.
        segments: "id" and "category_id" (0..254) of each segment, and "iscrowd".
        ignore_value: of pixels in no segment or in a crowd.

    Returns:
        (H, W) uint8.
    """
    classes = {
        segment["id"]: segment["category_id"]
        for segment in segments
        if not segment.get("iscrowd", 0)
    }
    return translated(ids, classes, ignore_value)[0].astype(np.uint8)


def _rasterised(
    polygons: Sequence[np.ndarray], height: int, width: int
) -> tuple[Window, np.ndarray]:
    """Polygons drawn as COCO does, in their own window: images can have hundreds of instances."""
    if not polygons:
        return (slice(0, 0), slice(0, 0)), np.zeros((0, 0), dtype=bool)
    points = np.concatenate(
        [np.asarray(polygon, np.float64).reshape(-1, 2) for polygon in polygons]
    )
    left, top = np.floor(points.min(axis=0)).astype(int) - 1
    right, bottom = np.ceil(points.max(axis=0)).astype(int) + 1
    rows, columns = _clipped(top, bottom, height), _clipped(left, right, width)
    h, w = rows.stop - rows.start, columns.stop - columns.start
    if not h or not w:
        return (rows, columns), np.zeros((h, w), dtype=bool)
    shift = np.array([columns.start, rows.start])
    moved = [
        (np.asarray(polygon, np.float64).reshape(-1, 2) - shift).reshape(-1).tolist()
        for polygon in polygons
    ]
    rle = mask_util.merge(mask_util.frPyObjects(moved, h, w))
    return (rows, columns), mask_util.decode(rle).astype(bool)


def _clipped(start: int, stop: int, side: int) -> slice:
    start = min(max(int(start), 0), side)
    return slice(start, min(max(int(stop), start), side))


def _window(rows: np.ndarray, columns: np.ndarray) -> Window:
    if not rows.size:
        return slice(0, 0), slice(0, 0)
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
