"""From a dataset dict to the input of Detectron2's detectors, and the target of their priors."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, BoxMode, Instances
from detectron2.structures.masks import polygons_to_bitmask

from semask.data.annotations import NO_MASK, Segmentation, check_stated_size, describe, inspect
from semask.data.bands import RGB, ImageReader
from semask.data.mappers.mask_semantic import build_mask_augmentations
from semask.data.mappers.prior_target import PriorTarget, annotation_region, panoptic_to_semantic
from semask.data.mappers.semantic import build_distortion, build_flip, channel_order
from semask.data.reading import check_label_values, check_same_size, read_label
from semask.data.segments import (
    DisagreementLog,
    check_categories,
    compare,
    read_segment_ids,
    translated,
)
from semask.data.transforms.resizing import ResizeShortestEdge, build_large_scale_jitter
from semask.errors import ConfigError, DataError
from semask.modeling.architecture import (
    detector_classes,
    has_semantic_head,
    is_mask_classification,
    predicts_masks,
    prior_classes,
    prior_is_supervised,
)
from semask.modeling.heads.prior import PRIOR_TARGET
from semask.utils.text import is_worth_logging, one_line

logger = logging.getLogger(__name__)

# An annotation in Detectron2's form.
Annotation = dict[str, Any]


def build_instance_augmentations(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """Detectron2's pipeline of ``cfg.INPUT``: crop, shortest edge, flip; then distorted colours.

    ``cfg.INPUT.LSJ``, if enabled, replaces crop and shortest edge.

    Raises:
        ConfigError: a value cannot be used.
    """
    try:
        augmentations = [
            ResizeShortestEdge(step.short_edge_length, step.max_size, step.sample_style)
            if isinstance(step, T.ResizeShortestEdge)
            else step
            for step in detection_utils.build_augmentation(cfg, is_train)
        ]
        if is_train and cfg.INPUT.LSJ.ENABLED:
            kept = [step for step in augmentations if not isinstance(step, T.ResizeShortestEdge)]
            augmentations = [*build_large_scale_jitter(cfg), *kept]
        elif is_train and cfg.INPUT.CROP.ENABLED:
            augmentations.insert(0, T.RandomCrop(cfg.INPUT.CROP.TYPE, list(cfg.INPUT.CROP.SIZE)))
    except ConfigError:
        raise
    except (AssertionError, ValueError, TypeError) as error:
        reason = one_line(error)
        raise ConfigError(f"INPUT (MIN_SIZE_TRAIN, RANDOM_FLIP, CROP, ...): {reason}.") from error
    return [*augmentations, *(build_distortion(cfg) if is_train else ())]


def build_lsj_augmentations(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """The pipeline of COCO's published Mask2Formers: flip, large-scale jitter, padding to its size.

    In evaluation Detectron2's resizing of the shortest edge.

    Raises:
        ConfigError: a value cannot be used.
    """
    if not is_train:
        return build_instance_augmentations(cfg, False)
    return [*build_flip(cfg), *build_large_scale_jitter(cfg, pad=True), *build_distortion(cfg)]


Pipeline = Callable[[CfgNode, bool], list[T.Augmentation]]

# RLE masks and maps of segments are resized by Pillow's rule in both, as published.
_resized_crop: Pipeline = partial(build_mask_augmentations, label_interpolation="nearest-exact")

# Augmentations by INPUT.DATASET_MAPPER_NAME; those of panoptic maps are the same. The names of
# semantic segmentation, the first of which is the key's default, stand for Detectron2's.
PANOPTIC_PIPELINES = {
    "mask_former_panoptic": _resized_crop,
    "coco_panoptic_lsj": build_lsj_augmentations,
}
PIPELINES: dict[str, Pipeline] = {
    "sem_seg": build_instance_augmentations,
    "mask_former_semantic": build_instance_augmentations,
    "mask_former_instance": _resized_crop,
    "coco_instance_lsj": build_lsj_augmentations,
    **PANOPTIC_PIPELINES,
}


def uses_large_scale_jitter(cfg: CfgNode) -> bool:
    """Whether training images are cropped or padded to ``INPUT.LSJ.SIZE``."""
    return cfg.INPUT.LSJ.ENABLED or (
        PIPELINES.get(cfg.INPUT.DATASET_MAPPER_NAME) is build_lsj_augmentations
    )


class InstanceMapper:
    """Read and augment one image with its instances, and paint the target of the priors.

    Annotations that cannot be used are skipped: their boxes do not count in the target. A
    callable for Detectron2's data loaders; its only random state is NumPy's global generator.
    """

    @configurable
    def __init__(
        self,
        *,
        is_train: bool,
        augmentations: Sequence[T.Augmentation | T.Transform],
        num_categories: int,
        use_masks: bool = True,
        mask_format: str = "polygon",
        crops: bool = False,
        pads: bool = False,
        keep_empty: bool = False,
        image_format: str = "RGB",
        prior_target: PriorTarget | None = None,
        semantic_classes: int = 0,
        semantic_prior: bool = False,
        ignore_value: int = 255,
        reader: ImageReader = RGB,
    ) -> None:
        """
        Args:
            is_train: give the annotations too.
            augmentations: applied in order, to RGB images.
            num_categories: N; category ids are 0..N-1.
            use_masks: instances have masks, and those without one are skipped.
            mask_format: "polygon" or "bitmask". Instances that do not all have polygons are
                bit masks in any case.
            crops: the augmentations crop; masks are then bit masks, and boxes follow them.
            pads: the augmentations pad with ``ignore_value``; nothing reaches into the padding, and
                it does not count in the target.
            keep_empty: instances of which the augmentations leave no pixel stay, with empty masks.
            image_format: channel order of the result, "RGB" or "BGR".
            prior_target: paints the target from the instances; None = there is none, or it is
                the semantic map.
            semantic_classes: K of the dataset's semantic maps, which are read; 0 = they are not.
            semantic_prior: the semantic map is the target of the priors.
            ignore_value: of its ignored pixels.
            reader: reads the images.

        Raises:
            ConfigError: a format is not as described.
        """
        if image_format not in ("RGB", "BGR"):
            raise ConfigError(f"INPUT.FORMAT is '{image_format}'; use 'RGB' or 'BGR'.")
        if mask_format not in ("polygon", "bitmask"):
            raise ConfigError(f"INPUT.MASK_FORMAT is '{mask_format}'; use 'polygon' or 'bitmask'.")
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.num_categories = num_categories
        self.use_masks = use_masks
        self.mask_format = mask_format
        self.crops = crops
        self.pads = pads
        self.keep_empty = keep_empty
        self.image_format = image_format
        self.prior_target = prior_target
        self.semantic_classes = semantic_classes
        self.semantic_prior = semantic_prior
        self.ignore_value = ignore_value
        self.reader = reader
        self.skipped = 0
        self.left_out = DisagreementLog()

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        head, semask = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.SEMASK
        supervised = is_train and prior_is_supervised(cfg)
        semantic_prior = supervised and semask.PRIOR_TARGET == "sem_seg"
        needs_map = semantic_prior or (is_train and has_semantic_head(cfg))
        name, inputs = cfg.INPUT.DATASET_MAPPER_NAME, cfg.INPUT
        if name not in PIPELINES:
            raise ConfigError(
                f"INPUT.DATASET_MAPPER_NAME is '{name}'; instances are read by "
                f"{', '.join(PIPELINES)}."
            )
        jitters = PIPELINES[name] is build_lsj_augmentations
        pads = jitters or (PIPELINES[name] is _resized_crop and inputs.SIZE_DIVISIBILITY > 0)
        categories = detector_classes(cfg)
        classes = prior_classes(cfg) if is_mask_classification(cfg) else head.NUM_CLASSES
        prior_target = None
        if supervised and not semantic_prior:
            prior_target = PriorTarget(
                num_categories=categories,
                ignore_value=head.IGNORE_VALUE,
                ignore_outside=semask.IGNORE_OUTSIDE,
            )
        return {
            "is_train": is_train,
            "augmentations": PIPELINES[name](cfg, is_train),
            "num_categories": categories,
            "use_masks": predicts_masks(cfg),
            "mask_format": cfg.INPUT.MASK_FORMAT,
            "crops": inputs.CROP.ENABLED or inputs.LSJ.ENABLED or jitters,
            "pads": pads,
            "keep_empty": inputs.KEEP_EMPTY_MASKS,
            "image_format": channel_order(cfg),
            "reader": ImageReader.from_config(cfg),
            "prior_target": prior_target,
            "semantic_classes": classes if needs_map else 0,
            "semantic_prior": semantic_prior,
            "ignore_value": head.IGNORE_VALUE,
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """
        Args:
            dataset_dict: Detectron2's standard dict of an image: "file_name", in training
                "annotations", and "sem_seg_file_name" or "pan_seg_file_name" with
                "segments_info" where the semantic map is asked for. It is not modified.

        Returns:
            The given entries except the annotations, and: "image", a (C, H, W) tensor, 0..255;
            "height" and "width" of the image file (upright); in training "instances", and where
            asked for "sem_seg" and "prior_target", (H, W) int64 tensors.

        Raises:
            DataError: a file is missing or damaged, an image has another size than its record
                says, a category does not exist, or the semantic map cannot be used.
        """
        path = dataset_dict["file_name"]
        image = self.reader.read(path)
        height, width = image.shape[:2]
        check_stated_size(dataset_dict, height, width)
        semantic = self._semantic_map(dataset_dict, image) if self.semantic_classes else None
        inputs = T.AugInput(image, sem_seg=semantic)
        transforms = self.augmentations(inputs)
        left_out = ("annotations", "sem_seg_file_name", "pan_seg_file_name", "segments_info")
        output = {k: v for k, v in dataset_dict.items() if not self.is_train or k not in left_out}
        output.pop("annotations", None)
        output |= {"height": height, "width": width, "image": self._tensor(inputs.image)}
        if not self.is_train:
            return output
        size = (inputs.image.shape[0], inputs.image.shape[1])
        padding = self._padding(transforms, (height, width)) if self.pads else None
        annotations = self._annotations(dataset_dict, transforms, (height, width), size, padding)
        output["instances"] = self._instances(annotations, size, padding)
        if semantic is not None:
            output["sem_seg"] = _as_target(inputs.sem_seg)
        if self.semantic_prior:
            output[PRIOR_TARGET] = output["sem_seg"]
        elif self.prior_target is not None:
            target = self.prior_target.from_annotations(annotations, size)
            if padding is not None:
                target[padding] = self.ignore_value
            output[PRIOR_TARGET] = _as_target(target)
        return output

    def transform(self, image: np.ndarray) -> dict[str, Any]:
        """The model's input in evaluation, from an image that has been read.

        Args:
            image: (H, W, C), as ``reader`` gives it.

        Returns:
            "image", "height" and "width", as :meth:`__call__` gives them.
        """
        inputs = T.AugInput(image)
        self.augmentations(inputs)
        height, width = image.shape[:2]
        return {"height": height, "width": width, "image": self._tensor(inputs.image)}

    def _tensor(self, image: np.ndarray) -> torch.Tensor:
        """(H, W, C) pixels to a (C, H, W) tensor in the model's channel order."""
        image = image if self.image_format == "RGB" else image[:, :, ::-1]
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))

    def _padding(self, transforms: T.TransformList, size: tuple[int, int]) -> np.ndarray:
        """(H, W) bool: the padding of the augmented image."""
        other = (self.ignore_value + 1) % 256
        padded: np.ndarray = transforms.apply_segmentation(np.full(size, other, np.uint8))
        return padded == self.ignore_value

    def _annotations(
        self,
        dataset_dict: dict[str, Any],
        transforms: T.TransformList,
        old: tuple[int, int],
        new: tuple[int, int],
        padding: np.ndarray | None,
    ) -> list[Annotation]:
        """The annotations after the augmentation.

        Those that are skipped are crowds in it: what they cover is not known.
        """
        annotations = []
        for given in dataset_dict.get("annotations", ()):
            category = given.get("category_id")
            if not isinstance(category, int) or not 0 <= category < self.num_categories:
                raise DataError(
                    f"{describe(given, dataset_dict)} has the category {category!r}, but the model "
                    f"has 0..{self.num_categories - 1}: set MODEL.ROI_HEADS.NUM_CLASSES "
                    "(MODEL.RETINANET.NUM_CLASSES; for mask classification "
                    "MODEL.SEM_SEG_HEAD.NUM_CLASSES) to the dataset's number of categories."
                )
            found = inspect(given, *old)
            crowd = int(bool(given.get("iscrowd", 0)))
            unusable = found.box is None or (self.use_masks and found.segmentation is None)
            if unusable and not crowd:
                self._note_skipped(given, dataset_dict, found.problems)
            if found.box is None:
                continue
            box = transforms.apply_box(np.array([found.box]))[0].clip(min=0)
            box = np.minimum(box, [new[1], new[0], new[1], new[0]])
            cropped_away = box[0] >= box[2] or box[1] >= box[3]
            if cropped_away and (crowd or unusable or not self.keep_empty):
                continue
            annotation: Annotation = {
                "bbox": box,
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": category,
                "iscrowd": int(crowd or unusable),
            }
            if found.segmentation is not None:
                segmentation = _transformed(found.segmentation, transforms)
                if padding is not None and isinstance(segmentation, np.ndarray):
                    segmentation[padding] = 0
                annotation["segmentation"] = segmentation
            annotations.append(annotation)
        return annotations

    def _instances(
        self,
        annotations: Sequence[Annotation],
        size: tuple[int, int],
        padding: np.ndarray | None,
    ) -> Instances:
        kept = [dict(entry) for entry in annotations if not entry["iscrowd"]]
        cut = self.crops or self.pads
        as_polygons = (
            self.mask_format == "polygon"
            and not cut
            and all(isinstance(entry.get("segmentation", []), list) for entry in kept)
        )
        masks = None
        if self.use_masks and kept and not as_polygons:
            # Each mask at once into one array: thousands of large masks fit into memory once.
            masks = np.zeros((len(kept), *size), np.bool_)
            for mask, entry in zip(masks, kept, strict=True):
                mask[:] = self._bit_mask(entry, size)
                if cut and padding is not None:
                    mask[padding] = False
        for entry in kept:
            if not self.use_masks or masks is not None:
                entry.pop("segmentation", None)
        instances = detection_utils.annotations_to_instances(kept, size)
        if masks is not None:
            instances.gt_masks = BitMasks(torch.from_numpy(masks))
            if cut:
                instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
        return instances if self.keep_empty else _without_empty(instances)

    def _bit_mask(self, entry: Annotation, size: tuple[int, int]) -> np.ndarray:
        if self.crops or self.pads:
            return annotation_region(entry).mask_of_image(*size)
        segmentation = entry["segmentation"]
        if isinstance(segmentation, list):
            return polygons_to_bitmask(segmentation, *size)
        return np.asarray(segmentation)

    def _semantic_map(self, dataset_dict: dict[str, Any], image: np.ndarray) -> np.ndarray:
        """(H, W) uint8, from the stuff map or the panoptic map."""
        path = dataset_dict.get("sem_seg_file_name") or dataset_dict.get("pan_seg_file_name")
        if path is None:
            raise DataError(
                f"Image '{dataset_dict['file_name']}' has no semantic map: its entry needs "
                "'sem_seg_file_name', or 'pan_seg_file_name' and 'segments_info'. With "
                "MODEL.SEMASK.PRIOR_TARGET 'instances' the prior's target is painted from the "
                "instances."
            )
        if "sem_seg_file_name" in dataset_dict:
            semantic = read_label(path, dataset_dict.get("label_map"))
        else:
            segments = dataset_dict.get("segments_info", ())
            ids = read_segment_ids(path)
            check_categories(segments, self.semantic_classes, path)
            self.left_out.add(path, compare(translated(ids, {}, 0)[1], segments))
            semantic = panoptic_to_semantic(ids, segments, self.ignore_value)
        check_same_size(image, semantic, dataset_dict["file_name"], path)
        check_label_values(semantic, self.semantic_classes, self.ignore_value, path)
        return semantic

    def _note_skipped(
        self, annotation: Annotation, record: dict[str, Any], problems: Sequence[str]
    ) -> None:
        self.skipped += 1
        if is_worth_logging(self.skipped):
            logger.warning(
                "Skipped %s: %s (annotations skipped so far by this process: %d)",
                describe(annotation, record),
                ", ".join(problems) or NO_MASK,
                self.skipped,
            )


def _transformed(segmentation: Segmentation, transforms: T.TransformList) -> Any:
    """Polygons or an RLE after the augmentation: polygons, or an (H, W) mask.

    Polygons may stick out of the image: they are clipped where they are drawn. (Detectron2 clips
    them before, for which it needs shapely.)
    """
    if isinstance(segmentation, dict):
        return np.array(transforms.apply_segmentation(mask_util.decode(segmentation)))
    return [transforms.apply_coords(polygon.reshape(-1, 2)).reshape(-1) for polygon in segmentation]


def _without_empty(instances: Instances) -> Instances:
    """As Detectron2's ``filter_empty_instances``, without a copy where there are none."""
    keep = instances.gt_boxes.nonempty(threshold=1e-5)
    if instances.has("gt_masks"):
        keep = keep & instances.gt_masks.nonempty()
    return instances if keep.all() else instances[keep]


def _as_target(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64))
