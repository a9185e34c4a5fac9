"""Weights & Biases."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from semask.engine.trackers.base import TRACKER_REGISTRY, TrackedRun, Tracker

# Not wandb's own step, which must not decrease: a resumed run goes back to its checkpoint.
_STEP = "iteration"


@TRACKER_REGISTRY.register()
class WandbTracker(Tracker):
    """A run in Weights & Biases; its environment variables (WANDB_MODE, WANDB_ENTITY, ...) apply.

    Its files are in OUTPUT_DIR/wandb, or in WANDB_DIR.
    """

    name = "wandb"
    package = "wandb"
    project_variable = "WANDB_PROJECT"
    name_variable = "WANDB_NAME"

    def start(self, run: TrackedRun, run_id: str | None) -> str:
        import wandb  # optional dependency

        self._image = wandb.Image
        self._run: Any = wandb.init(
            project=run.project,
            name=run.name,
            id=run_id,
            resume="allow" if run_id else None,
            dir=os.environ.get("WANDB_DIR") or run.folder,
            config=run.config,
            # A resumed run may have another device or number of processes.
            allow_val_change=True,
        )
        self._run.define_metric("*", step_metric=_STEP)
        return self._run.id

    def place(self) -> str:
        """Its page; offline, its folder, which ``wandb sync`` uploads."""
        run = self._run
        return os.path.dirname(run.dir) if run.offline else run.url

    def log(
        self, step: int, scalars: Mapping[str, float], images: Mapping[str, np.ndarray]
    ) -> None:
        pictures = {name: self._image(image) for name, image in images.items()}
        self._run.log({**scalars, **pictures, _STEP: step})

    def finish(self, complete: bool) -> None:
        self._run.finish(exit_code=0 if complete else 1)
