"""The command line for images, folders and videos."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tiny_masks
from semask import Predictor
from semask.cli import main
from semask.cli.predict import find_inputs
from semask.inference.video import VideoReader, writing_video
from tiny_model import checkpoint, photograph


@pytest.fixture
def weights(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A checkpoint beside its config.yaml; of which decoder, tests may say."""
    decoder = getattr(request, "param", "fpn")
    return checkpoint(tmp_path) if decoder == "fpn" else tiny_masks.checkpoint(tmp_path, decoder)


DECODERS = pytest.mark.parametrize("weights", ["fpn", "mask2former"], indirect=True)


@pytest.fixture
def command(tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the program in ``tmp_path``; the output folder is "out"."""
    monkeypatch.chdir(tmp_path)

    def run(*inputs: Any, **replaced: str) -> int:
        options = {"config": "config.yaml", "weights": weights, "output": "out", **replaced}
        flags = [part for key, value in options.items() for part in (f"--{key}", value)]
        return main.run("predict", [*map(str, inputs), *flags, "--device", "cpu"])

    return run


def save(path: Path, height: int = 20, width: int = 30, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photograph(height, width, seed)).save(path)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def written(folder: Path) -> list[str]:
    """The files of the inputs, without those that describe the classes."""
    found = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.*"))
    return [name for name in found if name not in ("classes.json", "legend.png")]


def save_video(path: Path, frames: int, height: int = 20, width: int = 30) -> None:
    with writing_video(path, 12.5) as video:
        for index in range(frames):
            video.write(photograph(height, width, seed=index))


# ---- images


@DECODERS
def test_overlay_labels_and_priors_of_an_image(
    tmp_path: Path, command: Callable[..., int], weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "a.png")
    assert command("a.png", "--priors", "--alpha", "0.3") == 0
    assert capsys.readouterr().out.splitlines() == ["1 of 1 inputs segmented.", "out"]
    out = tmp_path / "out"
    prediction = Predictor("config.yaml", weights)(tmp_path / "a.png", priors=True)
    kinds = ("labels", "overlay", *prediction.prior_pictures())
    assert written(out) == [f"{kind}/a.png" for kind in kinds]
    assert len(kinds) >= 4
    assert np.array_equal(pixels(out / "labels/a.png"), prediction.labels)
    with Image.open(out / "labels/a.png") as labels:
        assert labels.mode == "L"
    assert np.array_equal(pixels(out / "overlay/a.png"), prediction.overlay(0.3))
    for name, picture in prediction.prior_pictures().items():
        assert np.array_equal(pixels(out / name / "a.png"), picture)


def test_folders_and_patterns_keep_their_paths(tmp_path: Path, command: Callable[..., int]) -> None:
    for name in ("photos/a.png", "photos/sub/b.jpg", "photos/sub/b.png", "other/[x]/c.png"):
        save(tmp_path / name)
    (tmp_path / "photos/notes.txt").write_text("no image")
    (tmp_path / "photos/truth.csv").write_text("no image")
    assert command("photos") == 0
    assert written(tmp_path / "out/labels") == ["a.png", "sub/b.jpg.png", "sub/b.png.png"]

    # The result lies in one of the inputs, and is no input.
    assert command("photos", output="photos/out") == 0
    assert command("photos", output="photos/out") == 0
    assert written(tmp_path / "photos/out/labels") == written(tmp_path / "out/labels")

    assert command("photos/s*/*.jpg", "other/[[]x]/*", "other/[x]", output="mixed") == 0
    assert written(tmp_path / "mixed/labels") == ["other/[x]/c.png", "photos/sub/b.png"]


def test_no_result_takes_anothers_place(tmp_path: Path) -> None:
    """Among them names that only meet once another has got its whole name."""
    given = ["a.jpg", "a.png", "a.jpg.png", "clip.mp4", "clip/000000.jpg", "drive.mp4", "b.tif"]
    for name in given:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = find_inputs([str(tmp_path)], tmp_path / "out")
    found = {str(file.relative_to(tmp_path)): name for file, name in names.items()}
    assert found == {
        "a.jpg": "a.jpg",
        "a.png": "a.png",
        "a.jpg.png": "a.jpg.png",
        "clip.mp4": "clip.mp4",
        "clip/000000.jpg": "clip/000000",
        "drive.mp4": "drive",
        "b.tif": "b",
    }


def test_the_classes_are_described(tmp_path: Path, command: Callable[..., int]) -> None:
    save(tmp_path / "a.png")
    assert command("a.png") == 0
    classes = json.loads((tmp_path / "out/classes.json").read_text())["classes"]
    predictor = Predictor("config.yaml", str(next(tmp_path.glob("*.pth"))))
    assert [entry["name"] for entry in classes] == list(predictor.class_names)
    assert [entry["color"] for entry in classes] == predictor.colors.tolist()
    legend = pixels(tmp_path / "out/legend.png").reshape(-1, 3).tolist()
    assert all(color in legend for color in predictor.colors.tolist())


def test_nearly_black_images_are_told(
    tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "a.png")
    Image.fromarray(np.ones((20, 30), np.uint8)).save(tmp_path / "b.png")
    assert command("a.png", "b.png") == 0
    assert "1 of 2 images is nearly black" in capsys.readouterr().err


def test_config_overrides_reach_the_model(tmp_path: Path, command: Callable[..., int]) -> None:
    save(tmp_path / "a.png", 60, 60)
    for output, keys in (
        ("whole", ["INPUT.SCALE", "[60, 60]"]),
        ("slide", ["INPUT.SCALE", "[60, 60]", "TEST.PROTOCOL", "slide"]),
        ("small", ["INPUT.SCALE", "[60, 60]", "TEST.PROTOCOL", "slide", "TEST.SLIDE_CROP"]),
    ):
        more = ["[16, 16]", "TEST.SLIDE_STRIDE", "[16, 16]"] if output == "small" else []
        assert command("a.png", "--opts", *keys, *more, output=output) == 0
    whole, slide, small = (
        pixels(tmp_path / name / "labels/a.png") for name in ("whole", "slide", "small")
    )
    assert np.array_equal(whole, slide)
    assert not np.array_equal(whole, small)


def test_what_cannot_be_read_is_left_out_and_told(
    tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "photos/a.png")
    (tmp_path / "photos/b.png").write_bytes(b"damaged")
    (tmp_path / "photos/c.mp4").write_bytes(b"damaged")
    assert command("photos") == 2
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0] == "1 of 3 inputs segmented."
    assert "b.png" in captured.err
    assert "c.mp4" in captured.err
    assert written(tmp_path / "out") == ["labels/a.png", "overlay/a.png"]


def test_names_that_are_long_or_not_utf_8(
    tmp_path: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names of 255 bytes, the most there can be; the report of one that becomes too long."""
    long = "街" * 83 + "ab"
    save(tmp_path / f"photos/{long}.png")
    save(tmp_path / "photos/caf\udce9.png")
    output = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr("sys.stdout", output)
    assert command("photos", output="out\udce9") == 0
    output.seek(0)
    assert "out\\udce9" in output.read()
    assert (tmp_path / f"out\udce9/overlay/{long}.png").is_file()
    assert (tmp_path / "out\udce9/labels/caf\udce9.png").is_file()
    for suffix in (".png", ".bmp"):  # both keep their suffix
        save(tmp_path / f"photos/{'b' * 251}{suffix}")
    assert command("photos", output="out") == 2
    assert len(written(tmp_path / "out")) == 4


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("Tried to allocate 20.00 GiB"), MemoryError("20.00 GiB")],
)
def test_an_image_that_needs_too_much_memory_is_skipped(
    error: Exception,
    tmp_path: Path,
    command: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    call = Predictor.__call__

    def out_of_memory(predictor: Any, image: Any, **options: Any) -> Any:
        if "a.png" in str(image):
            raise error
        return call(predictor, image, **options)

    monkeypatch.setattr(Predictor, "__call__", out_of_memory)
    save(tmp_path / "photos/a.png", height=40)
    save(tmp_path / "photos/b.png")
    assert command("photos") == 2
    assert "a.png" in capsys.readouterr().err
    assert written(tmp_path / "out") == ["labels/b.png", "overlay/b.png"]


@pytest.mark.parametrize(
    ("arguments", "replaced", "message"),
    [
        (["nowhere.png"], {}, "no file or folder 'nowhere.png'"),
        (["nothing"], {}, "nothing to segment in 'nothing'"),
        (["*.csv"], {}, "as a pattern it matches nothing"),
        (["a.png", "TEST.PROTOCOL=slide"], {}, "after --opts"),
        (["a.png", "--alpha", "2"], {}, "--alpha"),
        (["a.png"], {"config": "none.yaml"}, "no config file 'none.yaml'"),
        (["a.png"], {"weights": "none.pth"}, "none.pth"),
        (["a.png", "--opts", "TEST.PROTOCOL", "slides"], {}, "TEST.PROTOCOL"),
        (["a.png", "--opts", "MODEL.SEMASK.ATTENTION", "['none', 'none']"], {}, "semantic layers"),
        (["a.png"], {"output": "a.png"}, "a.png"),
    ],
)
def test_mistakes_end_with_a_sentence_and_status_two(
    tmp_path: Path,
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    replaced: dict[str, str],
    message: str,
) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "nothing").mkdir()
    assert command(*arguments, **replaced) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert not (tmp_path / "out").exists()


def test_the_help_shows_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main.run("predict", ["--help"])
    assert stop.value.code == 0
    assert "drive.mp4" in capsys.readouterr().out


# ---- videos


@pytest.mark.parametrize(
    ("weights", "format"),
    [("fpn", "mp4"), ("fpn", "avi"), ("mask2former", "mp4")],
    indirect=["weights"],
)
def test_a_video_becomes_a_video(
    tmp_path: Path, command: Callable[..., int], weights: str, format: str
) -> None:
    save_video(tmp_path / f"drive.{format}", frames=3)
    options = ("--priors", "--video-labels", "--video-format", format)
    assert command(f"drive.{format}", *options) == 0
    out = tmp_path / "out"
    predictor = Predictor("config.yaml", weights)
    priors = predictor(photograph(20, 30), priors=True).prior_pictures()
    assert written(out) == [
        *(f"labels/drive/{index:06}.png" for index in range(3)),
        *(f"{kind}/drive.{format}" for kind in ("overlay", *priors)),
    ]
    with (
        VideoReader(tmp_path / f"drive.{format}") as given,
        VideoReader(out / f"overlay/drive.{format}") as made,
    ):
        assert made.frame_rate == given.frame_rate == 12.5
        assert made.num_frames == 3
        for index, (frame, overlay) in enumerate(zip(given, made, strict=True)):
            prediction = predictor(frame)
            labels = pixels(out / f"labels/drive/{index:06}.png")
            assert np.array_equal(labels, prediction.labels)
            difference = np.abs(overlay.astype(int) - prediction.overlay()).mean()
            assert difference < 25  # the codecs lose detail
