"""The picture of training curves, and what metrics.json may look like."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot
from PIL import Image

from semask.cli import main
from semask.visualize.plots import MetricsError, plot_runs, read_run

run = functools.partial(main.run, "plot")


def entry(step: int, **values: float) -> dict[str, Any]:
    return {"iteration": step, **values}


def losses(step: int) -> dict[str, Any]:
    return entry(step, total_loss=2.0 / (step + 1), loss_prior=0.5 / (step + 1), lr=0.01)


def write(folder: Path, *entries: dict[str, Any], end: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(values) + "\n" for values in entries)
    (folder / "metrics.json").write_text(lines + end)
    return folder


def test_one_run_from_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(
        tmp_path / "run",
        *(losses(step) for step in range(19, 100, 20)),
        entry(100, **{"sem_seg/mIoU": 41.5}),
    )
    assert run([str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'training.png'}\n"
    with Image.open(folder / "training.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 600
        assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 10
    assert not [path for path in folder.iterdir() if path.suffix == ".tmp"]


def test_several_runs_lie_on_top_of_each_other(tmp_path: Path) -> None:
    folders = [
        write(tmp_path / name, losses(0), losses(20), entry(40, **{"val/sem_seg/mIoU": 40.0}))
        for name in ("first", "second")
    ]
    runs = [read_run(str(folders[0])), read_run(str(folders[1] / "metrics.json"), "other")]
    figure = plot_runs(runs)
    loss_axes, rate_axes, accuracy_axes = figure.axes
    assert [line.get_label() for line in loss_axes.lines] == [
        "first: total_loss",
        "first: loss_prior",
        "other: total_loss",
        "other: loss_prior",
    ]
    assert [line.get_label() for line in rate_axes.lines] == ["first", "other"]
    assert list(np.asarray(loss_axes.lines[0].get_xdata())) == [0, 20]
    assert list(np.asarray(loss_axes.lines[2].get_ydata())) == [2.0, 2.0 / 21]
    assert list(np.asarray(accuracy_axes.lines[1].get_ydata())) == [40.0]
    assert loss_axes.lines[0].get_color() != loss_axes.lines[2].get_color()
    assert loss_axes.get_legend() is not None


def test_names_and_formats(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", losses(0)), write(tmp_path / "b", losses(0))
    output = tmp_path / "new" / "picture.svg"
    assert run([f"ours={first}", f"theirs={second}", "--output", str(output)]) == 0
    text = output.read_text()
    assert "<svg" in text
    assert "ours: total_loss" in text
    assert "theirs: total_loss" in text


def test_leaves_no_figure_open(tmp_path: Path) -> None:
    before = pyplot.get_fignums()
    assert run([str(write(tmp_path / "run", losses(0)))]) == 0
    assert pyplot.get_fignums() == before


def test_resumed_run_counts_what_was_done_again_once(tmp_path: Path) -> None:
    folder = write(
        tmp_path, entry(19, lr=1.0), entry(39, lr=2.0), entry(59, lr=3.0), entry(39, lr=4.0)
    )
    assert read_run(str(folder)).series("lr") == ([19, 39], [1.0, 4.0])


def test_lines_of_one_iteration_join(tmp_path: Path) -> None:
    folder = write(tmp_path, entry(19, lr=1.0), entry(19, loss=3.0))
    read = read_run(str(folder))
    assert read.names() == {"lr", "loss"}
    assert read.points == [(19, {"lr": 1.0, "loss": 3.0})]


def test_unfinished_last_line_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path, losses(19), end='{"iteration": 39, "lr": 0.0')
    assert run([str(folder)]) == 0
    captured = capsys.readouterr()
    assert "Warning: the last line of" in captured.err
    assert read_run(str(folder)).series("lr") == ([19], [0.01])


def test_line_that_a_resumed_run_went_on_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = json.dumps(entry(39, lr=2.0))
    folder = write(tmp_path, entry(19, lr=1.0), end=f'{{"iterat{whole}\n{whole}\n')
    assert read_run(str(folder)).series("lr") == ([19, 39], [1.0, 2.0])
    assert "Warning: line 2 of" in capsys.readouterr().err


def test_not_finite_losses_are_gaps(tmp_path: Path) -> None:
    folder = write(tmp_path, entry(0, total_loss=1.0), entry(20, total_loss=float("nan")))
    figure = plot_runs([read_run(str(folder))])
    assert len(figure.axes[0].lines) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "There is no"),
        ("", "no entries yet"),
        ("\n\n", "no entries yet"),
        ('{"iteration": 3', "no entries yet"),
        ('nonsense\n{"iteration": 3, "lr": 1}\n', r"Line 1 of .* is not an entry: 'nonsense'"),
        ("[" * 100_000 + '\n{"iteration": 3, "lr": 1}\n', "Line 1 of"),
        ('[1]\n{"iteration": 3, "lr": 1}\n', "Line 1 of"),
        ('{"lr": 1}\n{"iteration": 3, "lr": 1}\n', "Line 1 of"),
    ],
)
def test_files_that_cannot_be_used(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str | None,
    message: str,
) -> None:
    if content is not None:
        (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(MetricsError, match=message):
        read_run(str(tmp_path))
    assert run([str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert "MetricsError: " in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""


def test_unknown_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path, losses(0))
    assert run([str(folder), "--output", str(tmp_path / "picture.xyz")]) == 2
    assert "must end in .png, .svg, .pdf" in capsys.readouterr().err


def test_picture_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path, losses(0))
    (tmp_path / "file").touch()
    assert run([str(folder), "--output", str(tmp_path / "file" / "picture.png")]) == 2
    assert f"'{tmp_path / 'file'}" in capsys.readouterr().err
