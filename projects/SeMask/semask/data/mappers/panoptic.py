"""From a dataset dict with a panoptic map to what mask classification trains on."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T
from detectron2.structures import Instances

from semask.data.annotations import check_stated_size
from semask.data.mappers.instance import PANOPTIC_PIPELINES
from semask.data.reading import check_same_size, read_image
from semask.errors import ConfigError, DataError
from semask.modeling.heads.prior import PRIOR_TARGET

logger = logging.getLogger(__name__)


class PanopticMapper:
    """Read and augment one image with its segments; each that is no crowd is a mask.

    A callable for Detectron2's data loaders; its only random state is NumPy's global generator.
    """

    @configurable
    def __init__(
        self,
        *,
        is_train: bool,
        augmentations: Sequence[T.Augmentation | T.Transform],
        num_classes: int,
        ignore_value: int = 255,
        image_format: str = "RGB",
        keep_empty: bool = False,
    ) -> None:
        """
        Args:
            is_train: give the segments too.
            augmentations: applied in order, to RGB images.
            num_classes: K of things and stuff.
            ignore_value: of pixels in no segment, in the target of the priors.
            image_format: channel order of the result, "RGB" or "BGR".
            keep_empty: segments that a crop leaves without a pixel stay, as published.
        """
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.num_classes = num_classes
        self.ignore_value = ignore_value
        self.image_format = image_format
        self.keep_empty = keep_empty
        self.unknown = 0

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        name = cfg.INPUT.DATASET_MAPPER_NAME
        if name not in PANOPTIC_PIPELINES:
            raise ConfigError(
                f"INPUT.DATASET_MAPPER_NAME is '{name}'; with TASK 'panoptic' there are "
                f"{' and '.join(PANOPTIC_PIPELINES)}."
            )
        return {
            "is_train": is_train,
            "augmentations": PANOPTIC_PIPELINES[name](cfg, is_train),
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "ignore_value": cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
            "image_format": cfg.INPUT.FORMAT,
            "keep_empty": cfg.INPUT.KEEP_EMPTY_MASKS,
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """
        Args:
            dataset_dict: "file_name"; in training "pan_seg_file_name" and "segments_info" with
                "id", "category_id" (0..K-1) and "iscrowd" of each segment. It is not modified.

        Returns:
            The given entries and: "image", a (3, H, W) uint8 tensor; "height" and "width" of the
            image file (upright); in training "instances" with ``gt_classes`` (N,) and ``gt_masks``
            (N, H, W) bool, and "prior_target", the class of each pixel, (H, W) int64.

        Raises:
            DataError: a file is missing or damaged, the two differ in size, or a category does not
                exist.
        """
        image = read_image(dataset_dict["file_name"])
        check_stated_size(dataset_dict, *image.shape[:2])
        if not self.is_train:
            return {**dataset_dict, **self.transform(image)}
        path = dataset_dict.get("pan_seg_file_name")
        if path is None or "segments_info" not in dataset_dict:
            raise DataError(
                f"Image '{dataset_dict['file_name']}' has no panoptic map: its entry needs "
                "'pan_seg_file_name' and 'segments_info'."
            )
        picture = read_image(path)
        check_same_size(image, picture[..., 0], dataset_dict["file_name"], path)
        segments = dataset_dict["segments_info"]
        for segment in segments:
            if not 0 <= segment["category_id"] < self.num_classes:
                raise DataError(
                    f"'{path}' has a segment of category {segment['category_id']}, but the model "
                    f"knows 0..{self.num_classes - 1} (MODEL.SEM_SEG_HEAD.NUM_CLASSES)."
                )
        output, unknown = self._transformed(image, picture, segments)
        if unknown:
            self._note(path, unknown)
        return {**dataset_dict, **output}

    def transform(self, image: np.ndarray) -> dict[str, Any]:
        """What the model takes in evaluation, from an image that has been read already.

        Args:
            image: (H, W, 3) uint8, RGB.

        Returns:
            "image", "height" and "width", as :meth:`__call__` gives them.
        """
        return self._image(T.AugInput(image))

    def _image(self, inputs: T.AugInput) -> dict[str, Any]:
        """Augment an image, and what belongs to it."""
        height, width = inputs.image.shape[:2]
        self.augmentations(inputs)
        pixels = inputs.image if self.image_format == "RGB" else inputs.image[:, :, ::-1]
        tensor = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        return {"height": height, "width": width, "image": tensor}

    def _transformed(
        self, image: np.ndarray, picture: np.ndarray, segments: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, Any], list[int]]:
        """The entries that :meth:`__call__` adds, and the ids that are no segment's."""
        inputs = T.AugInput(image, sem_seg=picture)  # as colours: an id would not fit into a byte
        output = self._image(inputs)
        values = inputs.sem_seg.astype(np.int64) @ np.array([1, 256, 65536])
        found, inverse = np.unique(values, return_inverse=True)
        places = {segment["id"]: place for place, segment in enumerate(segments, start=1)}
        of_found = np.array([places.get(number, 0) for number in found.tolist()], np.int64)
        ids = of_found[inverse.reshape(values.shape)]  # places in ``segments`` from 1 on
        usable = {
            place: int(segment["category_id"])
            for place, segment in enumerate(segments, start=1)
            if not segment.get("iscrowd", 0)
        }
        classes = np.full(len(segments) + 1, self.ignore_value, np.int64)
        classes[list(usable)] = list(usable.values())
        seen = set(of_found.tolist())
        kept = [place for place in usable if self.keep_empty or place in seen]
        instances = Instances((ids.shape[0], ids.shape[1]))
        instances.gt_classes = torch.from_numpy(classes[np.array(kept, np.int64)])
        masks = ids[None] == np.array(kept, np.int64)[:, None, None]
        instances.gt_masks = torch.from_numpy(masks)
        output |= {"instances": instances, PRIOR_TARGET: torch.from_numpy(classes[ids])}
        padding = 0xFFFFFF
        return output, [n for n in found.tolist() if n not in places and n not in (0, padding)]

    def _note(self, path: str, unknown: Sequence[int]) -> None:
        """Warn, not of every file, of ids that the JSON file does not have."""
        self.unknown += 1
        if self.unknown <= 3 or self.unknown in (10, 100, 1000, 10000):
            logger.warning(
                "'%s' has pixels of ids that are no segment in the JSON file: %s. They are left "
                "out. Such files so far in this process: %d",
                *(path, ", ".join(map(str, unknown[:5])), self.unknown),
            )
