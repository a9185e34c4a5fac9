"""The number of data loading workers, without a warning of PyTorch."""

import logging
import warnings
from pathlib import Path

import pytest
from detectron2.utils import comm

import tiny
from semask.config.loading import load_config
from semask.data import training_loader
from semask.data.training_loader import loading_processes
from semask.engine import Trainer


@pytest.mark.parametrize(
    ("wanted", "cores", "processes", "number"),
    [(4, 8, 1, 4), (4, 2, 1, 2), (4, 8, 4, 2), (4, 2, 8, 1), (1, 1, 1, 1), (0, 1, 2, 0)],
)
def test_no_more_than_there_are_cores_for(
    monkeypatch: pytest.MonkeyPatch, wanted: int, cores: int, processes: int, number: int
) -> None:
    monkeypatch.setattr(training_loader, "usable_cores", lambda: cores)
    monkeypatch.setattr(comm, "get_local_size", lambda: processes)
    assert loading_processes(wanted) == number


def test_where_nobody_knows_who_shares_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> int:
        raise AssertionError

    monkeypatch.setattr(training_loader, "usable_cores", lambda: 6)
    monkeypatch.setattr(comm, "get_local_size", unknown)
    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    assert loading_processes(4) == 2


def test_one_line_and_no_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with tiny.datasets(tmp_path), warnings.catch_warnings():
        warnings.simplefilter("error")
        options = ["MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "67"]
        cfg = load_config(tiny.write_config(tmp_path / "config.yaml"), options)
        monkeypatch.setattr(training_loader, "usable_cores", lambda: 1)
        for _ in range(2):
            batches = iter(Trainer.build_train_loader(cfg))
            assert len(next(batches)) == 2
            assert len(list(Trainer.build_test_loader(cfg, "tiny_val"))) == 2
    assert caplog.text.count("Images are loaded by 1 process instead of 67") == 1
