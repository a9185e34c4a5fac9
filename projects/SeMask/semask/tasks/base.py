"""The task interface: everything that depends on what is predicted.

``TASK`` names an entry of ``TASK_REGISTRY``. Trainer, checks, evaluation, prediction and reports
call the entry; no other code depends on the task. To add a task, derive a class from ``Task``, or
from one of the tasks here, in your own module:

    @TASK_REGISTRY.register()
    class MyTask(SemanticTask):
        name = "my_task"

``semask train --import my_module`` imports it, as does every command.
"""

import contextlib
import os
import shlex
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.evaluation import DatasetEvaluator
from fvcore.common.registry import Registry
from torch import nn

from semask.config import register_resolver
from semask.errors import ConfigError
from semask.inference.predictor import (
    PREDICTORS,
    ImageMapper,
    ImagePredictor,
    TaskPredictor,
)


class InputMapper(ImageMapper, Protocol):
    """Maps a dataset dict, which it does not modify, to a model's input."""

    augmentations: T.AugmentationList

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]: ...


class Task(ABC):
    """What a run trains on, evaluates, predicts and reports.

    Attributes:
        name: the value of ``TASK``.
        predictor: predicts single images with a trained model, through the mapper of evaluation.
        shapes_only: a model's cost depends only on the shapes of its tensors, not on their
            values; see :func:`semask.engine.analysis.analyze_model`.
        fixed_size: all training images have :meth:`training_size`, so ``torch.compile`` is
            worthwhile.
        cfg: the config of the run.
    """

    name: ClassVar[str]
    predictor: ClassVar[type[ImagePredictor]]
    shapes_only: ClassVar[bool] = True
    fixed_size: ClassVar[bool] = True

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: with this project's keys; only :meth:`resolve_classes` modifies it.
        """
        self.cfg = cfg

    @abstractmethod
    def resolve_classes(self) -> None:
        """Replace a number of classes of 0 in ``cfg`` by that of the datasets, in place.

        Raises:
            ConfigError: no dataset is registered.
        """

    @classmethod
    def category_names_key(cls, cfg: CfgNode) -> str:
        """The entry of a dataset's metadata with the names of the predicted instances' classes.

        Args:
            cfg: of the model.
        """
        return "thing_classes"

    @abstractmethod
    def build_mapper(self, is_train: bool) -> InputMapper:
        """Build the mapper, which reads and augments an image with its annotations.

        Args:
            is_train: for training; else for evaluation, without random augmentation.

        Raises:
            ConfigError: the config does not allow it.
        """

    @property
    def filter_empty(self) -> bool:
        """Whether images without annotations are left out of training."""
        return False

    def check_datasets(self, names: Sequence[str], *, eval_only: bool) -> None:
        """Check the metadata of all datasets of a run against the config and each other.

        Args:
            names: of the datasets; there is at least one.
            eval_only: whether the run only evaluates.

        Raises:
            ConfigError: a dataset is not registered, or does not fit the config or the others.
            DataError: a dataset cannot be loaded, which its metadata need.
        """
        for name in names:
            self.check_metadata(name)

    @abstractmethod
    def check_metadata(self, name: str) -> None:
        """Check the name, classes and ignore value of one dataset against the config.

        Raises:
            ConfigError, DataError: as for :meth:`check_datasets`.
        """

    @abstractmethod
    def check_images(self, name: str, *, is_train: bool, resume: bool = False) -> None:
        """Load a dataset and check a sample of ``DATASETS.CHECK_SAMPLE`` images.

        Args:
            name: of a registered dataset.
            is_train: whether it is trained on.
            resume: accept up to ``DATALOADER.MAX_UNREADABLE`` unreadable files, which the run
                skips.

        Raises:
            DataError: the dataset is missing or empty, or images or annotations cannot be used.
            ConfigError: the mapper cannot be built from the config.
        """

    @abstractmethod
    def build_evaluator(self, dataset_name: str, folder: str) -> DatasetEvaluator:
        """Build the evaluator of a dataset.

        Args:
            dataset_name: of a registered dataset.
            folder: for the results.

        Raises:
            ConfigError: the dataset does not fit the config, or cannot be evaluated.
        """

    @abstractmethod
    def write_report(self, model: nn.Module, dataset_name: str, folder: str) -> str:
        """Write the report of an evaluation; in one process only.

        Args:
            model: the evaluated model, possibly wrapped for distributed training.
            dataset_name: of the evaluated dataset.
            folder: of the evaluator's results.

        Returns:
            The path of the page.
        """

    def panels_path(self) -> str | None:
        """The path of the picture with predictions that a run writes; None if it writes none."""
        return None

    def draw_panels(self, model: nn.Module) -> np.ndarray | None:
        """Draw predictions on some images, and write them to :meth:`panels_path`.

        To be called in the main process only.

        Args:
            model: possibly wrapped for distributed training; its mode is not changed.

        Returns:
            The picture, (height, width, 3) uint8, RGB; None if none is requested.
        """
        return None

    @abstractmethod
    def training_size(self) -> tuple[int, int]:
        """Maximum height and width of a training image in pixels."""

    @abstractmethod
    def placeholder_inputs(self, size: tuple[int, int], count: int) -> list[dict[str, Any]]:
        """Dummy inputs for a training step.

        Args:
            size: height and width of the images in pixels.
            count: number of images.
        """

    def analysis_config(self) -> CfgNode:
        """A config, not frozen, whose untrained model costs as much as a trained one."""
        cfg = self.cfg.clone()
        cfg.defrost()
        return cfg

    def _facts(self, model: nn.Module, name: str) -> list[tuple[str, str]]:
        """The facts in a report about the model, its weights and the command."""
        parameters = sum(parameter.numel() for parameter in model.parameters())
        facts = [("Model", name), ("Parameters", f"{parameters:,}"), *_origin.get()]
        return [*facts, ("Command", command)] if (command := _command()) else facts


# The origin of the evaluated weights, for reports: short names and values.
_origin: ContextVar[tuple[tuple[str, str], ...]] = ContextVar("origin", default=())


@contextlib.contextmanager
def evaluated_weights(name: str, iteration: int | None, of: int | None = None) -> Iterator[None]:
    """A context in which reports state these weights as the evaluated ones.

    Args:
        name: the file, or a description.
        iteration: number of training steps; None = unknown.
        of: number of steps of the whole run.
    """
    facts = [("Weights", name)]
    if iteration is not None:
        facts.append(("Iteration", f"{iteration:,}" + (f" of {of:,}" if of else "")))
    token = _origin.set(tuple(facts))
    try:
        yield
    finally:
        _origin.reset(token)


def _command() -> str:
    """The command of this process, if it is one of this project's; "" in a notebook."""
    program, arguments = sys.argv[0], sys.argv[1:]
    name = os.path.basename(program)
    if name == "__main__.py" and os.path.basename(os.path.dirname(program)) == "semask":
        name = "semask"
    if name not in ("semask", "train_net.py"):
        return ""
    return shlex.join([*(["python"] if name.endswith(".py") else []), name, *arguments])


AnyTask = TypeVar("AnyTask", bound=type[Task])


class TaskRegistry(Registry):
    """The registry of tasks, by their ``name``."""

    def register(self, obj: Any = None) -> Any:
        """A decorator that registers a subclass of ``Task``, also with its predictor."""

        def enter(task: AnyTask) -> AnyTask:
            self._do_register(task.name, task)
            PREDICTORS[task.name] = TaskPredictor(
                task.predictor,
                lambda cfg: task(cfg).build_mapper(is_train=False),
                task.category_names_key,
            )
            return task

        return enter if obj is None else enter(obj)


TASK_REGISTRY = TaskRegistry("TASK")


def build_task(cfg: CfgNode) -> Task:
    """Build the task of the key ``TASK``.

    Raises:
        ConfigError: no task of that name is registered.
    """
    if cfg.TASK not in TASK_REGISTRY:
        known = ", ".join(sorted(name for name, _ in TASK_REGISTRY))
        raise ConfigError(
            f"TASK is '{cfg.TASK}'; registered are {known}. Import a module that registers your "
            "own task with --import MODULE."
        )
    return TASK_REGISTRY.get(cfg.TASK)(cfg)


@register_resolver
def _resolve_classes(cfg: CfgNode) -> None:
    build_task(cfg).resolve_classes()


def inference_folder(cfg: CfgNode, dataset_name: str) -> str:
    """The folder for all files of the evaluation on a dataset."""
    return os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)


def write_reports(cfg: CfgNode, model: nn.Module) -> list[str]:
    """Write the report of each dataset of ``DATASETS.TEST``, right after its evaluation.

    To be called in the main process only.

    Args:
        cfg: the run's config.
        model: the evaluated model, possibly wrapped for distributed training.

    Returns:
        The paths of the reports; empty if ``TEST.REPORT`` is off.
    """
    if not cfg.TEST.REPORT:
        return []
    task = build_task(cfg)
    return [
        task.write_report(model, name, inference_folder(cfg, name)) for name in cfg.DATASETS.TEST
    ]
