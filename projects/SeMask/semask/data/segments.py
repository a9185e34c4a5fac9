"""Panoptic maps as COCO stores them, and where a map and the segments of its JSON file disagree.

A map is a picture whose colours are the ids of segments, R + 256 G + 65536 B; 0 = none. Its JSON
file says what each segment is. Where one of the two lacks a segment, the rest of the image is used:
pixels without a segment count in no loss and no result, and a segment without pixels is none.
``compare`` says what is wrong, in the same words before and during a run.
"""

import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np

from semask.data.image_files import opened_image
from semask.data.reading import rgb_pixels
from semask.errors import DataError
from semask.utils.text import first_of, is_worth_logging

logger = logging.getLogger(__name__)

# The kinds of problems.
NO_PIXELS, NO_SEGMENT = "segment without pixels", "pixels without a segment"

# So many ids are named.
_SHOWN = 5


def read_segment_ids(path: str | os.PathLike[str]) -> np.ndarray:
    """The map of a file, (H, W) int32.

    Raises:
        DataError: the file is missing or damaged, or cannot hold ids: a JPEG, or one with 16 bits.
    """
    with opened_image(path, "panoptic map") as picture:
        kind = picture.format if picture.format == "JPEG" else picture.mode
        if kind == "JPEG" or kind.startswith(("I", "F")):
            raise DataError(
                f"The panoptic map '{path}' is of the kind {kind}, which cannot store segment ids: "
                "save it as an RGB PNG, with the id R + 256 G + 65536 B."
            )
        return segment_ids(rgb_pixels(picture, path))


def segment_ids(picture: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8, RGB, as COCO stores ids, to (H, W) int32."""
    red, green, blue = (picture[..., channel].astype(np.int32) for channel in range(3))
    ids: np.ndarray = red | green << 8 | blue << 16
    return ids


def panoptic_picture(ids: np.ndarray) -> np.ndarray:
    """(H, W) ids to (H, W, 3) uint8, RGB, as COCO stores them."""
    return np.stack([ids >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8)


def translated(
    ids: np.ndarray, table: Mapping[int, int], otherwise: int
) -> tuple[np.ndarray, set[int]]:
    """A map with other values instead of the ids.

    Args:
        ids: (H, W), at least one pixel.
        table: the value of each id.
        otherwise: the value of ids that the table lacks.

    Returns:
        (H, W) int64, and the ids in the map.
    """
    flat = ids.reshape(-1)
    # Neighbours mostly have one id: there are far fewer runs than pixels to sort.
    starts = np.flatnonzero(np.diff(flat, prepend=flat[0] - 1))
    found, inverse = np.unique(flat[starts], return_inverse=True)
    numbers = found.tolist()
    values = np.array([table.get(number, otherwise) for number in numbers], np.int64)
    runs = np.diff(starts, append=flat.size)
    return np.repeat(values[inverse.reshape(-1)], runs).reshape(ids.shape), set(numbers)


@dataclass(frozen=True)
class Disagreement:
    """What a map and the segments of its JSON file do not have in common.

    Attributes:
        lacking: ids of segments that have no pixel, in order.
        unknown: ids in the map that are no segment's, in order.
    """

    lacking: tuple[int, ...] = ()
    unknown: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.lacking or self.unknown)

    def sentences(self, path: str | os.PathLike[str]) -> Iterator[tuple[str, str]]:
        """The kind of each problem, and a sentence without its full stop.

        Args:
            path: of the map.
        """
        if self.lacking:
            ids = first_of(self.lacking, _SHOWN)
            yield NO_PIXELS, f"'{path}' has no pixel of the segments {ids} of the JSON file"
        if self.unknown:
            ids = first_of(self.unknown, _SHOWN)
            yield NO_SEGMENT, f"'{path}' has pixels of the ids {ids}, which the JSON file lacks"


class DisagreementLog:
    """Warns of what is left out of maps and JSON files, not of every map.

    Attributes:
        maps: number of maps so far.
    """

    def __init__(self) -> None:
        self.maps = 0

    def add(self, path: str | os.PathLike[str], disagreement: Disagreement) -> None:
        """Count a map, where there is anything.

        Args:
            path: of the map.
            disagreement: what is left out.
        """
        if not disagreement:
            return
        self.maps += 1
        if is_worth_logging(self.maps):
            words = "; ".join(sentence for _, sentence in disagreement.sentences(path))
            logger.warning("Left out: %s (such maps so far in this process: %d)", words, self.maps)


def compare(found: Collection[int], segments: Sequence[Mapping[str, Any]]) -> Disagreement:
    """Compare the ids of a map with the segments of its JSON file.

    Args:
        found: the ids in the map.
        segments: with the "id" of each.
    """
    listed = {segment["id"] for segment in segments if has_id(segment)}
    return Disagreement(
        lacking=tuple(sorted(listed.difference(found))),
        unknown=tuple(sorted(set(found) - listed - {0})),
    )


def check_categories(
    segments: Sequence[Mapping[str, Any]], num_classes: int, path: str | os.PathLike[str]
) -> None:
    """Refuse segments of a category that the model does not have, and those without an id.

    Args:
        segments: with the "id" and "category_id" of each.
        num_classes: K; 0..K-1 are the categories.
        path: of the map, for the message.

    Raises:
        DataError: there is one.
    """
    for segment in segments:
        if not has_id(segment):
            raise DataError(
                f"'{path}' has a segment with the id {segment.get('id')!r} in its JSON file; ids "
                "must be integers from 1."
            )
        if not has_category(segment, num_classes):
            raise DataError(
                f"'{path}' has the segment {segment['id']} of category "
                f"{segment.get('category_id')!r}, but the model has 0..{num_classes - 1} "
                "(MODEL.SEM_SEG_HEAD.NUM_CLASSES)."
            )


def has_id(segment: Mapping[str, Any]) -> bool:
    """Whether a segment's "id" can be in a map."""
    number = segment.get("id")
    return isinstance(number, Integral) and int(number) > 0


def has_category(segment: Mapping[str, Any], num_classes: int) -> bool:
    """Whether a segment's "category_id" is one of 0..num_classes - 1."""
    category = segment.get("category_id")
    return isinstance(category, Integral) and 0 <= int(category) < num_classes
