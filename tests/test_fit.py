"""What fits into memory: the estimate against the allocator's own count, and the advice."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.memory import measured
from detectron2.config import CfgNode

import tiny
import train_command
from semask.cli.main import main
from semask.config import load_config
from semask.engine import Trainer
from semask.engine.fit import (
    Fit,
    device_memory,
    explained_out_of_memory,
    log_expected_memory,
)
from semask.engine.memory import LiveMemory, evaluation_memory, training_memory
from semask.errors import ConfigError, OutOfMemoryError
from semask.utils.host_memory import host_memory
from semask.utils.text import parse_size

GIB = 2**30
CHECKPOINTED = "MODEL.SWIN.ACTIVATION_CHECKPOINT=[True,True,True,True]"
SHALLOW = ("MODEL.SWIN.DEPTHS=[1,1,1,1]",)
CONFIGS = ("scenes/semask_scenes", "scenes/semask_mask2former")


def small(name: str, *overrides: Any) -> CfgNode:
    return load_config(name, ["MODEL.DEVICE=cpu", *overrides])


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        (CONFIGS[0], ()),
        (CONFIGS[0], ("MODEL.FAST_PATHS=none", "SOLVER.AMP.ENABLED=True")),
        (CONFIGS[1], ("MODEL.FAST_PATHS=none", CHECKPOINTED)),
    ],
)
def test_the_estimate_is_what_the_allocator_reports(name: str, overrides: tuple[str, ...]) -> None:
    cfg = small(name, *overrides)
    memory = training_memory(cfg, 2)
    assert memory.peak == pytest.approx(measured(cfg, 2)[0], rel=0.05)
    assert min(memory.weights, memory.optimizer, memory.activations, memory.transient) > 0
    assert memory.peak < training_memory(cfg, 4).peak


def test_detectors_are_run() -> None:
    cfg = small("nuclei/semask_mask_rcnn")
    memory = training_memory(cfg, 1, (64, 64))
    assert memory.peak > memory.weights + memory.optimizer > 2 * memory.weights > 0


def test_several_devices_hold_the_gradients_throughout() -> None:
    cfg = small(CONFIGS[0])
    one, several = (training_memory(cfg, 2, several_devices=each) for each in (False, True))
    assert (several.weights, several.optimizer) == (one.weights, one.optimizer)
    assert one.transient < several.transient <= one.transient + 1.1 * one.weights
    of_two = Fit(cfg, 8 * GIB, devices=2)
    assert of_two.memory((), 2) == several


@pytest.mark.parametrize(
    ("pair", "told"),
    [
        ("MODEL.SEM_SEG_HEAD.CONVS_DIM=40", "CONVS_DIM"),
        ("MODEL.MASK_FORMER.NHEADS=5", "NHEADS"),
        ("MODEL.BACKBONE.NAME=SeMaskSwan", "SeMaskSwan"),
    ],
)
def test_a_model_that_cannot_be_is_refused(pair: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        training_memory(small(CONFIGS[1], pair), 1)


def test_estimates_use_no_random_numbers() -> None:
    before = torch.get_rng_state()
    training_memory(small(CONFIGS[1]), 1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("protocol", ["whole", "multi_scale", "slide"])
def test_an_evaluation_needs_more_for_larger_images(protocol: str) -> None:
    cfg = small(CONFIGS[0], *SHALLOW, f"TEST.PROTOCOL={protocol}", "TEST.SLIDE_CROP=[64,64]")
    cfg.TEST.SLIDE_STRIDE = [64, 64]
    peaks = [evaluation_memory(cfg, (side, side)).peak for side in (64, 1024)]
    assert peaks[0] < peaks[1]


def test_memory_is_counted_until_it_is_freed() -> None:
    with LiveMemory() as live:
        first = torch.zeros(1000)
        view = first[10:]
        second = first + 1
        assert live.now == 8000
        del first
        assert live.now == 8000  # the view holds it
        del view
        assert (live.now, live.peak) == (4000, 8000)
        live.note([second, {"a": second}])
        assert live.now == 4000


def test_what_the_advice_says_fits() -> None:
    overrides = ("SOLVER.IMS_PER_BATCH=8", "MODEL.FAST_PATHS=none", *SHALLOW)
    cfg = small(CONFIGS[0], *overrides)
    whole, one = (training_memory(cfg, images).peak for images in (8, 1))
    fit = Fit(cfg, 0)
    fit.usable = (whole + one) // 2
    plans = fit.plans()
    assert plans[0].option == "as configured"
    assert plans[0].pairs == (f"SOLVER.ACCUMULATE_STEPS={plans[0].accumulate}",)
    for plan in plans:
        assert plan.images * plan.accumulate == 8
        changed = small(CONFIGS[0], *overrides, *plan.pairs)
        assert training_memory(changed, plan.images) == plan.memory
        assert plan.memory.peak <= fit.usable
        assert " ".join(plan.pairs) in fit.advice()
    fit.usable = whole
    assert fit.plans()[0].pairs == ()
    assert "fits unchanged" in fit.advice()
    fit.usable = 0
    assert fit.plans() == []
    assert "Not even one image" in fit.advice()


def test_images_that_devices_cannot_share() -> None:
    with pytest.raises(ConfigError, match=r"SOLVER\.IMS_PER_BATCH"):
        Fit(small(CONFIGS[0], "SOLVER.IMS_PER_BATCH=8"), GIB, devices=3)


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 * GIB), ("24g", 24 * GIB), ("1.5 GB", 1.5 * GIB), ("80", 80)]
)
def test_sizes(text: str, size: float) -> None:
    assert parse_size(text, "--memory") == size


@pytest.mark.parametrize("text", ["", "much", "-3GiB", "0", "3 PiB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="--memory"):
        parse_size(text, "--memory")


@pytest.mark.parametrize(("memory", "status"), [("24GiB", 0), ("1.5GiB", 1), ("?", 2)])
def test_the_command(memory: str, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    config = ["MODEL.DEVICE=cpu", "SOLVER.IMS_PER_BATCH=2", "MODEL.FAST_PATHS=none", *SHALLOW]
    assert main(["fit", CONFIGS[0], "--memory", memory, *config]) == status
    printed = capsys.readouterr()
    if status == 2:
        assert "--memory" in printed.err
        return
    assert re.search(r"\| as configured +\| \d+\.\d\d.* \| \d+\.\d\d", printed.out)
    assert "activation checkpointing" in printed.out
    assert "Evaluation of an image" in printed.out
    assert ("fits unchanged" in printed.out) == (status == 0)


@pytest.fixture
def datasets(tmp_path: Path) -> Iterator[None]:
    with tiny.datasets(tmp_path), tiny.own_loggers():
        yield


@pytest.mark.usefixtures("datasets")
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    ],
)
def test_a_run_without_memory_is_told_what_fits(
    error: Exception,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run_step(_trainer: Trainer) -> None:
        raise error

    monkeypatch.setattr(Trainer, "run_step", run_step)
    status = train_command.run(tmp_path, "MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", 4)
    assert status == 1
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert "SOLVER.ACCUMULATE_STEPS=" in printed
    assert "ACTIVATION_CHECKPOINT=" in printed


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("9 bytes"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        MemoryError(
            "Caught MemoryError in DataLoader worker process 0.\nOriginal Traceback (most recent "
            'call last):\n  File "a.py", line 1, in read\nMemoryError: 9 bytes'
        ),
    ],
)
def test_lack_of_main_memory_is_not_the_gpus(error: Exception) -> None:
    """The note on the image that was being read is kept."""
    error.add_note("While reading 'a.png'.")
    cfg = small(CONFIGS[0], "MODEL.DEVICE=cuda")
    with pytest.raises(OutOfMemoryError) as caught, explained_out_of_memory(cfg, 1):
        raise error
    message = str(caught.value)
    assert all(part in message for part in ("DATALOADER.NUM_WORKERS", "'a.png'", "9 bytes"))
    assert not any(part in message for part in ("cuda", "Traceback"))


def test_an_estimate_that_fails_hides_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no estimate")

    monkeypatch.setattr("semask.engine.fit.training_memory", fail)
    context = explained_out_of_memory(small(CONFIGS[0], *SHALLOW), 1)
    with pytest.raises(OutOfMemoryError, match=r"tried to allocate 2 GiB"), context:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")


@pytest.mark.parametrize(
    ("membership", "files", "limit"),
    [
        ("0::/job/step\n", {"job/memory.max": "4096\n", "job/step/memory.max": "max\n"}, 4096),
        ("0::/of/the/host\n", {"memory.max": "8192\n"}, 8192),
        (
            "3:cpu:/job\n2:memory:/job\n",
            {"memory/job/memory.limit_in_bytes": "4096", "memory/memory.limit_in_bytes": "9" * 18},
            4096,
        ),
        ("0::/\n", {"memory.max": "max"}, None),
        ("", {}, None),
    ],
)
def test_the_memory_of_a_container(
    tmp_path: Path, membership: str, files: dict[str, str], limit: int | None
) -> None:
    (tmp_path / "self").write_text(membership, encoding="utf-8")
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    found = host_memory(tmp_path / "groups", tmp_path / "self")
    assert found == limit if limit else found > GIB


def test_the_start_of_a_training_says_what_it_expects(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "semask")
    cfg = small(CONFIGS[0], *SHALLOW)
    log_expected_memory(cfg, 1)
    assert f"cpu has {device_memory('cpu') / GIB:.1f} GiB" in caplog.text
    monkeypatch.setattr("semask.engine.fit.device_memory", lambda device: GIB)
    log_expected_memory(cfg, 1)
    assert "semask fit" in caplog.text
    caplog.clear()
    log_expected_memory(small(CONFIGS[0], "MODEL.BACKBONE.NAME=Missing"), 1)
    assert "unknown" in caplog.text


def refuse_to_run(*_: Any, **__: Any) -> None:
    raise AssertionError("nothing is to be run")


@pytest.mark.parametrize(
    ("name", "eval_only", "advice"),
    [
        ("nuclei/semask_mask_rcnn", False, "'semask fit'"),
        (CONFIGS[0], True, r"TEST\.PROTOCOL"),
    ],
)
def test_no_step_is_run_to_explain(
    name: str, eval_only: bool, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A detector's estimate is a real step, and an evaluation has none."""
    monkeypatch.setattr("semask.engine.fit.training_memory", refuse_to_run)
    cfg = small(name)
    if not eval_only:
        log_expected_memory(cfg, 1)
    with (
        pytest.raises(OutOfMemoryError, match=advice),
        explained_out_of_memory(cfg, 1, eval_only=eval_only),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
