"""trackio, which stores runs in a local folder or in a Space of the Hugging Face Hub."""

import os
import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np

from semask.engine.trackers.base import TRACKER_REGISTRY, TrackedRun, Tracker

# "time" is reserved by trackio.
_NAMES = {"time": "iteration_time"}


@TRACKER_REGISTRY.register()
class TrackioTracker(Tracker):
    """A run in trackio; its environment variables (TRACKIO_DIR, TRACKIO_SPACE_ID, ...) apply."""

    name = "trackio"
    package = "trackio"

    def start(self, run: TrackedRun, run_id: str | None) -> str:
        import trackio  # optional dependency

        self._image = trackio.Image
        # A run is resumed by its name, so the name must be unique.
        name = run_id or f"{run.name}-{uuid.uuid4().hex[:6]}"
        self._run: Any = trackio.init(
            project=run.project,
            name=name,
            config=run.config,
            resume="allow" if run_id else "never",
            embed=False,
        )
        trackio.context_vars.current_run.set(None)  # otherwise trackio finishes it again at exit
        return self._run.name

    def place(self) -> str:
        """The Space, or the folder of all runs of this computer."""
        from trackio.utils import TRACKIO_DIR

        return os.environ.get("TRACKIO_SPACE_ID") or str(TRACKIO_DIR)

    def log(
        self, step: int, scalars: Mapping[str, float], images: Mapping[str, np.ndarray]
    ) -> None:
        pictures = {name: self._image(image) for name, image in images.items()}
        renamed = {_NAMES.get(name, name): value for name, value in scalars.items()}
        self._run.log({**renamed, **pictures}, step=step)

    def finish(self, complete: bool) -> None:
        self._run.finish()
