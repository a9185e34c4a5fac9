"""The tracker interface: a service or program that records experiments in addition to OUTPUT_DIR.

``TRACKERS`` names entries of ``TRACKER_REGISTRY``. To add one, derive a class from ``Tracker`` in a
module that is passed to ``--import``:

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
    """The description of a run for a tracker.

    Attributes:
        project: of the tracker (MLflow: experiment) that the run belongs to.
        name: display name of the run.
        folder: OUTPUT_DIR, as an absolute path; ``config.yaml`` is in it.
        config: the complete config, as nested dicts of plain values.
    """

    project: str
    name: str
    folder: str
    config: dict[str, Any]


class Tracker(ABC):
    """One run in a tracker. Exceptions of its methods do not end a training.

    ``start`` is called in the main thread, ``log`` and ``finish`` sequentially in another thread,
    so that the training never waits for a network.

    Attributes:
        name: the entry of ``TRACKERS``.
        package: the optional module, imported only within methods. "" = none.
        project_variable: environment variable of the tracker for the project, or "".
        name_variable: environment variable of the tracker for the run's name, or "".
    """

    name: ClassVar[str]
    package: ClassVar[str]
    project_variable: ClassVar[str] = ""
    name_variable: ClassVar[str] = ""

    @abstractmethod
    def start(self, run: TrackedRun, run_id: str | None) -> str:
        """Start or resume a run, and record the config.

        Args:
            run: the run to record.
            run_id: the id of the run to resume; None for a new run.

        Returns:
            The id of the run.
        """

    def place(self) -> str:
        """Where the started run is recorded: an address or a folder; "" = not known."""
        return ""

    @abstractmethod
    def log(
        self, step: int, scalars: Mapping[str, float], images: Mapping[str, np.ndarray]
    ) -> None:
        """Record new scalars and images.

        Args:
            step: iteration of the training, from 0. After a resumption, steps can repeat.
            scalars: by name, such as "sem_seg/mIoU"; possibly not finite, possibly empty.
            images: by name, (height, width, 3) uint8, RGB; possibly empty.
        """

    @abstractmethod
    def finish(self, complete: bool) -> None:
        """Write everything pending and end the run.

        Args:
            complete: the training is complete; otherwise it can be resumed.
        """


AnyTracker = TypeVar("AnyTracker", bound=type[Tracker])


class TrackerRegistry(Registry):
    """The registry of trackers, by their ``name``."""

    def register(self, obj: Any = None) -> Any:
        """A decorator that registers a subclass of ``Tracker``."""

        def enter(tracker: AnyTracker) -> AnyTracker:
            self._do_register(tracker.name, tracker)
            return tracker

        return enter if obj is None else enter(obj)


TRACKER_REGISTRY = TrackerRegistry("TRACKER")


def check_trackers(cfg: CfgNode) -> None:
    """Check the entries of ``TRACKERS``.

    Raises:
        ConfigError: an entry is not registered, or its package is not installed.
    """
    for name in cfg.TRACKERS:
        if not isinstance(name, str) or name not in TRACKER_REGISTRY:
            known = ", ".join(sorted(known for known, _ in TRACKER_REGISTRY))
            raise ConfigError(
                f"TRACKERS has {name!r}; registered are {known}. Import a module that registers "
                "your own tracker with --import MODULE."
            )
        package = TRACKER_REGISTRY.get(name).package
        if package and not _is_installed(package):
            raise ConfigError(
                f"TRACKERS has '{name}', but its package '{package}' is not installed: install it "
                "with \"pip install 'semask[trackers]'\", or remove it from TRACKERS."
            )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of its parent package
        return False


def tracked_run(cfg: CfgNode, tracker: type[Tracker]) -> TrackedRun:
    """The description for ``tracker`` of the run of a config."""
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
    """Call ``tracker.start``, and convert any exception to a ``ConfigError``.

    Raises:
        ConfigError: the tracker cannot start the run, for instance without a login or network.
    """
    try:
        return tracker.start(run, run_id)
    except Exception as error:  # each package has its own exceptions
        raise ConfigError(
            f"TRACKERS: '{tracker.name}' cannot record this run: {one_line(error).rstrip('.')}. "
            "Correct its settings, or remove it from TRACKERS."
        ) from error
