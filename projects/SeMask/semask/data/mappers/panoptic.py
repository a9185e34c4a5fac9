"""From a dataset dict with a panoptic map to what mask classification trains on."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T
from detectron2.structures import Instances

from semask.data.annotations import check_stated_size
from semask.data.bands import RGB, ImageReader
from semask.data.mappers.instance import PANOPTIC_PIPELINES
from semask.data.mappers.semantic import channel_order
from semask.data.reading import check_same_size
from semask.data.segments import (
    DisagreementLog,
    check_categories,
    compare,
    read_segment_ids,
    translated,
)
from semask.errors import ConfigError, DataError
from semask.modeling.heads.prior import PRIOR_TARGET

# Two bytes a pixel say which it is in.
MAX_SEGMENTS = 65535


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
        reader: ImageReader = RGB,
    ) -> None:
        """
        Args:
            is_train: give the segments too.
            augmentations: applied in order, to RGB images.
            num_classes: K of things and stuff.
            ignore_value: of pixels in no segment, in the target of the priors; no class.
            image_format: channel order of the result, "RGB" or "BGR".
            keep_empty: segments that a crop leaves without a pixel stay, as published.
            reader: reads the images.

        Raises:
            ConfigError: the ignore value is a class, or no byte.
        """
        if not num_classes <= ignore_value <= 255:
            raise ConfigError(
                f"MODEL.SEM_SEG_HEAD.IGNORE_VALUE is {ignore_value}; with {num_classes} classes of "
                f"segments it must be in {num_classes}..255."
            )
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.num_classes = num_classes
        self.ignore_value = ignore_value
        self.image_format = image_format
        self.keep_empty = keep_empty
        self.reader = reader
        self.left_out = DisagreementLog()

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
            "image_format": channel_order(cfg),
            "keep_empty": cfg.INPUT.KEEP_EMPTY_MASKS,
            "reader": ImageReader.from_config(cfg),
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """
        Args:
            dataset_dict: "file_name"; in training "pan_seg_file_name" and "segments_info" with
                "id", "category_id" (0..K-1) and "iscrowd" of each segment. It is not modified.

        Returns:
            The given entries and: "image", a (C, H, W) tensor, 0..255; "height" and "width" of
            the image file (upright); in training "instances" with ``gt_classes`` (N,) and
            ``gt_masks`` (N, H, W) bool, and "prior_target", the class of each pixel, (H, W) int64.
            What map and segments do not have in common is left out, with a warning.

        Raises:
            DataError: a file is missing or damaged, the two differ in size, or a category does not
                exist.
        """
        image = self.reader.read(dataset_dict["file_name"])
        check_stated_size(dataset_dict, *image.shape[:2])
        if not self.is_train:
            return {**dataset_dict, **self.transform(image)}
        path = dataset_dict.get("pan_seg_file_name")
        if path is None or "segments_info" not in dataset_dict:
            raise DataError(
                f"Image '{dataset_dict['file_name']}' has no panoptic map: its entry needs "
                "'pan_seg_file_name' and 'segments_info'."
            )
        ids = read_segment_ids(path)
        check_same_size(image, ids, dataset_dict["file_name"], path)
        segments = dataset_dict["segments_info"]
        check_categories(segments, self.num_classes, path)
        if len(segments) > MAX_SEGMENTS:
            raise DataError(
                f"'{path}' has {len(segments)} segments; the maximum is {MAX_SEGMENTS} per image."
            )
        numbers = [segment["id"] for segment in segments if not segment.get("iscrowd", 0)]
        places, found = translated(ids, {n: i for i, n in enumerate(numbers, start=1)}, 0)
        self.left_out.add(path, compare(found, segments))
        categories = {segment["id"]: int(segment["category_id"]) for segment in segments}
        classes = [categories[number] for number in numbers]
        present = [number in found for number in numbers]
        return {**dataset_dict, **self._with_segments(image, places, classes, present)}

    def transform(self, image: np.ndarray) -> dict[str, Any]:
        """The model's input in evaluation, from an image that has been read.

        Args:
            image: (H, W, C), as ``reader`` gives it.

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

    def _with_segments(
        self,
        image: np.ndarray,
        places: np.ndarray,
        classes: Sequence[int],
        present: Sequence[bool],
    ) -> dict[str, Any]:
        """The entries that :meth:`__call__` adds.

        Args:
            image: (H, W, C).
            places: (H, W), the segment of each pixel, counted from 1; 0 = none.
            classes: of the segments.
            present: which of them have a pixel.
        """
        table = np.array([self.ignore_value, *classes], np.uint8)
        # Three bytes a pixel, which Pillow resizes: the class, by which crops are chosen and which
        # padding makes none, and the place.
        layers = np.stack([table[places], places & 255, places >> 8], axis=-1).astype(np.uint8)
        inputs = T.AugInput(image, sem_seg=layers)
        output = self._image(inputs)
        target, low, high = np.moveaxis(inputs.sem_seg.astype(np.int64), -1, 0)
        is_class = target < self.num_classes
        target = np.where(is_class, target, self.ignore_value)
        places = np.where(is_class, low | high << 8, 0)
        _, seen = translated(places, {}, 0)
        kept = [
            place
            for place, is_present in enumerate(present, start=1)
            if is_present and (self.keep_empty or place in seen)
        ]
        numbers = np.array(kept, np.int64)
        instances = Instances((places.shape[0], places.shape[1]))
        instances.gt_classes = torch.from_numpy(table[numbers].astype(np.int64))
        instances.gt_masks = torch.from_numpy(places[None] == numbers[:, None, None])
        return output | {"instances": instances, PRIOR_TARGET: torch.from_numpy(target)}
