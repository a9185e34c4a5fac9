"""A tracker: a service or program that records experiments, beside what is in OUTPUT_DIR.

``TRACKERS`` names entries of ``TRACKER_REGISTRY``. An own one is a class derived from ``Tracker``,
in a module of your own that ``--import`` names:

    @TRACKER_REGISTRY.register()
    class MyTracker(Tracker):
        name = "my_tracker"
        package = "my_package"
        ...
"""

import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
import yaml
from detectron2.config import CfgNode
from fvcore.common.registry import Registry

from semask.errors import ConfigError
from semask.utils.text import one_line

DEFAULT_PROJECT = "semask"


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run.

    Attributes:
        project: of the tracker (MLflow: experiment) that the run belongs to.
        name: of the run, as people see it.
        folder: OUTPUT_DIR, as an absolute path; ``config.yaml`` is in it.
        config: the whole config, as nested dicts of plain values.
    """

    project: str
    name: str
    folder: str
    config: dict[str, Any]


class Tracker(ABC):
    """One run in a tracker. What its methods raise ends no training.

    ``start`` is called in the main thread, ``log`` and ``finish`` in another one, one after the
    other, so that the training never waits for a network.

    Attributes:
        name: the entry of ``TRACKERS``.
        package: the module to import, within the methods alone: it is optional. "" = none.
        project_variable: environment variable of the tracker for the project, or "".
        name_variable: environment variable of the tracker for the run's name, or "".
    """

    name: ClassVar[str]
    package: ClassVar[str]
    project_variable: ClassVar[str] = ""
    name_variable: ClassVar[str] = ""

    @abstractmethod
    def start(self, run: TrackedRun, run_id: str | None) -> str:
        """Begin a run, or go on with one, and record the config.

        Args:
            run: what is recorded.
            run_id: what this method returned for the run that is resumed; None for a new one.

        Returns:
            What identifies the run.
        """

    @abstractmethod
    def log(
        self, step: int, scalars: Mapping[str, float], images: Mapping[str, np.ndarray]
    ) -> None:
        """Record what is new.

        Args:
            step: iteration of the training, from 0. After a resumption, steps can come again.
            scalars: by name, such as "sem_seg/mIoU"; possibly not finite, possibly empty.
            images: by name, (height, width, 3) uint8, RGB; possibly empty.
        """

    @abstractmethod
    def finish(self, complete: bool) -> None:
        """Write what is left and end the run.

        Args:
            complete: the training has come to its end; otherwise it can be resumed.
        """


AnyTracker = TypeVar("AnyTracker", bound=type[Tracker])


class TrackerRegistry(Registry):
    """The trackers by their ``name``."""

    def register(self, obj: Any = None) -> Any:
        """A decorator: enter a subclass of ``Tracker``."""

        def enter(tracker: AnyTracker) -> AnyTracker:
            self._do_register(tracker.name, tracker)
            return tracker

        return enter if obj is None else enter(obj)


TRACKER_REGISTRY = TrackerRegistry("TRACKER")


def check_trackers(cfg: CfgNode) -> None:
    """Refuse what ``TRACKERS`` cannot name.

    Raises:
        ConfigError: an entry is not registered, or its package is not installed.
    """
    for name in cfg.TRACKERS:
        if not isinstance(name, str) or name not in TRACKER_REGISTRY:
            known = ", ".join(sorted(known for known, _ in TRACKER_REGISTRY))
            raise ConfigError(
                f"TRACKERS has {name!r}; registered are {known}. A module of yours that registers "
                "a tracker is imported with --import MODULE."
            )
        package = TRACKER_REGISTRY.get(name).package
        if package and not _is_installed(package):
            raise ConfigError(
                f"TRACKERS has '{name}', whose package '{package}' is not installed: \"pip install "
                "'semask[trackers]'\" installs it. Or leave it out of TRACKERS."
            )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it would be in
        return False


def tracked_run(cfg: CfgNode, tracker: type[Tracker]) -> TrackedRun:
    """What ``tracker`` is told of the run of a config."""
    folder = os.path.abspath(cfg.OUTPUT_DIR)
    return TrackedRun(
        project=cfg.TRACKING.PROJECT or os.environ.get(tracker.project_variable) or DEFAULT_PROJECT,
        name=cfg.TRACKING.RUN_NAME
        or os.environ.get(tracker.name_variable)
        or os.path.basename(folder),
        folder=folder,
        config=yaml.safe_load(cfg.dump()),
    )


def start_tracker(tracker: Tracker, run: TrackedRun, run_id: str | None) -> str:
    """``tracker.start``, with one sentence for whatever it raises.

    Raises:
        ConfigError: the tracker cannot begin the run, for instance without a login or network.
    """
    try:
        return tracker.start(run, run_id)
    except Exception as error:  # each package has its own
        raise ConfigError(
            f"TRACKERS: '{tracker.name}' cannot record this run: {one_line(error).rstrip('.')}. "
            "Correct its settings, or leave it out of TRACKERS."
        ) from error
