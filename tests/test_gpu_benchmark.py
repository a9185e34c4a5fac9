"""The benchmark for GPUs on a CPU with small models: that each part runs and says what fails."""

import json
import os
from pathlib import Path

import pytest
import torch
from benchmarks import gpu, gpu_parts

VARIANTS_OF = gpu_parts.variants_of
# A training that SIGTERM does not end.
STUBBORN = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
words = " ".join([str(os.getpid()), *sys.argv])
pathlib.Path(__file__).with_name("started").write_text(words)
time.sleep(60)
"""
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
]


def rows(part: str, folder: Path, device: str) -> list[gpu_parts.Row]:
    file = folder / "rows"
    options = f"--tiny --device {device} --dtype bfloat16 --batch 2 --seconds 300"
    gpu_parts.main([part, str(file), *options.split()])
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert found
    assert not [row for row in found if "failed" in row]
    return found


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    few = {"none": "none", "striped_loss": "striped_loss", "all": "striped_loss,streamed,gathered"}
    monkeypatch.setattr(gpu_parts, "variants_of", lambda case: few)
    monkeypatch.setattr(gpu_parts, "MEASURED_SECONDS", 0.0)
    monkeypatch.setattr(gpu_parts, "STEPS", 1)


@pytest.mark.parametrize("device", DEVICES)
def test_the_reference_is_met(tmp_path: Path, device: str) -> None:
    found = rows("fixtures", tmp_path, device)
    assert {row["dtype"] for row in found} == {"float32", "bfloat16"}
    assert all(row["feat3"] > 0 for row in found)
    assert not torch.backends.cudnn.allow_tf32


def test_a_training_that_does_not_end_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "camvid").mkdir()
    (tmp_path / "train_net.py").write_text(STUBBORN)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setattr(gpu_parts, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_parts, "CAMVID_GRACE", 0.1)
    (row,) = gpu_parts.camvid(gpu_parts.Task("cpu", "float16", 2, True, 0.0))
    assert "failed" in row()
    pid, *arguments = (tmp_path / "started").read_text().split()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
    assert "SOLVER.AMP.PRECISION float16" in " ".join(arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_fast_forms_equal_the_plain_model(tmp_path: Path, device: str) -> None:
    found = rows("equality", tmp_path, device)
    paths = {row["fast path"] for row in found}
    assert paths == {"all", "striped_loss"}
    assert {row["case"] for row in found} == set(gpu_parts.MODELS)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("part", ["training", "inference", "large"])
def test_speed(part: str, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *args, **options: None)
    found = rows(part, tmp_path, device)
    assert all(row["images/s"] > 0 for row in found)
    assert {"training", "inference"} >= {row["kind"] for row in found}


def test_forms_that_suit_the_device_are_measured_alone_and_together() -> None:
    task = gpu_parts.Task("cuda", "bfloat16", 16, False, 0.0)
    variants = VARIANTS_OF(task.case(gpu_parts.MODELS["SeMask-T FPN"], "training", 512, 16))
    assert variants["none"] == "none"
    assert {"sdpa", "striped_loss"} <= set(variants)
    assert set(variants["all"].split(",")) == set(variants) - {"none", "all"}


def test_what_differs_too_much_has_failed() -> None:
    assert "failed" in gpu_parts.judged({}, float("nan"), "float32")
    assert "failed" in gpu_parts.judged({}, 0.5, "bfloat16")
    assert "failed" not in gpu_parts.judged({}, 1e-5, "float32")


def test_a_part_that_fails_or_hangs_does_not_end_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))  # without CamVid
    monkeypatch.setattr(gpu, "GRACE", 0.0)
    monkeypatch.setattr(gpu, "LIMITS", {"fixtures": 0.02})
    arguments = [
        "--device",
        "cpu",
        "--tiny",
        "--batch",
        "2",
        "--minutes",
        "5",
        "--parts",
        "fixtures",
        "camvid",
    ]
    assert (
        gpu.main([*arguments, "--parts", "fixtures", "camvid", "--output", str(tmp_path / "out")])
        == 1
    )
    said = capsys.readouterr()
    assert "fixtures: not finished after" in said.err
    assert "camvid" in said.err
    report = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert list(report["parts"]) == ["fixtures", "camvid"]
    assert report["parts"]["camvid"]["rows"][0]["failed"]
    assert gpu.TITLES["camvid"] in said.out
