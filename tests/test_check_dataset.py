"""Checking a dataset: every defect is found and named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from PIL import Image

import tiny
from own_folder import (
    BY_DEFECT,
    CLASSES,
    IMAGES,
    break_value,
    remove_label,
    resize_label,
    truncate_image,
    write_folder,
)
from semask.data import register_folder
from semask.data.checks.semantic import check_dataset, evenly_spaced, quick_check
from semask.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("catalogs")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path)


# ---- what is counted ----


@pytest.mark.parametrize("threads", [1, 3])
def test_report_of_a_sound_dataset(folder: Path, threads: int) -> None:
    report = check_dataset("own", threads=threads)
    assert report.problems == []
    assert (report.listed, report.examined) == (IMAGES, IMAGES)
    assert report.modes == {"RGB": IMAGES}
    assert report.sizes == {(8, 6): IMAGES}
    assert report.pixels.tolist() == [20 * IMAGES - 4, 20 * IMAGES - 4, 8, 0]
    assert report.images.tolist() == [IMAGES, IMAGES, 1, 0]
    assert report.ignored_pixels == 8 * IMAGES
    assert report.absent == ["snow"]
    text = report.text()
    assert "Size: 8x6 (5 images)" in text
    assert "|       2 | tree      |        3.333 |        1 |" in text
    assert "1 of 4 classes are in no image: snow." in text
    assert text.endswith("No problems.")
    plain = json.loads(json.dumps(report.as_dict()))
    assert plain["classes"][2] == {"name": "tree", "pixels": 8, "images": 1}
    assert plain["absent_classes"] == ["snow"]


def test_sample(folder: Path) -> None:
    report = check_dataset("own", sample=3)
    assert (report.listed, report.examined) == (IMAGES, 3)
    assert "5 images with label maps, of which 3 were examined" in report.text()


def test_evenly_spaced() -> None:
    records = [{"index": index} for index in range(10)]
    assert [record["index"] for record in evenly_spaced(records, 4)] == [0, 3, 6, 9]
    assert evenly_spaced(records, 0) == evenly_spaced(records, 99) == records
    assert evenly_spaced([], 4) == []


def test_modes_of_images(folder: Path) -> None:
    pixels = np.full((6, 8), 200, np.uint8)
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
    of_16_bits = Image.open(folder / "images/2.png").mode  # "I;16", "I" before Pillow 10.3
    assert sorted(report.modes.elements()) == ["CMYK", of_16_bits, "L", "RGB", "RGBA"]


# ---- what is wrong ----


@BY_DEFECT
def test_every_defect_is_in_the_report(
    folder: Path, damage: Callable[[Path], None], kind: str, words: str, pairs: int
) -> None:
    damage(folder)
    report = check_dataset("own")
    (problem,) = report.problems
    assert problem.kind == kind
    assert words in problem.message
    assert (report.listed, report.examined) == (pairs, pairs)
    assert problem.message in report.text()
    assert f"1 problem:\n  {kind} (1):" in report.text()


@BY_DEFECT
def test_training_refuses_with_the_same_words(
    folder: Path, damage: Callable[[Path], None], kind: str, words: str, pairs: int
) -> None:
    damage(folder)
    (problem,) = check_dataset("own").problems
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
    assert text.count("has values that are not classes: 1 (20 pixels)") >= 9
    assert text.count("DATASETS.FOLDER_CLASSES") == text.count("Allowed are 0..0 and 255") == 1


def test_ignored_images_are_counted(folder: Path) -> None:
    Image.fromarray(np.full((6, 8), 255, np.uint8)).save(folder / "annotations/1.png")
    report = check_dataset("own")
    assert report.problems == []
    assert report.unlabelled == 1
    assert "1 image without a labelled pixel" in report.text()


def test_one_of_something(tmp_path: Path) -> None:
    Image.new("RGB", (2, 1), "white").save(tmp_path / "image.jpg")
    Image.fromarray(np.array([[0, 9]], np.uint8)).save(tmp_path / "image.png")
    register_folder("one", tmp_path, tmp_path, CLASSES, image_ext=".jpg", label_ext=".png")
    text = check_dataset("one").text()
    assert "Dataset 'one': 1 image with label maps" in text
    assert "Size: 2x1 (1 image)" in text
    assert "1 problem:" in text
    assert "not classes: 9 (1 pixel)." in text
    with pytest.raises(DataError, match="1 of the 1 "):
        quick_check("one", 4, 255)


def test_unknown_datasets() -> None:
    with pytest.raises(
        ConfigError, match=r"no dataset 'camvid'\. Similar names are .*camvid_sem_seg_train, "
    ):
        check_dataset("camvid")
    words = r"Known names begin with ade20k, .*camvid, .*DATASETS\.FOLDERS.*register_folder"
    with pytest.raises(ConfigError, match=words):
        check_dataset("my_garden")
    DatasetCatalog.register("nameless", list)
    with pytest.raises(ConfigError, match="'nameless'"):
        check_dataset("nameless")


# ---- sound files, meaningless results ----


def write_masks(folder: Path, values: list[int], count: int = 20) -> None:
    """As many label maps of these values, side by side."""
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"images/{index}.png")
        label = np.resize(np.array(values, np.uint8), (6, 8))
        Image.fromarray(label).save(folder / f"annotations/{index}.png")


def test_masks_of_0_and_255_are_refused_with_the_label_map_to_use(folder: Path) -> None:
    write_masks(folder, [0, 255])
    (problem,) = check_dataset("own").problems
    assert problem.kind == "one class alone"
    assert "{0: 0, 255: 1}" in problem.message
    with pytest.raises(DataError, match=r"'own'.*'sky'.*\{0: 0, 255: 1\}"):
        quick_check("own", 4, 255)
    quick_check("own", 4, 255, is_train=False)  # a warning


def test_a_second_class_outside_the_sample_is_found(folder: Path) -> None:
    write_masks(folder, [0])
    Image.fromarray(np.ones((6, 8), np.uint8)).save(folder / "annotations/7.png")
    quick_check("own", 4, 255, 2)


def test_evaluation_without_labels_points_to_predict(folder: Path) -> None:
    write_masks(folder, [255])
    with pytest.raises(DataError, match=r"'own'.*semask predict"):
        quick_check("own", 4, 255, is_train=False)
    shutil.rmtree(folder / "annotations")
    with pytest.raises(DataError, match=r"annotations'.*semask predict"):
        quick_check("own", 4, 255, is_train=False)


@pytest.mark.parametrize(("dtype", "high"), [(np.uint8, 2), (np.uint16, 4096), (np.uint16, 16384)])
def test_nearly_black_images_are_told(
    folder: Path, caplog: pytest.LogCaptureFixture, dtype: type, high: int
) -> None:
    for index in range(IMAGES - 1):
        pixels: np.ndarray = np.random.default_rng(index).integers(0, high, (6, 8)).astype(dtype)
        Image.fromarray(pixels).save(folder / f"images/{index}.png")
    report = check_dataset("own")
    assert (report.dark, report.problems) == (4, [])
    assert "4 of 5 images are nearly black" in report.text()
    Image.fromarray(pixels).save(folder / "images/4.png")
    assert [problem.kind for problem in check_dataset("own").problems] == ["nearly black"]
    quick_check("own", 4, 255)
    assert "5 of 5 images" in caplog.text


# ---- before training ----


def test_quick_check_looks_at_a_sample(folder: Path) -> None:
    break_value(folder)
    quick_check("own", 4, 255, 3)  # images 0, 2 and 4
    quick_check("own", 4, 255, 0)
    with pytest.raises(DataError, match="'own', 1 of the 5 "):
        quick_check("own", 4, 255, 5)
    with pytest.raises(DataError, match="5 of the 5 images"):
        quick_check("own", 1, 255, 5)


def test_quick_check_of_an_empty_dataset() -> None:
    tiny.register("empty", [])
    with pytest.raises(DataError, match="'empty'"):
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
    with pytest.raises(DataError, match=r"label map|Cannot read"):
        quick_check("own", 4, 255)


def test_quick_check_names_what_training_would_not_skip(folder: Path) -> None:
    (folder / "images/0.png").write_bytes(b"")
    break_value(folder)
    with pytest.raises(DataError, match=r"1\.png'"):
        quick_check("own", 4, 255, max_unreadable=10)
