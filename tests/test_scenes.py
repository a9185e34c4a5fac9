"""The drawn dataset: always the same pixels, look-alike classes, and files that survive faults."""

import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import semask  # also makes Detectron2 importable

# isort: split
from detectron2.data import DatasetCatalog, MetadataCatalog

from semask.data.datasets.scenes import dataset as scenes
from semask.data.datasets.scenes.painting import CLASSES, CLASSES_OF_MATERIAL
from semask.data.datasets.scenes.render import render_scene
from semask.data.reading import read_image, read_label
from semask.errors import DataError

FEW = {"train": 5, "val": 2}

# Of (split, index): sha256 of the image's and the label map's pixels. If these change,
# GENERATOR_VERSION has to be raised.
CHECKSUMS = {
    (0, 0): "6e15bf57d4048589c42d120c69d1b8e4186d0a8f4379bdc0a5c62d522a5783cd",
    (1, 0): "f7108bcea1238334fd167444d0e31f3f9b8e589e9247ff1383dcce4635ba50d6",
    (0, 123): "79f4c9d8e35e44e3c1bc7c14594b0cc3f85ecc80ffeaf9b3a810a6c00d39fb0f",
    (1, 99): "7b1590b82d0509b19f9f673f953b91e4f3288ccf8b6feb484c08067b96e98751",
}


def checksum(split: int, index: int) -> str:
    image, label = render_scene(scenes.SEED, split, index)
    return hashlib.sha256(image.tobytes() + label.tobytes()).hexdigest()


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def start_drawing(folder: Path, splits: dict[str, int]) -> BaseProcess:
    # A fork, as a fresh interpreter would take seconds to import everything.
    process = multiprocessing.get_context("fork").Process(
        target=scenes.make_scenes, args=(str(folder), splits)
    )
    process.start()
    return process


@pytest.fixture(scope="module")
def datasets_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The whole dataset, drawn once for all tests of this file, where the catalogs find it."""
    folder = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(folder))
        DatasetCatalog.get("scenes_sem_seg_val")
        yield folder


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few scenes, not to be changed."""
    folder = tmp_path_factory.mktemp("few")
    scenes.make_scenes(str(folder), FEW)
    return folder


@pytest.fixture
def copy(few: Path, tmp_path: Path) -> Path:
    """A few scenes, to be damaged."""
    return Path(shutil.copytree(few, tmp_path / "scenes"))


# ---- the pictures ----


def test_pixels_never_change() -> None:
    assert {key: checksum(*key) for key in CHECKSUMS} == CHECKSUMS


def test_another_process_draws_the_same_and_importing_draws_nothing(tmp_path: Path) -> None:
    code = f"""
import hashlib, semask.data.datasets
from semask.data.datasets.scenes.render import render_scene
for split, index in {list(CHECKSUMS)[:2]}:
    image, label = render_scene({scenes.SEED}, split, index)
    print(hashlib.sha256(image.tobytes() + label.tobytes()).hexdigest())
"""
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={
            **os.environ,
            "PYTHONPATH": str(Path(semask.__file__).parents[1]),
            "PYTHONHASHSEED": "7",
            "DETECTRON2_DATASETS": str(tmp_path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == list(CHECKSUMS.values())[:2]
    assert not any(tmp_path.iterdir())


def test_images_differ_between_splits_and_seeds() -> None:
    images = [render_scene(*key)[0].tobytes() for key in [(0, 0, 0), (0, 1, 0), (1, 0, 0)]]
    assert len(set(images)) == 3


@pytest.mark.parametrize("split", ["train", "val"])
def test_files_are_whole_and_as_listed(datasets_folder: Path, split: str) -> None:
    dicts = DatasetCatalog.get(f"scenes_sem_seg_{split}")
    assert len(dicts) == scenes.SPLITS[split]
    assert len({d["file_name"] for d in dicts}) == len(dicts)
    for d in dicts[::20]:
        image, label = read_image(d["file_name"]), read_label(d["sem_seg_file_name"])
        assert image.shape == (d["height"], d["width"], 3)
        assert label.shape == (d["height"], d["width"])
        assert label.max() < len(CLASSES)
        assert all(144 <= side <= 176 for side in label.shape)
    assert Path(dicts[3]["file_name"]) == datasets_folder / f"scenes/images/{split}/00003.png"
    number = list(scenes.SPLITS).index(split)
    drawn = render_scene(scenes.SEED, number, 3)
    np.testing.assert_array_equal(read_image(dicts[3]["file_name"]), drawn[0])
    np.testing.assert_array_equal(read_label(dicts[3]["sem_seg_file_name"]), drawn[1])


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_class_is_in_many_images(datasets_folder: Path, split: str) -> None:
    labels = [
        read_label(d["sem_seg_file_name"]) for d in DatasetCatalog.get(f"scenes_sem_seg_{split}")
    ]
    pixels = np.stack([np.bincount(label.ravel(), minlength=len(CLASSES)) for label in labels])
    in_images = (pixels >= 50).mean(axis=0)
    share = pixels.sum(axis=0) / pixels.sum()
    assert in_images.min() > 0.4, dict(zip(CLASSES, in_images, strict=True))
    assert share.min() > 0.004, dict(zip(CLASSES, share, strict=True))
    assert share.max() < 0.4, dict(zip(CLASSES, share, strict=True))
    assert (pixels > 0).sum(axis=1).min() >= 3


# ---- look-alikes ----


def patches(dicts: list[dict[str, Any]], side: int = 5, each: int = 8) -> dict[int, np.ndarray]:
    """Of each class, the pixels of patches that lie well inside its regions."""
    rng = np.random.default_rng(0)
    found: dict[int, list[np.ndarray]] = {label: [] for label in range(len(CLASSES))}
    kernel = np.ones((side + 4, side + 4), np.uint8)
    for d in dicts:
        image, label = read_image(d["file_name"]), read_label(d["sem_seg_file_name"])
        pure = cv2.erode(label, kernel) == cv2.dilate(label, kernel)
        pure[:side] = pure[-side:] = pure[:, :side] = pure[:, -side:] = False
        for k in found:
            rows, columns = np.nonzero(pure & (label == k))
            for i in rng.permutation(len(rows))[:each]:
                top, left = rows[i] - side // 2, columns[i] - side // 2
                found[k].append(image[top : top + side, left : left + side].ravel())
    return {k: np.array(v, np.float32) for k, v in found.items()}


def nearest_neighbour_accuracy(
    train: dict[int, np.ndarray], val: dict[int, np.ndarray], first: int, second: int
) -> float:
    """Mean of both classes' accuracy when patches are told apart by the most similar ones."""
    count = min(len(train[first]), len(train[second]), 1500)
    known = np.concatenate([train[k][:: len(train[k]) // count][:count] for k in (first, second)])
    accuracies = []
    for k in (first, second):
        distances = (known**2).sum(1) - 2 * val[k] @ known.T
        nearest = np.argpartition(distances, 15, axis=1)[:, :15]
        says_first = (nearest < count).mean(axis=1) > 0.5
        accuracies.append((says_first == (k == first)).mean())
    return float(np.mean(accuracies))


def test_pairs_look_alike_and_others_do_not(datasets_folder: Path) -> None:
    train = patches(DatasetCatalog.get("scenes_sem_seg_train"))
    val = patches(DatasetCatalog.get("scenes_sem_seg_val"))
    for first, second in CLASSES_OF_MATERIAL.values():
        accuracy = nearest_neighbour_accuracy(train, val, first, second)
        assert 0.35 < accuracy < 0.62, (CLASSES[first], CLASSES[second], accuracy)
    names = ["sky", "cloud", "sun", "mountain", "grass"]
    kinds = [CLASSES.index(name) for name in names]
    for first, second in itertools.pairwise(kinds):
        accuracy = nearest_neighbour_accuracy(train, val, first, second)
        assert accuracy > 0.9, (CLASSES[first], CLASSES[second], accuracy)


def test_every_class_has_its_twin() -> None:
    twins = [label for pair in CLASSES_OF_MATERIAL.values() for label in pair]
    assert sorted(twins) == list(range(len(CLASSES)))


# ---- catalogs ----


@pytest.mark.parametrize("split", ["train", "val"])
def test_metadata(datasets_folder: Path, split: str) -> None:
    DatasetCatalog.get(f"scenes_sem_seg_{split}")
    metadata = MetadataCatalog.get(f"scenes_sem_seg_{split}")
    assert metadata.stuff_classes == CLASSES
    assert len(CLASSES) >= 8
    assert len({tuple(color) for color in metadata.stuff_colors}) == len(CLASSES)
    assert metadata.ignore_label == 255
    assert metadata.evaluator_type == "sem_seg"
    assert metadata.image_root == str(datasets_folder / "scenes" / "images" / split)
    assert metadata.sem_seg_root == str(datasets_folder / "scenes" / "annotations" / split)


def test_classes_are_written_beside_the_images(few: Path) -> None:
    description = json.loads((few / "classes.json").read_text())
    assert description["classes"] == CLASSES
    assert len(description["colors"]) == len(CLASSES)


def test_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(blocked))
    with pytest.raises(DataError, match="DETECTRON2_DATASETS") as info:
        DatasetCatalog.get("scenes_sem_seg_train")
    assert str(blocked) in str(info.value)


# ---- faults ----


def test_complete_dataset_is_left_alone(copy: Path) -> None:
    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in copy.rglob("*")}

    before = written()
    dicts = scenes.make_scenes(str(copy), FEW)
    assert written() == before
    assert {split: len(of_split) for split, of_split in dicts.items()} == FEW


def remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def delete_images(folder: Path) -> None:
    (folder / "images/train/00001.png").unlink()
    (folder / "annotations/val/00000.png").unlink()


def truncate_image(folder: Path) -> None:
    path = folder / "images/train/00002.png"
    path.write_bytes(path.read_bytes()[:-200])


def empty_label(folder: Path) -> None:
    (folder / "annotations/train/00002.png").write_bytes(b"")


def mix_up_images(folder: Path) -> None:
    shutil.copy(folder / "images/train/00000.png", folder / "images/train/00001.png")


def flip_bits_without_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    path = folder / "images/train/00003.png"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(bytes(content))


def leave_temporary_files(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    image = folder / "images/train/00004.png"
    image.rename(folder / "images/train/.00004.png.0123abcd.tmp")
    (folder / ".manifest.json.0123abcd.tmp").write_text("{")


def cut_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:100])


def empty_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{}")


def foreign_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"dataset": [], "files": 3}')


def binary_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b"\xff\xfe\x00")


def old_version(folder: Path) -> None:
    for path in folder.rglob("*.png"):
        current = f"version {scenes.GENERATOR_VERSION},".encode()
        assert current in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(current, b"version 0,"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["dataset"]["generator_version"] = 0
    (folder / "manifest.json").write_text(json.dumps(manifest))


def remove_everything(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "damage",
    [
        remove_manifest,
        delete_images,
        truncate_image,
        empty_label,
        mix_up_images,
        flip_bits_without_manifest,
        leave_temporary_files,
        cut_manifest,
        empty_manifest,
        foreign_manifest,
        binary_manifest,
        old_version,
        remove_everything,
    ],
)
def test_damage_is_repaired(damage: Any, copy: Path, few: Path) -> None:
    damage(copy)
    assert contents(copy) != contents(few)
    scenes.make_scenes(str(copy), FEW)
    assert contents(copy) == contents(few)


def test_only_what_is_missing_is_drawn(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    delete_images(copy)
    drawn = []

    def render(seed: int, split: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        drawn.append((split, index))
        return render_scene(seed, split, index)

    monkeypatch.setattr(scenes, "render_scene", render)
    scenes.make_scenes(str(copy), FEW)
    assert drawn == [(0, 1), (1, 0)]


@pytest.mark.parametrize("calls", [0, 1, 3, 7, 14, 15])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_interruption_at_any_file(
    calls: int, error: Any, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace
    done: list[str] = []

    def failing_replace(source: str, target: str) -> None:
        if len(done) == calls:
            raise error
        done.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing_replace)
        with pytest.raises((KeyboardInterrupt, DataError)):
            scenes.make_scenes(str(tmp_path), FEW)
    assert len(contents(tmp_path)) == calls
    assert not (tmp_path / "manifest.json").exists()
    scenes.make_scenes(str(tmp_path), FEW)
    assert contents(tmp_path) == contents(few)


def test_killed_process(few: Path, tmp_path: Path) -> None:
    process = start_drawing(tmp_path, {"train": 400, "val": 2})
    deadline = time.monotonic() + 120
    while len(list(tmp_path.rglob("*.png"))) < 4:
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not (tmp_path / "manifest.json").exists()
    scenes.make_scenes(str(tmp_path), FEW)
    after = contents(tmp_path)
    assert not [name for name in after if name.endswith(".tmp")]
    assert contents(few).items() <= after.items()


def test_processes_at_once(few: Path, tmp_path: Path) -> None:
    processes = [start_drawing(tmp_path, FEW) for _ in range(3)]
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert contents(tmp_path) == contents(few)


def test_two_processes_without_locks(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second process that draws while the first does, on a file system that cannot lock."""
    monkeypatch.setattr(scenes, "fcntl", None)
    nested: list[bool] = []

    def render(seed: int, split: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        if (split, index) == (0, 2) and not nested:
            nested.append(True)
            scenes.make_scenes(str(tmp_path), FEW)
        return render_scene(seed, split, index)

    monkeypatch.setattr(scenes, "render_scene", render)
    scenes.make_scenes(str(tmp_path), FEW)
    assert nested
    assert contents(tmp_path) == contents(few)


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'test'"):
        scenes.make_scenes(str(tmp_path / "scenes"), {"train": 1, "test": 1})
    assert not (tmp_path / "scenes").exists()
