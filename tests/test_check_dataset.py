"""Checking a dataset: every defect is found, named, and told by the exit status."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

import tiny
from scripts import load_tool
from semask.config import ConfigError
from semask.data import register_folder
from semask.data.check import check_dataset, evenly_spaced, quick_check
from semask.data.reading import DataError

CLASSES = ["sky", "grass", "tree", "snow"]
IMAGES = 5


@pytest.fixture(autouse=True)
def catalogs() -> Iterator[None]:
    before = [dict(catalog.data) for catalog in (DatasetCatalog, MetadataCatalog)]
    yield
    for catalog, old in zip((DatasetCatalog, MetadataCatalog), before, strict=True):
        catalog.data.clear()
        catalog.data.update(old)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset without fault: 5 images of 8 x 6 pixels; the class "snow" is nowhere."""
    for kind in ("images", "annotations"):
        (tmp_path / "data" / kind).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(IMAGES):
        image = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        label = np.zeros((6, 8), np.uint8)
        label[:, 4:] = 1
        label[0] = 255
        if index == 2:
            label[5] = 2
        Image.fromarray(image).save(tmp_path / f"data/images/{index}.png")
        Image.fromarray(label).save(tmp_path / f"data/annotations/{index}.png")
    register_folder("own", tmp_path / "data/images", tmp_path / "data/annotations", CLASSES)
    return tmp_path / "data"


@pytest.fixture(scope="module")
def tool() -> Any:
    """The command, as a module."""
    return load_tool("check_dataset")


# ---- what is counted ----


@pytest.mark.parametrize("threads", [1, 3])
def test_report_of_a_sound_dataset(folder: Path, threads: int) -> None:
    report = check_dataset("own", threads=threads)
    assert report.problems == []
    assert (report.pairs, report.examined) == (IMAGES, IMAGES)
    assert report.modes == {"RGB": IMAGES}
    assert report.sizes == {(8, 6): IMAGES}
    assert report.pixels.tolist() == [20 * IMAGES - 4, 20 * IMAGES - 4, 8, 0]
    assert report.images.tolist() == [IMAGES, IMAGES, 1, 0]
    assert report.ignored_pixels == 8 * IMAGES
    assert report.absent == ["snow"]
    text = report.text()
    assert "Sizes: 1 different, widths 8 to 8, heights 6 to 6; most often 8x6 (5 images)" in text
    assert "|       2 | tree      |        3.333 |        1 |" in text
    assert "1 of 4 classes are in no image: snow." in text
    assert text.endswith("No problems.")
    plain = json.loads(json.dumps(report.as_dict()))
    assert plain["classes"][2] == {"name": "tree", "pixels": 8, "images": 1}
    assert plain["absent_classes"] == ["snow"]


def test_sample(folder: Path) -> None:
    report = check_dataset("own", sample=3)
    assert (report.pairs, report.examined) == (IMAGES, 3)
    assert "5 images with label maps, of which 3 have been looked at" in report.text()


def test_evenly_spaced() -> None:
    records = [{"index": index} for index in range(10)]
    assert [record["index"] for record in evenly_spaced(records, 4)] == [0, 3, 6, 9]
    assert evenly_spaced(records, 0) == evenly_spaced(records, 99) == records
    assert evenly_spaced([], 4) == []


def test_modes_of_images(folder: Path) -> None:
    pixels = np.zeros((6, 8), np.uint8)
    Image.fromarray(pixels).save(folder / "images/0.png")
    Image.fromarray(pixels).convert("CMYK").save(folder / "images/1.jpg")
    (folder / "images/1.png").unlink()
    Image.fromarray(pixels.astype(np.uint16)).save(folder / "images/2.png")
    Image.fromarray(np.zeros((6, 8, 4), np.uint8)).save(folder / "images/3.png")
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(np.zeros((8, 6, 3), np.uint8)).save(folder / "images/4.png", exif=exif)
    report = check_dataset("own")
    assert report.problems == []
    assert report.sizes == {(8, 6): 5}  # upright
    assert sorted(report.modes.elements()) == ["CMYK", "I;16", "L", "RGB", "RGBA"]


# ---- what is wrong ----


def remove_label(folder: Path) -> None:
    (folder / "annotations/1.png").unlink()


def remove_image(folder: Path) -> None:
    (folder / "images/1.png").unlink()


def truncate_image(folder: Path) -> None:
    path = folder / "images/1.png"
    path.write_bytes(path.read_bytes()[:-30])


def empty_label(folder: Path) -> None:
    (folder / "annotations/1.png").write_bytes(b"")


def resize_label(folder: Path) -> None:
    Image.fromarray(np.zeros((8, 6), np.uint8)).save(folder / "annotations/1.png")


def break_value(folder: Path) -> None:
    Image.fromarray(np.full((6, 8), 4, np.uint8)).save(folder / "annotations/1.png")


def colour_label(folder: Path) -> None:
    Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(folder / "annotations/1.png")


def float_image(folder: Path) -> None:
    (folder / "images/1.png").unlink()
    cv2.imwrite(str(folder / "images/1.tif"), np.zeros((6, 8), np.float32))


def ignore_everything(folder: Path) -> None:
    for path in (folder / "annotations").iterdir():
        Image.fromarray(np.full((6, 8), 255, np.uint8)).save(path)


def remove_everything(folder: Path) -> None:
    shutil.rmtree(folder)


def add_twin(folder: Path) -> None:
    shutil.copy(folder / "images/1.png", folder / "images/1.bmp")


DEFECTS: list[tuple[Callable[[Path], None], str, str, int]] = [
    (remove_label, "without counterpart", "1 (1) in '", 4),
    (remove_image, "without counterpart", "without an image", 4),
    (truncate_image, "unreadable", "Cannot read image '", 5),
    (empty_label, "unreadable", "Cannot read label map '", 5),
    (resize_label, "sizes differ", "is 8x6 pixels (width x height, upright) but", 5),
    (break_value, "unusable label map", "no class: 4 (48 pixels)", 5),
    (colour_label, "unusable label map", "has 3 channels (RGB)", 5),
    (float_image, "unusable image", "32-bit pixels", 5),
    (ignore_everything, "nothing labelled", "No image of dataset 'own' has a labelled pixel", 5),
    (remove_everything, "cannot be listed", "There is no folder '", 0),
    (add_twin, "cannot be listed", "pairs are ambiguous", 0),
]
BY_DEFECT = pytest.mark.parametrize(
    ("damage", "kind", "words", "pairs"), DEFECTS, ids=[defect[0].__name__ for defect in DEFECTS]
)


@BY_DEFECT
def test_every_defect_is_in_the_report(
    folder: Path, damage: Callable[[Path], None], kind: str, words: str, pairs: int
) -> None:
    damage(folder)
    report = check_dataset("own")
    (problem,) = report.problems
    assert problem.kind == kind
    assert words in problem.message
    assert (report.pairs, report.examined) == (pairs, pairs)
    assert problem.message in report.text()
    assert f"1 problem:\n  {kind} (1):" in report.text()


@BY_DEFECT
def test_training_refuses_with_the_same_words(
    folder: Path, damage: Callable[[Path], None], kind: str, words: str, pairs: int
) -> None:
    damage(folder)
    (problem,) = check_dataset("own").problems
    if kind == "nothing labelled":  # as far as a sample tells
        quick_check("own", 4, 255)
        return
    with pytest.raises(DataError) as info:
        quick_check("own", 4, 255)
    assert str(info.value).startswith(problem.message)


def test_files_without_counterpart_are_listed(folder: Path) -> None:
    remove_label(folder)
    (folder / "images/3.png").unlink()
    report = check_dataset("own")
    assert report.images_alone == [str(folder / "images/1.png")]
    assert report.labels_alone == [str(folder / "annotations/3.png")]
    assert report.examined == 3


def test_many_problems_are_shortened(folder: Path) -> None:
    register_folder("few", folder / "images", folder / "annotations", ["sky"])
    for index in range(20):
        for kind in ("images", "annotations"):
            shutil.copy(folder / kind / "1.png", folder / kind / f"more{index}.png")
    text = check_dataset("few").text()
    assert "25 problems:" in text
    assert "... and 15 more" in text
    assert text.count("has values that are no class: 1 (20 pixels)") >= 9
    assert text.count("DATASETS.FOLDER_CLASSES") == text.count("Allowed are 0..0 and 255") == 1


def test_ignored_images_are_counted(folder: Path) -> None:
    Image.fromarray(np.full((6, 8), 255, np.uint8)).save(folder / "annotations/1.png")
    report = check_dataset("own")
    assert report.problems == []
    assert report.unlabelled == 1
    assert "1 image without a labelled pixel" in report.text()


def test_one_of_something(tmp_path: Path) -> None:
    Image.new("RGB", (2, 1)).save(tmp_path / "image.jpg")
    Image.fromarray(np.array([[0, 9]], np.uint8)).save(tmp_path / "image.png")
    register_folder("one", tmp_path, tmp_path, CLASSES, image_ext=".jpg", label_ext=".png")
    text = check_dataset("one").text()
    assert "Dataset 'one': 1 image with label maps" in text
    assert "most often 2x1 (1 image)" in text
    assert "1 problem:" in text
    assert "no class: 9 (1 pixel)." in text
    with pytest.raises(DataError, match="1 of the 1 image looked at"):
        quick_check("one", 4, 255)


def test_unknown_datasets() -> None:
    with pytest.raises(ConfigError, match=r"no dataset 'camvid'\. With a.*camvid_sem_seg_train, "):
        check_dataset("camvid")
    words = r"Known ones begin with ade20k, .*camvid, .*DATASETS\.FOLDERS.*register_folder"
    with pytest.raises(ConfigError, match=words):
        check_dataset("my_garden")
    DatasetCatalog.register("nameless", list)
    with pytest.raises(ConfigError, match="'nameless' has no class names"):
        check_dataset("nameless")


# ---- before training ----


def test_quick_check_looks_at_a_sample(folder: Path) -> None:
    break_value(folder)
    quick_check("own", 4, 255, 3)  # images 0, 2 and 4
    quick_check("own", 4, 255, 0)
    with pytest.raises(DataError, match="In dataset 'own', 1 of the 5 images looked at"):
        quick_check("own", 4, 255, 5)
    with pytest.raises(DataError, match="5 of the 5 images"):
        quick_check("own", 1, 255, 5)


def test_quick_check_of_an_empty_dataset() -> None:
    tiny.register("empty", [])
    with pytest.raises(DataError, match="'empty' has no images"):
        quick_check("empty", 3, 255)


def test_quick_check_lets_training_skip_files(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    truncate_image(folder)
    quick_check("own", 4, 255, max_unreadable=1)
    assert "Cannot read image" in caplog.text
    (folder / "annotations/3.png").write_bytes(b"")
    with pytest.raises(DataError, match="2 of the 5 images"):
        quick_check("own", 4, 255, max_unreadable=1)
    (folder / "annotations/3.png").unlink()
    (folder / "images/3.png").unlink()
    resize_label(folder)
    with pytest.raises(DataError, match=r"but its label map|Cannot read image"):
        quick_check("own", 4, 255)


def test_quick_check_names_what_training_would_not_skip(folder: Path) -> None:
    (folder / "images/0.png").write_bytes(b"")
    break_value(folder)
    with pytest.raises(DataError, match=r"^Label map '.*1\.png' has values that are no class"):
        quick_check("own", 4, 255, max_unreadable=10)


# ---- the command ----


def test_command_on_folders(
    folder: Path, tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["--images", str(folder / "images"), "--labels", str(folder / "annotations")]
    assert tool.run([*own, "--classes", *CLASSES, "--picture", str(tmp_path / "a.png")]) == 0
    out = capsys.readouterr().out
    assert "Dataset 'folder': 5 images with label maps" in out
    assert f"Picture: {tmp_path / 'a.png'}" in out
    picture = Image.open(tmp_path / "a.png")
    assert picture.mode == "RGB"
    assert picture.height > 5 * 6


def test_command_with_numbers_only(
    folder: Path, tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["--images", str(folder / "images"), "--labels", str(folder / "annotations")]
    report = tmp_path / "report.json"
    assert tool.run([*own, "--num-classes", "2", "--json", str(report)]) == 1
    assert "no class: 2 (8 pixels)" in capsys.readouterr().out
    (document,) = json.loads(report.read_text())
    assert [entry["name"] for entry in document["classes"]] == ["class 0", "class 1"]
    assert document["problems"][0]["kind"] == "unusable label map"


@BY_DEFECT
def test_exit_status(
    folder: Path,
    tool: Any,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    kind: str,
    words: str,
    pairs: int,
) -> None:
    assert tool.run(["own", "--threads", "2"]) == 0
    damage(folder)
    picture = folder.parent / "picture.png"
    assert tool.run(["own", "--picture", str(picture)]) == 1
    assert words in capsys.readouterr().out
    assert picture.exists() == (pairs > 0)


def test_several_datasets_and_configs(
    folder: Path, tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    register_folder("few", folder / "images", folder / "annotations", ["sky"])
    assert tool.run(["own", "few", "--picture", str(tmp_path / "p.png"), "--rows", "2"]) == 1
    assert {path.name for path in tmp_path.glob("p_*.png")} == {"p_own.png", "p_few.png"}
    config = tiny.write_config(
        tmp_path / "config.yaml", DATASETS={"TRAIN": ["own"], "TEST": ["own"]}
    )
    capsys.readouterr()
    assert tool.run(["--config-file", config]) == 0
    assert capsys.readouterr().out.count("Dataset 'own'") == 1
    assert tool.run(["--config-file", config, "DATASETS.TEST", "('few',)"]) == 1
    assert "Dataset 'few'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give names of datasets"),
        (["camvid_sem_seg_vall"], "Did you mean 'camvid_sem_seg_val'"),
        (["own", "--images", "a", "--labels", "b"], "Give names of datasets"),
        (["--images", "a", "--classes", "b"], "needs --images, --labels"),
        (["--images", "a", "--labels", "b"], "--classes or --num-classes"),
        (["--images", "a", "--labels", "b", "--classes", "c", "c"], "different names"),
        (["own", "--sample", "-1"], "--sample cannot be negative"),
        (["--config-file", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_mistakes_in_the_arguments(
    tool: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert tool.run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err


@pytest.mark.parametrize("option", ["--picture", "--json"])
def test_files_that_cannot_be_written(
    folder: Path, tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    (tmp_path / "file").touch()
    assert tool.run(["own", option, str(tmp_path / "file" / "report")]) == 2
    captured = capsys.readouterr()
    assert "No problems." in captured.out
    assert f"'{tmp_path / 'file'}" in captured.err


def test_unknown_option(tool: Any) -> None:
    with pytest.raises(SystemExit) as info:
        tool.run(["own", "--colour"])
    assert info.value.code == 2


def test_real_samples(
    shared: Path, tool: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shared / "data" / "samples"))
    arguments: list[Any] = ["--picture", tmp_path / "p.png", "--json", tmp_path / "r.json"]
    names = ["ade20k_raw_sem_seg_val", "coco_stuff_164k_sem_seg_val"]
    assert tool.run([*names, *map(str, arguments)]) == 0
    ade, stuff = json.loads((tmp_path / "r.json").read_text())
    assert (ade["pairs"], stuff["pairs"]) == (2, 4)
    assert len(list(tmp_path.glob("p_*.png"))) == 2
