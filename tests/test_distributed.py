"""Several processes: their start, and equality with a training in one process."""

import argparse
import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import train_net
from detectron2.modeling import build_model
from detectron2.utils import comm
from torch import nn
from torch.multiprocessing.spawn import ProcessExitedException

import faults
import runs
import tiny
from semask.cli import train
from semask.config.loading import load_config
from semask.engine import (
    Torchrun,
    is_lost_peer,
    joined,
    once_per_machine,
    resolve_device,
    wrap_ddp,
)
from semask.engine.batch_norm import CpuSyncBatchNorm2d, synchronize_batch_norm
from semask.engine.launch.distributed import create_local_group
from semask.engine.launch.ending import EXIT_STATUS, Preempted
from semask.engine.train_step import TrainStep
from semask.errors import ConfigError
from tiny_runs import Batches, TinyRuns


def statuses(processes: list[runs.Run]) -> list[int]:
    with runs.ended(processes):
        return [process.status() for process in processes]


# ---- two processes with an image each equal one process with both ----


def samples() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "file_name": f"{index}.png",
            "image": torch.rand(3, 32, 32, generator=generator, dtype=torch.float64) * 255,
            "sem_seg": torch.randint(0, 3, (32, 32), generator=generator),
        }
        for index in range(4)
    ]


def trained(config: str, accumulate_steps: int = 1) -> dict[str, Any]:
    """Train two steps on this process's share of the images; the resulting state of the model."""
    from detectron2.utils.events import EventStorage

    cfg = load_config(config, ["MODEL.DEVICE", "cpu"])
    torch.manual_seed(comm.get_rank())  # the weights are those of the first process
    model = wrap_ddp(synchronize_batch_norm(build_model(cfg).double()))
    norms = [m for m in model.modules() if isinstance(m, CpuSyncBatchNorm2d)]
    assert len(norms) == 2
    if accumulate_steps > 1:
        model.train()
        for norm in norms:
            norm.eval()
    size, rank = comm.get_world_size(), comm.get_rank()
    parts = [samples()[i :: size * accumulate_steps] for i in range(size * accumulate_steps)]
    own = [parts[part * size + rank] for part in range(accumulate_steps)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = TrainStep(
        model,
        Batches(own * 2),  # type: ignore[arg-type]
        optimizer,
        accumulate_steps=accumulate_steps,
    )
    if accumulate_steps > 1:
        for norm in norms:
            norm.eval()
    with EventStorage() as storage:
        for step.iter in range(2):
            step.run_step()
        losses = {name: value for name, (value, _) in storage.latest().items() if "loss" in name}
    module = model.module if size > 1 else model
    assert isinstance(module, nn.Module)
    return {
        "losses": losses,
        "gradients": {name: p.grad for name, p in module.named_parameters()},
        "state": dict(module.state_dict()),
    }


def every_way(config: str) -> dict[Any, Any]:
    create_local_group(2)
    names = {
        "local rank": comm.get_local_rank(),
        "local size": comm.get_local_size(),
        "refused": "",
    }
    try:
        create_local_group(2 + comm.get_rank())
    except ConfigError as error:
        names["refused"] = str(error)
    called: list[int] = []
    vars(comm)["create_local_process_group"] = called.append  # that of Detectron2's main branch
    create_local_group(1)
    return {1: trained(config), 2: trained(config, 2), "names": names, "called": called}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("config")
    off = {"SWIN": {"DROP_PATH_RATE": 0.0}, "SEMASK": {"DROPOUT": 0.0}}
    head = {"SEM_SEG_HEAD": {"DROPOUT": 0.0, "NORM": "SyncBN"}}
    return tiny.write_config(folder / "config.yaml", MODEL={**off, **head})


@pytest.fixture(scope="module")
def of_two(config: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return runs.together(every_way, config, folder=tmp_path_factory.mktemp("two") / "group")


@pytest.mark.parametrize("parts", [1, 2])
def test_two_processes_equal_one(config: str, of_two: list[dict[Any, Any]], parts: int) -> None:
    expected = trained(config, parts)
    for name in ("gradients", "state"):
        for found in of_two:
            torch.testing.assert_close(found[parts][name], expected[name], rtol=1e-8, atol=1e-10)
    assert of_two[0][parts]["losses"] == pytest.approx(expected["losses"], rel=1e-10)
    assert of_two[1][parts]["losses"] == {}  # the main process writes them


def test_processes_know_their_place_on_the_machine(of_two: list[dict[Any, Any]]) -> None:
    for rank, found in enumerate(of_two):
        assert found["names"]["local rank"] == rank
        assert found["names"]["local size"] == 2
        assert "All machines must run the same number of processes" in found["names"]["refused"]
        assert found["called"] == [1]


# ---- whole runs ----


@pytest.fixture(scope="module")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory) -> TinyRuns:
    options = ("SOLVER.MAX_ITER", 4, "TEST.NUM_PANELS", 0, "TEST.REPORT", False)
    return TinyRuns(tmp_path_factory.mktemp("runs"), *options)


@pytest.mark.slow
def test_the_schedule_follows_the_number_of_processes(tiny_runs: TinyRuns) -> None:
    printed = tiny_runs.run("scaled", "SOLVER.REFERENCE_WORLD_SIZE", 1, size=2)
    assert re.search(r": 4 images.*\b2 process.* 2 images.* 1 acc", printed)
    lines = (tiny_runs.folder / "scaled" / "metrics.json").read_text().splitlines()
    steps = [json.loads(line) for line in lines if "total_loss" in line]
    assert steps[-1]["iteration"] == 1  # half the iterations, at twice the learning rate
    assert steps[-1]["lr"] == pytest.approx(0.02 * (1 - 1 / 2))
    saved = tiny_runs.checkpoint("scaled")["trainer"]["_trainer"]["data"]
    assert saved["position"] == 8  # as many images as ever
    assert "TypedStorage" not in printed  # a warning about a call of Detectron2 v0.6's own


@pytest.mark.slow
def test_accumulation_and_mixed_precision_in_two_processes(tiny_runs: TinyRuns) -> None:
    printed = tiny_runs.run(
        *("mixed", "SOLVER.IMS_PER_BATCH", 8, "SOLVER.ACCUMULATE_STEPS", 2),
        *("SOLVER.AMP.ENABLED", True, "SEED", -1, "MODEL.SEM_SEG_HEAD.NORM", "SyncBN"),
        size=2,
    )
    assert re.search(r": 8 images.*\b2 process.* 2 images.* 2 acc", printed)
    assert tiny_runs.checkpoint("mixed")["trainer"]["_trainer"]["data"]["position"] == 32


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_both(tiny_runs: TinyRuns) -> None:
    processes = tiny_runs.start(
        *("nan", "SOLVER.CHECKPOINT_PERIOD", 1),
        size=2,
        fault=faults.nan_at,
        fault_arguments=(1, 2),
    )
    assert statuses(processes) == [1, 1]
    report = json.loads((tiny_runs.folder / "nan" / "nonfinite_batch.json").read_text())
    assert report["iteration"] == 2
    (batch,) = report["batches"]
    assert batch["process"] == 1
    for process in processes:
        message = process.output().strip().splitlines()[-1]
        assert "NonFiniteLossError: The loss is not finite at iteration 2" in message
        assert batch["files"][0] in message
    assert (tiny_runs.folder / "nan" / "last_checkpoint").read_text() == "model_0000001.pth"


@pytest.mark.slow
def test_evaluation_in_two_processes_and_a_mistake_found_by_one(tiny_runs: TinyRuns) -> None:
    tiny_runs.run("trained")
    weights = tiny_runs.folder / "trained" / "model_final.pth"

    def results(output: str) -> Any:
        path = tiny_runs.folder / output / "inference/tiny_val/sem_seg_evaluation.json"
        return json.loads(path.read_text())["results"]

    tiny_runs.run("evaluated", "--eval-only", "MODEL.WEIGHTS", weights, size=2)
    assert results("evaluated") == results("trained")

    processes = tiny_runs.start("wrong", "SOLVER.IMS_PER_BATCH", 3, size=2)
    assert statuses(processes) == [2, 2]
    assert "which 2 processes cannot share equally" in processes[0].output()
    assert "ConfigError" not in processes[1].output()  # said once
    assert not (tiny_runs.folder / "wrong").exists()


# ---- starting ----


def cuda_config(device: str = "cuda") -> Any:
    cfg = load_config()
    cfg.MODEL.DEVICE = device
    return cfg


@pytest.mark.parametrize(
    ("device", "explicit", "processes", "found", "result"),
    [
        ("cuda", False, 2, 0, "cpu"),
        ("cuda", False, 2, 2, "cuda"),
        ("cuda", False, 1, 4, "cuda"),
        ("cpu", True, 16, 2, "cpu"),
        ("cuda:1", True, 1, 2, "cuda:1"),
    ],
)
def test_device_under_torchrun(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    explicit: bool,
    processes: int,
    found: int,
    result: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    cfg = cuda_config(device)
    resolve_device(cfg, 1, explicit=explicit, torchrun=Torchrun(0, processes, 0, processes))
    assert result == cfg.MODEL.DEVICE


@pytest.mark.parametrize(
    ("device", "num_gpus", "processes", "found", "message"),
    [
        ("cuda", 1, 4, 2, "started 4 processes on this machine, which has 2 CUDA device"),
        ("cuda", 1, 2, 0, "started 2 processes on this machine, which has 0 CUDA device"),
        ("cuda:0", 1, 2, 2, "set it to 'cuda'"),
        ("cuda", 2, 2, 2, "torchrun has started the processes already: leave --num-gpus"),
    ],
)
def test_what_cannot_work_under_torchrun(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    num_gpus: int,
    processes: int,
    found: int,
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    torchrun = Torchrun(0, processes, 0, processes)
    with pytest.raises(ConfigError, match=message):
        resolve_device(cuda_config(device), num_gpus, explicit=True, torchrun=torchrun)


def test_torchrun_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Torchrun.from_environment() is None
    for name, value in runs.torchrun_environment(1, 2, 1234, restarts=3).items():
        monkeypatch.setenv(name, value)
    assert Torchrun.from_environment() == Torchrun(1, 2, 1, 2, 3)
    monkeypatch.delenv("LOCAL_RANK")
    assert Torchrun.from_environment() is None


def test_alone_there_is_nothing_to_join() -> None:
    with joined(None, "cpu"):
        assert comm.get_world_size() == 1
    done: list[int] = []
    once_per_machine(lambda: done.append(1), None)
    assert done == [1]
    assert not is_lost_peer(RuntimeError("gloo: Connection closed by peer"))


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (ProcessExitedException("said why", error_index=0, error_pid=1, exit_code=143), 143),
        (
            ProcessExitedException(
                "killed", error_index=0, error_pid=1, exit_code=-9, signal_name="SIGKILL"
            ),
            1,
        ),
        (Preempted(), EXIT_STATUS),
    ],
)
def test_exit_status_of_the_processes_of_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, status: int
) -> None:
    def launch(*_arguments: Any, **_options: Any) -> None:
        raise failure

    def check(_cfg: Any, args: argparse.Namespace, _torchrun: Any) -> None:
        assert args.num_gpus == 1

    monkeypatch.setattr(train, "launch", launch)
    monkeypatch.setattr(train, "check", check)
    path = tiny.write_config(tmp_path / "config.yaml")
    assert train_net.run(["--config-file", path, "MODEL.DEVICE", "cpu"]) == status
    assert int(signal.SIGTERM) + 128 == EXIT_STATUS
