"""``train_net.py`` on the tiny dataset, in processes of its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import runs
import tiny
from semask.data.unreadable import UnreadableFiles


class TinyRuns:
    """Runs of one config; each option is a key or a flag."""

    def __init__(self, folder: Path, *options: Any, images: int = 6) -> None:
        self.folder = folder
        self.records = tiny.write_images(folder / "images", images)
        self.config = tiny.write_config(folder / "config.yaml")
        self.options = ["MODEL.DEVICE", "cpu", *options]
        self._count = 0

    def start(
        self,
        output: str,
        *options: Any,
        size: int = 1,
        fault: Callable[..., None] | None = None,
        fault_arguments: tuple[Any, ...] = (),
        restarts: int = 0,
    ) -> list[runs.Run]:
        """Start the processes of a run, as torchrun does where there are several."""
        self._count += 1
        every = [str(option) for option in (*options, *self.options)]
        flags = [option for option in every if option.startswith("--")]
        keys = [option for option in every if not option.startswith("--")]
        folder = str(self.folder / output)
        argv = ["--config-file", self.config, *flags, *keys, "OUTPUT_DIR", folder]
        port = runs.free_port()
        return [
            runs.start(
                _train_net,
                *(argv, self.records, fault, (rank, *fault_arguments)),
                log=self.folder / f"{output}-{self._count}-{rank}.log",
                env=runs.torchrun_environment(rank, size, port, restarts) if size > 1 else {},
            )
            for rank in range(size)
        ]

    def run(self, output: str, *options: Any, **settings: Any) -> str:
        """A run that has to succeed; what it printed."""
        processes = self.start(output, *options, **settings)
        with runs.ended(processes):
            for process in processes:
                assert process.status() == 0, process.output()
        return processes[0].output()

    def checkpoint(self, output: str, name: str = "model_final") -> dict[str, Any]:
        return torch.load(self.folder / output / f"{name}.pth", weights_only=True)


def _train_net(
    argv: list[str],
    records: list[dict[str, Any]],
    fault: Callable[..., None] | None,
    fault_arguments: tuple[Any, ...],
) -> int:
    import train_net

    from semask.engine.launch import run_setup

    run_setup.collect_env_info = lambda: ""  # it calls other programs
    tiny.register("tiny_train", records[:-2])
    tiny.register("tiny_val", records[-2:])
    if fault is not None:
        fault(*fault_arguments)
    return train_net.run(argv)


def assert_same_state(first: Any, second: Any, where: str = "") -> None:
    """Two nested states are equal, tensors bit for bit."""
    assert type(first) is type(second), where
    if isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same_state(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), where
        for index, pair in enumerate(zip(first, second, strict=True)):
            assert_same_state(*pair, where=f"{where}[{index}]")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    else:
        assert first == second, where


class Batches:
    """In place of a training loader."""

    def __init__(self, batches: list[list[dict[str, Any]]]) -> None:
        self.seed = 0
        self.unreadable = UnreadableFiles(0)
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)
