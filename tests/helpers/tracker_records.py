"""Read back the records of trackers from their files, a function for each tracker."""

import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Records:
    """Of one run.

    Attributes:
        scalars: each value by step and name.
        images: step and name of each image.
        base_lr: ``SOLVER.BASE_LR`` of the recorded config, as text.
        name: of the run.
    """

    scalars: dict[tuple[int, str], float] = field(default_factory=dict)
    images: set[tuple[int, str]] = field(default_factory=set)
    base_lr: str = ""
    name: str = ""


def of_mlflow(project: str, run_id: str, _folder: Path) -> Records:
    """From the store of MLFLOW_TRACKING_URI; the run has to be the only one of its experiment."""
    import mlflow

    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # as the tracker in the training's process
    client = mlflow.MlflowClient()
    experiment: Any = client.get_experiment_by_name(project)
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_id, run.info.status) == (run_id, "FINISHED")
    assert "config.yaml" in {entry.path for entry in client.list_artifacts(run_id)}
    records = Records(base_lr=run.data.params["SOLVER.BASE_LR"], name=run.info.run_name)
    for name in run.data.metrics:
        for metric in client.get_metric_history(run_id, name):
            records.scalars[metric.step, name] = metric.value
    for entry in client.list_artifacts(run_id, "images"):
        name, _, step, *_rest = Path(entry.path).name.split("+")
        records.images.add((int(step), name))
    return records


def of_trackio(project: str, run_id: str, _folder: Path) -> Records:
    """From TRACKIO_DIR, as of the first import of trackio."""
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    run: Any
    (run,) = trackio.Api().runs(project)
    assert run.name == run_id
    records = Records(base_lr=str(run.config["SOLVER"]["BASE_LR"]), name=run.name[:-7])
    for entry in SQLiteStorage.get_logs(project, run.name):
        for name, value in entry.items():
            if isinstance(value, dict):
                records.images.add((entry["step"], name))
            elif name not in ("step", "timestamp"):
                records.scalars[entry["step"], {"iteration_time": "time"}.get(name, name)] = value
    return records


def of_wandb(project: str, run_id: str, folder: Path) -> Records:
    """From the files of offline runs: one for each start of the training, all with one id."""
    from wandb.proto import wandb_internal_pb2

    log: Any = wandb_internal_pb2
    records = Records()
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert {file.name for file in files} == {f"run-{run_id}.wandb"}
    for file in files:
        for data in _log_entries(file.read_bytes()):
            record = log.Record.FromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                assert record.run.project == project
                records.name = record.run.display_name
                config = {
                    item.key: json.loads(item.value_json) for item in record.run.config.update
                }
                records.base_lr = str(config["SOLVER"]["BASE_LR"])
            elif kind == "history":
                items = {
                    (item.key, *item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
                step = items.pop(("", "iteration"))
                for (_, name, *parts), value in items.items():
                    if parts:
                        records.images.add((step, name))
                    elif not name.startswith("_"):
                        records.scalars[step, name] = value
    return records


def _log_entries(data: bytes) -> Iterator[bytes]:
    """The entries of a log in LevelDB's format, behind the seven bytes of wandb's own header."""
    block, header = 32768, struct.Struct("<IHB")
    position, entry = header.size, b""
    while position + header.size <= len(data):
        if block - position % block < header.size:  # padding
            position += block - position % block
            continue
        _checksum, length, kind = header.unpack_from(data, position)
        position += header.size
        entry += data[position : position + length]
        position += length
        if kind in (1, 4):  # whole, or the last part
            yield entry
            entry = b""


READERS: dict[str, Callable[[str, str, Path], Records]] = {
    "mlflow": of_mlflow,
    "trackio": of_trackio,
    "wandb": of_wandb,
}
