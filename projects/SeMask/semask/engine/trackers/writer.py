"""A Detectron2 ``EventWriter`` for a tracker; a training neither waits for it nor fails with it."""

import contextlib
import json
import logging
import os
import queue
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage, EventWriter, get_event_storage

from semask.engine.trackers.base import (
    TRACKER_REGISTRY,
    TrackedRun,
    Tracker,
    check_trackers,
    start_tracker,
    tracked_run,
)
from semask.errors import ConfigError
from semask.utils.files import read_json, replacing
from semask.utils.text import one_line, pluralize

logger = logging.getLogger(__name__)

# File in OUTPUT_DIR with the id of the run in each tracker, for --resume.
IDS_FILE = "trackers.json"

# Maximum number of records that wait for a tracker; later ones are left out.
_MAX_WAITING = 1000


@dataclass
class _Record:
    """The new scalars and images of an iteration."""

    scalars: dict[str, float] = field(default_factory=dict)
    images: dict[str, np.ndarray] = field(default_factory=dict)


class TrackerWriter(EventWriter):
    """Sends scalars and images of Detectron2's ``EventStorage`` to a tracker, in its own thread.

    Records that the tracker rejects are left out, with a warning for the first one and their number
    at the end; metrics.json and TensorBoard's files have all of them.

    In a list of writers it must come before ``TensorboardXWriter``, which removes the images from
    the storage.
    """

    def __init__(
        self, tracker: Tracker, run: TrackedRun, *, max_iter: int, window_size: int = 20
    ) -> None:
        """
        Args:
            tracker: not yet started.
            run: the description of the run.
            max_iter: iterations of a complete training.
            window_size: of the median filter for noisy scalars, in iterations.
        """
        self._tracker = tracker
        self._run = run
        self._max_iter = max_iter
        self._window_size = window_size
        self._last_write = -1
        self._records: queue.SimpleQueue[tuple[int, _Record] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._running = False
        self._complete = False
        self._left_out = 0

    @property
    def name(self) -> str:
        """The tracker's name."""
        return self._tracker.name

    def start(self, run_id: str | None = None) -> str:
        """Start the run in the tracker, before the first :meth:`write`.

        Args:
            run_id: the id of the run to resume.

        Returns:
            The id of the run.

        Raises:
            ConfigError: the tracker cannot record the run; all records are then left out.
        """
        run_id = start_tracker(self._tracker, self._run, run_id)
        self._thread = threading.Thread(target=self._send, name=f"tracker {self.name}", daemon=True)
        self._thread.start()
        self._running = True
        return run_id

    def place(self) -> str:
        """Where the started run is recorded, as the end of a sentence; "" = not known."""
        try:
            place = self._tracker.place()
        except Exception as error:  # each package has its own exceptions
            logger.warning("Tracker '%s' names no place: %s", self.name, one_line(error))
            return ""
        return f" in {place}" if place else ""

    def write(self) -> None:
        """Pass the new records of the current ``EventStorage`` to the tracker's thread."""
        new = self._collect(get_event_storage())
        if not self._running:
            return
        for step in sorted(new):
            if self._records.qsize() < _MAX_WAITING:
                self._records.put((step, new[step]))
            else:
                self._leave_out("it does not answer")

    def close(self) -> None:
        """End the run, without waiting: the last checkpoint may not be written yet."""
        if self._running:
            self._running = False
            self._complete = get_event_storage().iter >= self._max_iter
            self._records.put(None)

    def finish(self, timeout: float = 60.0) -> None:
        """Wait until the tracker has all records; also after a failure without :meth:`close`.

        Args:
            timeout: maximum waiting time in seconds.
        """
        if self._running:
            self._running = False
            self._records.put(None)
        if self._thread is None:
            return
        self._thread.join(timeout)
        if self._thread.is_alive():
            logger.warning("Tracker '%s' did not finish within %.0f s.", self.name, timeout)
        if self._left_out:
            logger.warning(
                "Tracker '%s' lacks %s, which metrics.json has.",
                self.name,
                pluralize(self._left_out, "record"),
            )

    def _collect(self, storage: EventStorage) -> dict[int, _Record]:
        """The new records by iteration; scalars as in TensorBoard and metrics.json."""
        new: dict[int, _Record] = defaultdict(_Record)
        last = self._last_write
        for name, (value, step) in storage.latest_with_smoothing_hint(self._window_size).items():
            if step > last:
                new[step].scalars[name] = value
                self._last_write = max(self._last_write, step)
        for name, image, step in storage._vis_data:  # also used by TensorboardXWriter
            if step > last:
                new[step].images[name] = _as_rgb(image)
        return new

    def _send(self) -> None:
        """The thread's function: send every record in order, then finish the run."""
        while (record := self._records.get()) is not None:
            step, new = record
            try:
                self._tracker.log(step, new.scalars, new.images)
            except Exception as error:  # each package has its own exceptions
                self._leave_out(one_line(error))
        try:
            self._tracker.finish(self._complete)
        except Exception as error:
            logger.warning("Tracker '%s' failed to finish: %s", self.name, one_line(error))

    def _leave_out(self, reason: str) -> None:
        if not self._left_out:
            logger.warning(
                "Tracker '%s' rejected a record; the training continues without it: %s",
                self.name,
                reason,
            )
        self._left_out += 1


def build_tracker_writers(cfg: CfgNode) -> list[TrackerWriter]:
    """The writers for ``TRACKERS``, not yet started; for the main process.

    Raises:
        ConfigError: as :func:`semask.engine.trackers.base.check_trackers`.
    """
    check_trackers(cfg)
    classes = [TRACKER_REGISTRY.get(name) for name in dict.fromkeys(cfg.TRACKERS)]
    return [
        TrackerWriter(tracker(), tracked_run(cfg, tracker), max_iter=cfg.SOLVER.MAX_ITER)
        for tracker in classes
    ]


@contextlib.contextmanager
def tracked(writers: Sequence[TrackerWriter], folder: str, *, resume: bool) -> Iterator[None]:
    """A context in which the trackers record the run; on exit they have all records.

    Args:
        writers: not yet started.
        folder: OUTPUT_DIR; exists.
        resume: resume the runs listed in its ``trackers.json``.

    Raises:
        ConfigError: a tracker cannot start a new run. If it cannot resume one, a warning is logged
            instead: a restarted run must not end because the network is down.
    """
    try:
        if writers:
            _start(writers, os.path.join(folder, IDS_FILE), resume)
        yield
    finally:
        for writer in writers:
            writer.finish()


def _start(writers: Sequence[TrackerWriter], path: str, resume: bool) -> None:
    ids = _read_ids(path) if resume else {}
    for writer in writers:
        try:
            ids[writer.name] = writer.start(ids.get(writer.name))
        except ConfigError as error:
            if writer.name not in ids:
                raise
            logger.warning("%s The training continues.", error)
        else:
            logger.info(
                "Tracker '%s' records this run as %s%s",
                writer.name,
                ids[writer.name],
                writer.place(),
            )
    with replacing(path) as file:
        file.write(json.dumps(ids, indent=1).encode())


def _read_ids(path: str) -> dict[str, str]:
    try:
        ids: Any = read_json(path)
    except FileNotFoundError:  # the run had no trackers
        return {}
    except (OSError, ValueError) as error:
        logger.warning("The trackers begin new runs: '%s': %s", path, one_line(error))
        return {}
    return ids if isinstance(ids, dict) else {}


def _as_rgb(image: Any) -> np.ndarray:
    """An image of ``EventStorage``, (3, height, width), as (height, width, 3) uint8."""
    array = torch.as_tensor(image).detach().cpu().numpy()
    if array.dtype != np.uint8:
        array = (array.clip(0, 1) * 255).round().astype(np.uint8)
    return np.ascontiguousarray(array.transpose(1, 2, 0))
