"""The device of a process, and the variables that torchrun sets."""

import os
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode

from semask.errors import ConfigError


@dataclass(frozen=True)
class Torchrun:
    """The variables that torchrun sets for a process it starts.

    Attributes:
        rank, world_size: number of the process, and of all processes of the run.
        local_rank, local_world_size: the same among those of this machine.
        restarts: how often torchrun has restarted the processes.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    restarts: int = 0

    @classmethod
    def from_environment(cls) -> "Torchrun | None":
        """Read the variables; None if they are not set."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        if not all(name in os.environ for name in (*names, "MASTER_ADDR", "MASTER_PORT")):
            return None
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return cls(*(int(value) for value in (*(os.environ[name] for name in names), restarts)))


def resolve_device(
    cfg: CfgNode, num_gpus: int, *, explicit: bool, torchrun: Torchrun | None = None
) -> None:
    """Set ``MODEL.DEVICE`` to "cpu" if there is no GPU, and check the device.

    Args:
        cfg: not frozen; ``MODEL.DEVICE`` is changed in place.
        num_gpus: requested on this machine; 0 means the CPU.
        explicit: the user has set this device, so it does not fall back.
        torchrun: its variables, if it has started this process; it then determines the processes.

    Raises:
        ConfigError: the device or that number of GPUs does not exist, or the two are inconsistent.
    """
    try:
        device = torch.device(cfg.MODEL.DEVICE)
    except RuntimeError as error:
        raise ConfigError(
            f"MODEL.DEVICE '{cfg.MODEL.DEVICE}' is not a PyTorch device; set it to 'cuda' or 'cpu'."
        ) from error
    found = torch.cuda.device_count()
    if num_gpus < 0:
        raise ConfigError(f"--num-gpus is {num_gpus}; it must be 0 or more.")
    if torchrun is not None:
        _check_torchrun(cfg, torchrun, num_gpus, found, explicit)
        return
    if num_gpus > 1 and device.type == "cpu":
        raise ConfigError(
            f"--num-gpus {num_gpus} starts processes on GPUs, but MODEL.DEVICE is 'cpu'. To train "
            f"in {num_gpus} processes on the CPU, start them with torchrun: torchrun "
            f"--nproc-per-node {num_gpus} -m semask train ..., without --num-gpus."
        )
    if num_gpus > max(1, found):
        raise ConfigError(f"--num-gpus is {num_gpus}, but this machine has {found} CUDA device(s).")
    if device.type == "cuda" and not explicit and (num_gpus == 0 or found == 0):
        cfg.MODEL.DEVICE = "cpu"
    elif device.type == "cuda" and (device.index or 0) >= found:
        raise ConfigError(
            f"MODEL.DEVICE is '{device}', but PyTorch finds {found} CUDA device(s). Leave "
            "MODEL.DEVICE out to run on the CPU if there is no GPU."
        )
    if num_gpus > 1 and (device.type != "cuda" or device.index is not None):
        raise ConfigError(
            f"--num-gpus {num_gpus} assigns one GPU to each process, but MODEL.DEVICE is "
            f"'{device}'; set it to 'cuda'."
        )


def _check_torchrun(
    cfg: CfgNode, torchrun: Torchrun, num_gpus: int, found: int, explicit: bool
) -> None:
    """As ``resolve_device``, for a process started by torchrun."""
    processes = torchrun.local_world_size
    device = torch.device(cfg.MODEL.DEVICE)
    if num_gpus > 1:
        raise ConfigError(
            "torchrun has started the processes already: leave --num-gpus, --num-machines, "
            "--machine-rank and --dist-url out."
        )
    if device.type != "cuda":
        return
    if not explicit and (num_gpus == 0 or found == 0):
        cfg.MODEL.DEVICE = "cpu"
    elif device.index is not None and processes > 1:
        raise ConfigError(
            f"torchrun assigns one GPU to each of its {processes} processes, but MODEL.DEVICE "
            f"is '{device}'; set it to 'cuda'."
        )
    elif processes > found:
        raise ConfigError(
            f"torchrun has started {processes} processes on this machine, which has {found} CUDA "
            f"device(s): use --nproc-per-node {max(1, found)}, or MODEL.DEVICE cpu."
        )
