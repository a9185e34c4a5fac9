"""A trained model as a function from an image to its segmentation."""

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from detectron2.config import CfgNode
from PIL import Image
from torch import Tensor

from semask.checkpoint import SeMaskCheckpointer
from semask.config import load_config, merge_overrides, split_overrides
from semask.data.bands import RGB, ImageReader
from semask.data.datasets.folder import IMAGE_EXTENSIONS
from semask.data.image_files import file_errors
from semask.data.reading import rgb_pixels
from semask.errors import CheckpointError, ConfigError, DataError
from semask.inference.class_names import semantic_classes
from semask.inference.model_outputs import gives_priors, predict, predicts_scores
from semask.inference.prediction import ImagePrediction, Prediction
from semask.modeling import check_protocol
from semask.modeling.build import build_model
from semask.ops.apply import apply_selected_fast_paths
from semask.ops.lazy_scores import LazyScores
from semask.utils.device import resolve_device
from semask.utils.files import files_below
from semask.utils.precision import amp_dtype, evaluation_autocast

logger = logging.getLogger(__name__)

AnyImage = np.ndarray | Image.Image | str | os.PathLike[str]


class ImageMapper(Protocol):
    """Makes a model's input from an image.

    Attributes:
        reader: reads image files.
    """

    reader: ImageReader

    def transform(self, image: np.ndarray) -> dict[str, Any]:
        """The model's input in evaluation, from an (H, W, C) image as ``reader`` returns it."""
        ...


@dataclass(frozen=True)
class TaskPredictor:
    """How images are predicted for a task.

    Attributes:
        kind: the class of the predictor.
        build_mapper: builds the mapper of the task's evaluation from a config.
        names_key: gives the entry of a dataset's metadata with the names of the predicted
            instances' classes, for a config.
    """

    kind: type["ImagePredictor"]
    build_mapper: Callable[[CfgNode], ImageMapper]
    names_key: Callable[[CfgNode], str] = lambda cfg: "thing_classes"


# By the values of ``TASK``. ``TASK_REGISTRY`` adds each task.
PREDICTORS: dict[str, TaskPredictor] = {}


def predictor_of(task: str) -> TaskPredictor:
    """How images are predicted for a value of ``TASK``.

    Raises:
        ConfigError: no task of that name is registered.
    """
    if task not in PREDICTORS:
        raise ConfigError(f"TASK is '{task}'; registered are {', '.join(sorted(PREDICTORS))}.")
    return PREDICTORS[task]


class ImagePredictor(ABC):
    """A trained model in evaluation mode that is called with an image.

    Attributes:
        cfg: the config, frozen.
        model: in evaluation mode.
    """

    def __init__(
        self,
        config: str | os.PathLike[str] | CfgNode,
        weights: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        overrides: Sequence[str] = (),
    ) -> None:
        """
        Args:
            config: a file, the name of a shipped config, or a config (which is not modified).
            weights: a checkpoint of that model, from this project or published.
            device: e.g. "cpu" or "cuda:1"; None = the config's, or the CPU if there is no GPU.
            overrides: ``KEY, VALUE`` or ``KEY=VALUE``, as on the command line, for example
                ``["TEST.PROTOCOL", "multi_scale"]``.

        Raises:
            ConfigError: the config, an override or the device cannot be used, or the config's
                ``TASK`` has another predictor.
            CheckpointError: the checkpoint is missing, unsafe, incomplete or of another model.
        """
        cfg = read_config(config, overrides)
        entry = predictor_of(cfg.TASK)
        if not isinstance(self, entry.kind):
            raise ConfigError(
                f"TASK is '{cfg.TASK}', which {type(self).__name__} does not predict: use "
                f"{entry.kind.__name__}."
            )
        self.cfg, self.model = load_model(cfg, weights, device, overrides)
        self._mapper = entry.build_mapper(self.cfg)
        self.set_up()

    @abstractmethod
    def set_up(self) -> None:
        """Build what a subclass needs besides config, model and mapper."""

    @property
    @abstractmethod
    def has_priors(self) -> bool:
        """Whether the model has semantic layers, and so prior maps to show."""

    @abstractmethod
    def __call__(self, image: AnyImage, *, priors: bool = False) -> ImagePrediction:
        """The prediction for one image.

        Args:
            image: a path, a Pillow image, or an (H, W, 3) uint8 RGB array; of a model with other
                channels or values an (H, W, C) array with the values of the files.
            priors: also return the semantic priors.

        Raises:
            DataError: the image cannot be read.
            ConfigError: the model has no semantic priors.
        """

    def in_detail(self, image: AnyImage) -> ImagePrediction:
        """The prediction with all optional outputs: priors, confidence of each pixel.

        Args, Raises: as for a call.
        """
        return self(image, priors=self.has_priors)

    def predict_folder(
        self, folder: str | os.PathLike[str], **options: Any
    ) -> Iterator[tuple[Path, Any]]:
        """Predict the images of a folder and of the folders in it, one at a time.

        Images that cannot be read are skipped with a warning, and counted at the end.

        Args:
            folder: the images are those that `image_files` lists.
            **options: as for a single image, such as ``priors``.

        Yields:
            Path and prediction, as a call returns it, in the order of the paths.

        Raises:
            DataError: there is no such folder, or no image in it.
        """
        files = image_files(folder)
        unreadable = 0
        for file in files:
            try:
                prediction = self(file, **options)
            except DataError as error:
                unreadable += 1
                logger.warning("Left out: %s", error)
                continue
            yield file, prediction
        if unreadable:
            logger.warning(
                "%d of the %d images in '%s' could not be read.", unreadable, len(files), folder
            )


class Predictor(ImagePredictor):
    """Segments images exactly as the evaluation does: same resizing, protocol and numbers.

    With the config of another task it returns that task's predictor, such as
    :class:`semask.InstancePredictor`.

    Example::

        predictor = semask.Predictor("ade20k/semask_swin_tiny_fpn", "model_final.pth")
        prediction = predictor("street.jpg")
        prediction.labels, prediction.class_names, prediction.overlay()

    Attributes:
        cfg: the config, frozen.
        model: in evaluation mode.
        class_names, colors: of the first dataset of ``DATASETS.TEST`` (or else of
            ``DATASETS.TRAIN``) that is registered with that number of classes; otherwise "class 0",
            ...
    """

    def __new__(
        cls,
        config: str | os.PathLike[str] | CfgNode,
        *args: Any,
        overrides: Sequence[str] = (),
        **kwargs: Any,
    ) -> Any:
        """The predictor of the config's task, such as an ``InstancePredictor``."""
        if cls is not Predictor:
            return super().__new__(cls)
        kind = predictor_of(read_config(config, overrides).TASK).kind
        if issubclass(kind, Predictor):
            return super().__new__(kind)  # Python calls __init__ of instances of this class
        return kind(config, *args, overrides=overrides, **kwargs)

    def set_up(self) -> None:
        self.class_names, self.colors = semantic_classes(self.cfg)

    @property
    def has_priors(self) -> bool:
        """Whether the model has semantic layers, and so prior maps to show."""
        return predicts_scores(self.model) and gives_priors(self.model)

    def __call__(
        self,
        image: AnyImage,
        *,
        probabilities: bool = False,
        priors: bool = False,
        confidence: bool = False,
    ) -> Prediction:
        """Segment one image.

        Args:
            image: a path, a Pillow image, or an (H, W, 3) uint8 RGB array; of a model with other
                channels or values an (H, W, C) array with the values of the files.
            probabilities: also return the probabilities of all classes, K * H * W numbers.
            priors: also return the semantic priors.
            confidence: also return the probability of each pixel's class.

        Raises:
            DataError: the image cannot be read.
            ConfigError: the model has no semantic priors.
        """
        pixels = image_pixels(image, self._mapper.reader)
        return self._segment(
            pixels, probabilities=probabilities, priors=priors, confidence=confidence
        )

    def in_detail(self, image: AnyImage) -> Prediction:
        """See :meth:`ImagePredictor.in_detail`."""
        return self(image, priors=self.has_priors, confidence=True)

    def _segment(
        self,
        pixels: np.ndarray,
        *,
        probabilities: bool,
        priors: bool,
        confidence: bool = False,
    ) -> Prediction:
        """The prediction for an image as the mapper's reader returns it."""
        if priors and not self.has_priors:
            raise ConfigError(
                "This model has no semantic priors to return: it is no SeMaskSegmentor, or has no "
                "semantic layers (MODEL.META_ARCHITECTURE, MODEL.SEMASK.ATTENTION)."
            )
        inputs = self._mapper.transform(pixels)
        with torch.inference_mode(), evaluation_autocast(self.cfg):
            output = predict(self.model, inputs, priors=priors)
            scores: LazyScores = output["sem_seg"]
            labels, certainty = (
                scores.labels_and_confidence() if confidence else (scores.labels(), None)
            )
            return Prediction(
                image=self._mapper.reader.picture(pixels),
                labels=self._labels(labels),
                class_names=self.class_names,
                colors=self.colors,
                probabilities=_array(scores.probabilities()) if probabilities else None,
                confidence=None if certainty is None else _array(certainty),
                prior=self._labels(output["prior"].labels()) if "prior" in output else None,
                priors={k: _array(v) for k, v in output["priors"].items()} if priors else None,
            )

    def _labels(self, classes: Tensor) -> np.ndarray:
        dtype = np.uint8 if len(self.class_names) <= 256 else np.uint16
        return classes.cpu().numpy().astype(dtype)


def image_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The images in a folder and its subfolders, recognised by their suffix, sorted.

    Hidden files and folders are left out; links to folders are followed.

    Raises:
        DataError: there is no such folder, or no image in it, or a folder cannot be read.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"There is no folder '{root}'.")
    files = sorted(file for file in files_below(root) if file.suffix.lower() in IMAGE_EXTENSIONS)
    if not files:
        raise DataError(
            f"There is no image in '{root}': no file name ends in {', '.join(IMAGE_EXTENSIONS)}."
        )
    return files


def load_model(
    cfg: CfgNode,
    weights: str | os.PathLike[str],
    device: str | torch.device | None,
    overrides: Sequence[str],
) -> tuple[CfgNode, torch.nn.Module]:
    """The frozen config and the model in evaluation mode.

    Args, Raises: as for :class:`ImagePredictor`.
    """
    if device is not None:
        cfg.MODEL.DEVICE = str(device)
    explicit = device is not None or "MODEL.DEVICE" in split_overrides(overrides)[::2]
    resolve_device(cfg, min(1, torch.cuda.device_count()), explicit=explicit)
    cfg.MODEL.WEIGHTS = os.fspath(weights)
    if not cfg.MODEL.WEIGHTS:
        raise CheckpointError("A predictor needs weights: pass the path of a checkpoint.")
    amp_dtype(cfg, "TEST")  # checks that the device supports the precision
    cfg.freeze()
    # The checkpoint replaces the initial weights: drawing them must not change random numbers.
    with torch.random.fork_rng(devices=[]):
        model = _build_model(cfg)
    pickles = cfg.MODEL.ALLOW_PICKLE
    SeMaskCheckpointer(model, allow_pickle=pickles, complete=True).load(cfg.MODEL.WEIGHTS)
    return cfg, model


def read_config(config: str | os.PathLike[str] | CfgNode, overrides: Sequence[str]) -> CfgNode:
    """Load a file or a shipped config by name, or copy a config, and apply overrides."""
    if not isinstance(config, CfgNode):
        return load_config(os.fspath(config), overrides)
    cfg = config.clone()
    cfg.defrost()
    merge_overrides(cfg, overrides)
    return cfg


def _build_model(cfg: CfgNode) -> torch.nn.Module:
    model = build_model(cfg)
    check_protocol(cfg, model)
    return apply_selected_fast_paths(cfg, model).eval()


def image_pixels(image: AnyImage, reader: ImageReader = RGB) -> np.ndarray:
    """(H, W, 3) uint8, RGB, or what else the reader returns.

    Args:
        image: a path, a Pillow image, or an array: RGB, or with the values of the files.
        reader: of the model.

    Raises:
        DataError: the array has another shape or type, or the image cannot be read.
    """
    if isinstance(image, np.ndarray) and not reader.is_rgb:
        return reader.scaled(image)
    if isinstance(image, Image.Image) and not reader.is_rgb:
        return reader.scaled(np.asarray(image))
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise DataError(
                "An image array must be RGB, (H, W, 3) uint8; this one is "
                f"{image.shape} {image.dtype}."
            )
        return image
    if isinstance(image, Image.Image):
        name = getattr(image, "filename", "") or "(Pillow image)"
        with file_errors(name, "image"):
            return rgb_pixels(image, name)
    return reader.read(image)


def _array(values: Tensor) -> np.ndarray:
    return values.float().cpu().numpy()
