"""The ground truth of a panoptic dataset in COCO's format: a JSON file and a PNG per image."""

import contextlib
import functools
import io
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager
from PIL import Image
from pycocotools.coco import COCO

from semask.data.segments import (
    Disagreement,
    compare,
    panoptic_picture,
    read_segment_ids,
    translated,
)
from semask.errors import DataError
from semask.utils.files import read_json


class Segment(NamedTuple):
    """A segment of the ground truth or of a prediction.

    Attributes:
        category: the dataset's own category id.
        crowd: predictions inside are ignored.
    """

    category: int
    crowd: bool = False


class PanopticTruth:
    """The files in a dataset's metadata "panoptic_json" and "panoptic_root", read on demand."""

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
        """The PNG's path relative to the folder.

        Raises:
            DataError: the file has no such image.
        """
        if image_id not in self._annotations:
            raise DataError(f"'{self._json}' has no panoptic annotation of image {image_id!r}.")
        name: str = self._annotations[image_id]["file_name"]
        return name

    def of_image(self, image_id: Any) -> tuple[np.ndarray, dict[int, Segment], Disagreement]:
        """The segments of an image that both PNG and JSON have, and their disagreements.

        Returns:
            (H, W) int32, the segment of each pixel, 0 = none; the segments by their ids; and what
            was dropped from either.

        Raises:
            DataError: the PNG is missing or damaged.
        """
        ids = read_segment_ids(os.path.join(self._root, self.file_name(image_id)))
        entries = self._annotations[image_id]["segments_info"]
        numbers = [entry["id"] for entry in entries]
        known, found = translated(ids, dict(zip(numbers, numbers, strict=True)), 0)
        segments = {
            entry["id"]: Segment(entry["category_id"], bool(entry.get("iscrowd", 0)))
            for entry in entries
            if entry["id"] in found
        }
        return known.astype(np.int32), segments, compare(found, entries)

    @property
    def folder(self) -> str:
        """The local folder of the PNGs."""
        return str(PathManager.get_local_path(self._root))

    def without(self, disagreements: Mapping[Any, Disagreement], folder: str) -> dict[str, Any]:
        """A copy of the ground truth without segments that only PNG or JSON has.

        Args:
            disagreements: by image, of the images that have any.
            folder: the output folder for all PNGs, or links to them.

        Returns:
            The content of its JSON file.
        """
        annotations = []
        for image_id, entry in self._annotations.items():
            disagreement = disagreements.get(image_id, Disagreement())
            kept = [s for s in entry["segments_info"] if s["id"] not in disagreement.lacking]
            annotations.append({**entry, "segments_info": kept})
            path = os.path.join(folder, entry["file_name"])
            os.makedirs(os.path.dirname(path), exist_ok=True)
            if disagreement.unknown:
                Image.fromarray(panoptic_picture(self.of_image(image_id)[0])).save(path)
            else:
                os.symlink(os.path.abspath(os.path.join(self.folder, entry["file_name"])), path)
        return {**self.content, "annotations": annotations}

    def instances(self) -> COCO:
        """The things as instance annotations, for AP.

        Segments without pixels are dropped.

        Raises:
            DataError: a PNG is missing or damaged.
        """
        things = [entry for entry in self.categories.values() if entry.get("isthing", 1)]
        known = {entry["id"] for entry in things}
        annotations: list[dict[str, Any]] = []
        for image_id in self._annotations:
            ids, segments, _ = self.of_image(image_id)
            for number, segment in segments.items():
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
    """From contiguous ids to the dataset's own ids, of things and stuff."""
    things, stuff = (
        {index: given for given, index in metadata.get(key, {}).items()}
        for key in ("thing_dataset_id_to_contiguous_id", "stuff_dataset_id_to_contiguous_id")
    )
    return things, stuff
