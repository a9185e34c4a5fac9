"""The comparison on nuclei: what it reads from finished runs, and its table."""

import json
from pathlib import Path

import pytest
from benchmarks import nuclei


def write_run(folder: Path, ap: float) -> None:
    folder.mkdir(parents=True)
    (folder / "model_final.pth").touch()
    lines = [{"iteration": 19, "time": 2.0}, {"iteration": 39, "time": 4.0}]
    lines.append({"iteration": 39, **dict.fromkeys(nuclei.METRICS, ap)})
    (folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    (folder / "usage.json").write_text(json.dumps({"cpu_seconds": 600.0, "peak_gib": 1.5}))


def test_runs_that_are_finished_are_not_trained_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, model in enumerate(nuclei.MODELS):
        for seed in (1, 2):
            write_run(tmp_path / f"{model}_seed{seed}", 10 * number + seed)
    assert nuclei.run(["--seeds", "1", "2", "--output", str(tmp_path)]) == 0
    text = (tmp_path / "nuclei.md").read_text()
    assert text.strip() in capsys.readouterr().out
    row = next(line for line in text.splitlines() if line.startswith("| Swin |"))
    assert "| 1, 2 | 21.5 (21.0 to 22.0) |" in row
    assert "| 3.0 (3.0 to 3.0) | 10.0 (10.0 to 10.0) | 1.5 (1.5 to 1.5) |" in row
    plain = json.loads((tmp_path / "nuclei.json").read_text())
    assert plain["semask"]["2"]["segm/AP"] == 2


def test_a_run_that_is_not_finished_has_no_results(tmp_path: Path) -> None:
    assert nuclei.results_of(tmp_path) is None
    write_run(tmp_path / "run", 5)
    assert nuclei.results_of(tmp_path / "run") is not None
    (tmp_path / "run" / "model_final.pth").unlink()
    assert nuclei.results_of(tmp_path / "run") is None


def test_a_training_that_fails_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--seeds", "1", "--models", "swin", "--output", str(tmp_path)]
    assert nuclei.run([*arguments, "NO.SUCH_KEY", "1"]) == 1
    log = tmp_path / "swin_seed1" / "train.out"
    assert str(log) in capsys.readouterr().err
    assert "NO.SUCH_KEY" in log.read_text()
    assert "| Swin |  | – |" in (tmp_path / "nuclei.md").read_text()
