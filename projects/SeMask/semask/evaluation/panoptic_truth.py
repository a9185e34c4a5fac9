"""The ground truth of a panoptic dataset, as COCO stores it: a JSON file, a PNG per image."""

import contextlib
import functools
import io
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import MetadataCatalog
from pycocotools.coco import COCO

from semask.data.reading import read_image
from semask.errors import DataError
from semask.utils.files import read_json


class Segment(NamedTuple):
    """A segment of the ground truth or of a prediction.

    Attributes:
        category: the dataset's own id of its category.
        crowd: what is found there counts neither way.
    """

    category: int
    crowd: bool = False


class PanopticTruth:
    """What a dataset's metadata "panoptic_json" and "panoptic_root" name, read when asked for."""

    def __init__(self, dataset_name: str) -> None:
        """
        Args:
            dataset_name: a registered dataset.
        """
        metadata = MetadataCatalog.get(dataset_name)
        self._json: str = metadata.panoptic_json
        self._root: str = metadata.panoptic_root

    @functools.cached_property
    def content(self) -> dict[str, Any]:
        """The JSON file.

        Raises:
            DataError: it is missing or damaged.
        """
        try:
            content: dict[str, Any] = read_json(self._json)
        except (OSError, ValueError) as error:
            raise DataError(f"The panoptic annotations '{self._json}': {error}.") from error
        return content

    @functools.cached_property
    def _annotations(self) -> dict[Any, dict[str, Any]]:
        return {entry["image_id"]: entry for entry in self.content["annotations"]}

    @functools.cached_property
    def categories(self) -> dict[int, dict[str, Any]]:
        """The file's categories by id, with "name" and "isthing"."""
        return {entry["id"]: entry for entry in self.content["categories"]}

    def file_name(self, image_id: Any) -> str:
        """Of the PNG, below the folder.

        Raises:
            DataError: the file has no such image.
        """
        if image_id not in self._annotations:
            raise DataError(f"'{self._json}' has no panoptic annotation of image {image_id!r}.")
        name: str = self._annotations[image_id]["file_name"]
        return name

    def segments(self, image_id: Any) -> dict[int, Segment]:
        """The segments of an image by their ids."""
        self.file_name(image_id)  # which complains
        return {
            entry["id"]: Segment(entry["category_id"], bool(entry.get("iscrowd", 0)))
            for entry in self._annotations[image_id]["segments_info"]
        }

    def ids(self, image_id: Any) -> np.ndarray:
        """(H, W) int64, the segment of each pixel; 0 = none.

        Raises:
            DataError: the PNG is missing or damaged.
        """
        return segment_ids(read_image(os.path.join(self._root, self.file_name(image_id))))

    def instances(self) -> COCO:
        """The segments that are things as annotations of instances, for AP.

        Raises:
            DataError: a PNG is missing or damaged.
        """
        things = [entry for entry in self.categories.values() if entry.get("isthing", 1)]
        known = {entry["id"] for entry in things}
        annotations: list[dict[str, Any]] = []
        for image_id in self._annotations:
            ids = self.ids(image_id)
            for number, segment in self.segments(image_id).items():
                if segment.category not in known:
                    continue
                rle = mask_util.encode(np.asfortranarray(ids == number, dtype=np.uint8))
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": segment.category,
                        "iscrowd": int(segment.crowd),
                        "segmentation": rle,
                        "area": float(mask_util.area(rle)),
                        "bbox": mask_util.toBbox(rle).tolist(),
                    }
                )
        truth = COCO()
        truth.dataset = {
            "info": {},
            "images": self.content["images"],
            "categories": things,
            "annotations": annotations,
        }
        with contextlib.redirect_stdout(io.StringIO()):
            truth.createIndex()
        return truth


def segment_ids(picture: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8, R + 256 G + 65536 B as COCO stores ids, to (H, W) int64."""
    ids: np.ndarray = picture.astype(np.int64) @ np.array([1, 256, 65536])
    return ids


def found_segments(descriptions: Any, metadata: Any) -> dict[int, Segment]:
    """A model's "segments_info" with the dataset's own category ids.

    Args:
        descriptions: "id", "category_id" (contiguous) and "isthing" of each.
        metadata: of the dataset.
    """
    things, stuff = contiguous_to_dataset(metadata)
    return {
        entry["id"]: Segment((things if entry["isthing"] else stuff)[entry["category_id"]])
        for entry in descriptions
    }


def contiguous_to_dataset(metadata: Any) -> tuple[Mapping[int, int], Mapping[int, int]]:
    """From a model's classes to the ids in the dataset's own file, of things and of stuff."""
    things, stuff = (
        {index: given for given, index in metadata.get(key, {}).items()}
        for key in ("thing_dataset_id_to_contiguous_id", "stuff_dataset_id_to_contiguous_id")
    )
    return things, stuff
