"""Experiment trackers (``TRACKERS``): the interface, the writer, and a file for each tracker."""

from semask.engine.trackers.base import (
    TRACKER_REGISTRY,
    TrackedRun,
    Tracker,
    check_trackers,
)
from semask.engine.trackers.mlflow import MLflowTracker
from semask.engine.trackers.trackio import TrackioTracker
from semask.engine.trackers.wandb import WandbTracker
from semask.engine.trackers.writer import TrackerWriter, build_tracker_writers, tracked

__all__ = [
    "TRACKER_REGISTRY",
    "MLflowTracker",
    "TrackedRun",
    "Tracker",
    "TrackerWriter",
    "TrackioTracker",
    "WandbTracker",
    "build_tracker_writers",
    "check_trackers",
    "tracked",
]
