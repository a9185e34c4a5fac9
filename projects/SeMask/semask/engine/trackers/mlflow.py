"""MLflow, through the client in both packages ``mlflow`` and ``mlflow-skinny``."""

import importlib.util
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from semask.engine.trackers.base import TRACKER_REGISTRY, TrackedRun, Tracker

# Limits of one request to a server.
_METRICS_AT_ONCE, _PARAMS_AT_ONCE, _PARAM_LENGTH, _NAME_LENGTH = 1000, 100, 500, 250

Item = TypeVar("Item")


@TRACKER_REGISTRY.register()
class MLflowTracker(Tracker):
    """A run in MLflow, at the URI of ``mlflow.set_tracking_uri`` or MLFLOW_TRACKING_URI.

    Without either, MLflow's default is used, the database mlflow.db in the current folder. The
    package mlflow-skinny has no databases, and uses the folder mlruns.
    """

    name = "mlflow"
    package = "mlflow"
    project_variable = "MLFLOW_EXPERIMENT_NAME"

    def start(self, run: TrackedRun, run_id: str | None) -> str:
        import mlflow  # optional dependency
        from mlflow.entities import Metric, Param

        self._uri = uri = _tracking_uri(mlflow)
        if ":/" not in uri or uri.startswith("file:"):
            # MLflow requires this variable for runs in a folder, as it recommends a database.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._metric, self._param = Metric, Param
        self._client = mlflow.MlflowClient(uri)
        if run_id is None:
            experiment = self._experiment(run.project)
            self._id = self._client.create_run(experiment, run_name=run.name).info.run_id
            self._log_params(run.config)
        else:
            self._id = self._client.get_run(run_id).info.run_id
            self._client.update_run(self._id, status="RUNNING")
        self._client.log_artifact(self._id, os.path.join(run.folder, "config.yaml"))
        return self._id

    def place(self) -> str:
        """The server, folder or database."""
        return self._uri

    def log(
        self, step: int, scalars: Mapping[str, float], images: Mapping[str, np.ndarray]
    ) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(_valid(name), value, now, step) for name, value in scalars.items()]
        for part in _parts(metrics, _METRICS_AT_ONCE):
            self._client.log_batch(self._id, metrics=part)
        for name, image in images.items():
            key = _valid(name, re.ASCII)
            self._client.log_image(self._id, image, key=key, step=step, synchronous=True)

    def finish(self, complete: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if complete else "KILLED")

    def _experiment(self, name: str) -> str:
        """The id of the experiment, which another run may be creating at the same time."""
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return self._client.create_experiment(name)
            except Exception:
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return found.experiment_id

    def _log_params(self, config: Mapping[str, Any]) -> None:
        params = [
            self._param(_valid(key), str(value)[:_PARAM_LENGTH]) for key, value in _flat(config)
        ]
        for part in _parts(params, _PARAMS_AT_ONCE):
            self._client.log_batch(self._id, params=part)


def _tracking_uri(mlflow: Any) -> str:
    has_databases = all(map(importlib.util.find_spec, ("sqlalchemy", "alembic")))
    if mlflow.is_tracking_uri_set() or has_databases:
        return mlflow.get_tracking_uri()
    return Path("mlruns").absolute().as_uri()


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The keys of a config with their values, such as ("SOLVER.BASE_LR", 0.01)."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _valid(name: str, letters: re.RegexFlag = re.UNICODE) -> str:
    """A name that MLflow accepts, also as a file; class names can have any character.

    Args:
        name: any.
        letters: ``re.ASCII`` for images, whose names can only have ASCII letters in MLflow.
    """
    name = re.sub(r"[^\w\-. /]", "_", name[:_NAME_LENGTH], flags=letters)
    # No empty path components, no "." and "..".
    return re.sub(r"/{2,}|^/|/$|(?<![^/])\.+(?![^/])", "_", name)


def _parts(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
