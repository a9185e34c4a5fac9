"""The log message after the first step of a run."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from semask.engine import hooks
from semask.engine.hooks import FirstStepHook


def run_steps(monkeypatch: pytest.MonkeyPatch, device: str, seconds: float) -> None:
    """Three of 1000 steps that take so long each, by the hook's clock."""
    now = [0.0]
    monkeypatch.setattr(hooks.time, "perf_counter", lambda: now[0])
    hook: Any = FirstStepHook(device)
    hook.trainer = SimpleNamespace(
        max_iter=1000, iter=0, storage=SimpleNamespace(latest=lambda: {"total_loss": (2.5, 0)})
    )
    for hook.trainer.iter in range(3):
        hook.before_step()
        now[0] += seconds
        hook.after_step()


def test_loss_and_end_of_the_run_are_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "semask")
    run_steps(monkeypatch, "cpu", 2.0)
    (record,) = caplog.records
    assert "loss 2.5 in 2.00 s" in record.getMessage()
    assert "ends in 0:33:18" in record.getMessage()


@pytest.mark.parametrize(("device", "warned"), [("cpu", True), ("cuda", False)])
def test_a_run_of_hours_on_a_cpu_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, device: str, warned: bool
) -> None:
    run_steps(monkeypatch, device, 41.0)
    assert ("about 11 hours" in caplog.text) is warned
    assert ("own_dataset/semask_small_example" in caplog.text) is warned
