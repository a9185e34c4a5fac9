"""From a dataset dict to the input of a semantic segmentation model."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T
from detectron2.utils.logger import log_first_n
from torch.utils.data import get_worker_info

from semask.data.bands import RGB, ImageReader
from semask.data.reading import (
    MAX_CLASSES,
    check_label_values,
    check_same_size,
    read_label,
)
from semask.data.transforms.geometry import (
    PadToSize,
    RandomCropWithCategoryLimit,
    ResizeByScale,
    contiguous,
    planes,
)
from semask.data.transforms.photometric import PhotometricDistortion
from semask.errors import ConfigError, DataError


def build_augmentations(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """The pipeline that ``cfg.INPUT`` describes.

    Args:
        cfg: with this project's keys.
        is_train: the random pipeline; else the resizing to ``INPUT.SCALE`` alone.

    Returns:
        Augmentations, in order.

    Raises:
        ConfigError: a value cannot be used; it names the key.
    """
    with errors_naming("INPUT.SCALE, SCALE_FACTORS, SCALE_SAMPLING"):
        if not is_train:
            return [ResizeByScale(cfg.INPUT.SCALE)]
        augmentations: list[T.Augmentation] = [
            ResizeByScale(cfg.INPUT.SCALE, cfg.INPUT.SCALE_FACTORS, cfg.INPUT.SCALE_SAMPLING)
        ]
    augmentations += [*build_crop(cfg), *build_flip(cfg)]
    augmentations += build_distortion(cfg)
    if cfg.INPUT.CROP.ENABLED:
        mean = cfg.MODEL.PIXEL_MEAN
        rgb_mean = mean[::-1] if channel_order(cfg) == "BGR" else mean
        ignore_value = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
        augmentations.append(PadToSize(cfg.INPUT.CROP.SIZE, rgb_mean, ignore_value))
    return augmentations


def build_distortion(cfg: CfgNode, *, hue_inclusive: bool = False) -> list[T.Augmentation]:
    """``INPUT.PHOTOMETRIC_DISTORTION``; nothing where it is off, or not defined for the images.

    Args:
        cfg: with this project's keys.
        hue_inclusive: see ``PhotometricDistortion``.

    Raises:
        ConfigError: the keys of the channels cannot be used.
    """
    if not cfg.INPUT.PHOTOMETRIC_DISTORTION:
        return []
    if not ImageReader.from_config(cfg).is_rgb:
        log_first_n(
            logging.INFO,
            "INPUT.PHOTOMETRIC_DISTORTION is left out: it is defined for 8-bit RGB images, and "
            "these have other channels (MODEL.PIXEL_MEAN) or values (INPUT.VALUE_RANGE).",
            name=__name__,
        )
        return []
    return [PhotometricDistortion(hue_inclusive=hue_inclusive)]


def channel_order(cfg: CfgNode) -> str:
    """``INPUT.FORMAT``, which is of three channels; others have the order of the files, "RGB"."""
    order: str = cfg.INPUT.FORMAT
    return order if len(cfg.MODEL.PIXEL_MEAN) == 3 else "RGB"


def build_crop(cfg: CfgNode) -> list[T.Augmentation]:
    """The random crop of ``INPUT.CROP``; nothing where it is not enabled.

    Raises:
        ConfigError: it cannot be used.
    """
    crop = cfg.INPUT.CROP
    if not crop.ENABLED:
        return []
    if crop.TYPE != "absolute":
        raise ConfigError(
            f"INPUT.CROP.TYPE is '{crop.TYPE}'; only 'absolute' is supported, with "
            "INPUT.CROP.SIZE as (height, width) in pixels."
        )
    with errors_naming("INPUT.CROP"):
        ignore_value = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
        return [RandomCropWithCategoryLimit(crop.SIZE, crop.SINGLE_CATEGORY_MAX_AREA, ignore_value)]


def build_flip(cfg: CfgNode) -> list[T.Augmentation]:
    """The random mirroring of ``INPUT.RANDOM_FLIP``; nothing for "none".

    Raises:
        ConfigError: the key has another value.
    """
    if cfg.INPUT.RANDOM_FLIP == "horizontal":
        return [T.RandomFlip(prob=0.5)]
    if cfg.INPUT.RANDOM_FLIP != "none":
        raise ConfigError(
            f"INPUT.RANDOM_FLIP is '{cfg.INPUT.RANDOM_FLIP}'; use 'horizontal' or 'none'."
        )
    return []


def build_test_scales(cfg: CfgNode) -> list[ResizeByScale]:
    """How evaluation resizes the original image for the multi-scale protocol, else nothing.

    Raises:
        ConfigError: ``TEST.MULTI_SCALE_FACTORS`` cannot be used.
    """
    if cfg.TEST.PROTOCOL != "multi_scale":
        return []
    if not cfg.TEST.MULTI_SCALE_FACTORS:
        raise ConfigError("TEST.MULTI_SCALE_FACTORS is empty: set at least one factor.")
    with errors_naming("INPUT.SCALE, TEST.MULTI_SCALE_FACTORS"):
        return [ResizeByScale(cfg.INPUT.SCALE, [f]) for f in cfg.TEST.MULTI_SCALE_FACTORS]


# Builders of mappers, by ``INPUT.DATASET_MAPPER_NAME``: functions of a config and ``is_train``.
SEMANTIC_MAPPERS: dict[str, Callable[[CfgNode, bool], "SemSegMapper"]] = {}

Mapper = TypeVar("Mapper", bound=Callable[..., "SemSegMapper"])


def register_semantic_mapper(name: str) -> Callable[[Mapper], Mapper]:
    """A decorator that registers a mapper as a value of ``INPUT.DATASET_MAPPER_NAME``."""

    def enter(mapper: Mapper) -> Mapper:
        SEMANTIC_MAPPERS[name] = lambda cfg, is_train: mapper(cfg, is_train=is_train)
        return mapper

    return enter


def build_semantic_mapper(cfg: CfgNode, is_train: bool) -> "SemSegMapper":
    """The mapper that ``INPUT.DATASET_MAPPER_NAME`` names.

    Raises:
        ConfigError: there is none of that name, or it cannot be built from the config.
    """
    name = cfg.INPUT.DATASET_MAPPER_NAME
    if name not in SEMANTIC_MAPPERS:
        raise ConfigError(
            f"INPUT.DATASET_MAPPER_NAME is '{name}'; with TASK 'semantic' it can be "
            f"{' or '.join(sorted(SEMANTIC_MAPPERS))}."
        )
    return SEMANTIC_MAPPERS[name](cfg, is_train)


@register_semantic_mapper("sem_seg")
class SemSegMapper:
    """Read, check and augment one image and its label map.

    A callable for Detectron2's data loaders. It can be pickled, and its only state is NumPy's
    global generator.
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
        test_scales: Sequence[T.Augmentation] = (),
        rescale_resized: bool = False,
        reader: ImageReader = RGB,
    ) -> None:
        """
        Args:
            is_train: read, check and augment the label map too.
            augmentations: applied in order, to images as ``reader`` gives them.
            num_classes: in training at most 255; labels are 0..num_classes-1,
            ignore_value: or this, 0..255.
            image_format: channel order of the result, "RGB" or "BGR".
            test_scales: sizes of the multi-scale protocol.
            rescale_resized: make them from the augmented image, as the published
                mask-classification models were tested, instead of from the original one.
            reader: reads the images.

        Raises:
            ConfigError: the format, the classes or the ignore value are not as described.
        """
        if image_format not in ("RGB", "BGR"):
            raise ConfigError(f"INPUT.FORMAT is '{image_format}'; use 'RGB' or 'BGR'.")
        if is_train and num_classes > MAX_CLASSES:
            raise ConfigError(
                f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {num_classes}; label maps are used with 8 bits "
                f"and one value is for ignored pixels, so there can be {MAX_CLASSES} at most."
            )
        if not 0 <= ignore_value <= 255:
            raise ConfigError(
                f"MODEL.SEM_SEG_HEAD.IGNORE_VALUE is {ignore_value}; label maps have 8 bits, so it "
                "must be in 0..255."
            )
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.num_classes = num_classes
        self.ignore_value = ignore_value
        self.image_format = image_format
        self.test_scales = list(test_scales)
        self.rescale_resized = rescale_resized
        self.reader = reader

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        return {
            "is_train": is_train,
            "augmentations": build_augmentations(cfg, is_train),
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "ignore_value": cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
            "image_format": channel_order(cfg),
            "test_scales": [] if is_train else build_test_scales(cfg),
            "reader": ImageReader.from_config(cfg),
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """
        Args:
            dataset_dict: "file_name"; in training "sem_seg_file_name"; optionally "label_map",
                the name of a registered map from raw label values (``register_label_map``).
                It is not modified.

        Returns:
            The given entries and: "image", a (C, H, W) tensor, uint8, or float32 where it has
            been padded or is no 8-bit RGB, both 0..255; in training "sem_seg", a (H, W) int64
            tensor; "height" and "width" of the image file (upright); for the multi-scale protocol
            "images", the original image at each test scale.

        Raises:
            DataError: a file is missing or damaged, the two differ in size, or a label is no
                class.
        """
        if get_worker_info() is not None:
            cv2.setNumThreads(0)  # The workers run in parallel; threads in each would compete.
        image, sem_seg = self._read(dataset_dict)
        return {**dataset_dict, **self.transform(image, sem_seg)}

    def transform(self, image: np.ndarray, sem_seg: np.ndarray | None = None) -> dict[str, Any]:
        """The model's input, from an image that has been read.

        Args:
            image: (H, W, C), as ``reader`` gives it.
            sem_seg: its label map, (H, W) uint8, to be augmented alike.

        Returns:
            The entries that :meth:`__call__` adds.
        """
        inputs = T.AugInput(image, sem_seg=sem_seg)
        self.augmentations(inputs)
        output: dict[str, Any] = {"height": image.shape[0], "width": image.shape[1]}
        output["image"] = self._tensor(inputs.image)
        if sem_seg is not None:
            output["sem_seg"] = torch.from_numpy(contiguous(inputs.sem_seg).astype(np.int64))
        if self.test_scales:
            source = inputs.image if self.rescale_resized else image
            resized = (each.get_transform(source).apply_image(source) for each in self.test_scales)
            output["images"] = [self._tensor(pixels) for pixels in resized]
        return output

    def _tensor(self, image: np.ndarray) -> torch.Tensor:
        """(H, W, C) pixels to a (C, H, W) tensor in the model's channel order."""
        rgb = planes(image)
        return torch.from_numpy(rgb if self.image_format == "RGB" else rgb[::-1].copy())

    def _read(self, dataset_dict: dict[str, Any]) -> tuple[np.ndarray, np.ndarray | None]:
        """The image, and in training its label map, both checked."""
        image_path = dataset_dict["file_name"]
        image = self.reader.read(image_path)
        if not self.is_train:
            return image, None
        label_path = dataset_dict.get("sem_seg_file_name")
        if label_path is None:
            raise DataError(
                f"Image '{image_path}' has no label map: training needs 'sem_seg_file_name' in "
                "every entry of the dataset."
            )
        sem_seg = read_label(label_path, dataset_dict.get("label_map"))
        check_same_size(image, sem_seg, image_path, label_path)
        check_label_values(sem_seg, self.num_classes, self.ignore_value, label_path)
        return image, sem_seg


@contextlib.contextmanager
def errors_naming(keys: str) -> Iterator[None]:
    """Add the config keys to a component's error about its arguments."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{keys}: {error}.") from error
