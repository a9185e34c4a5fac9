"""``semask check`` of panoptic datasets."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from semask.cli.main import main
from semask.data import register_panoptic_folder
from semask.data.checks.instances import check_instance_dataset
from semask.errors import DataError
from semask.report.panels import draw_record_segments
from tiny_instances import SIDE, two_boxes, write_dataset
from tiny_panoptic import two_boxes_on_stuff, write_panoptic

pytestmark = pytest.mark.usefixtures("catalogs")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(tmp_path, [two_boxes()] * 2)
    ids, entries = two_boxes_on_stuff()
    path = write_panoptic(tmp_path, [ids] * 2, [entries] * 2)
    register_panoptic_folder("own", tmp_path / "images", tmp_path / "panoptic", path)
    return tmp_path


def test_a_sound_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "own"]) == 0
    out = capsys.readouterr().out
    assert "| grass" in out
    assert "2 images with segments" in out
    assert "instance" not in out
    report = check_instance_dataset("own")
    assert report.problems == []
    assert report.categories == ["light", "dark", "grass", "sky"]
    assert dict(report.instances) == {0: 2, 1: 2, 2: 2, 3: 2}
    assert (report.empty, report.examined) == (0, 2)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["images"][0].update(id=[1]),
        lambda content: content["images"][0].update(id="a"),
        lambda content: content["images"][0].update(file_name=None),
        lambda content: content["categories"][0].update(id={}),
        lambda content: content["categories"][0].update(name=["a"]),
        lambda content: content["annotations"][0].update(image_id=None),
        lambda content: content["annotations"][0].update(segments_info=None),
        lambda content: content["annotations"][0]["segments_info"].insert(0, "x"),
        lambda content: content["annotations"][0]["segments_info"][0].update(id=[1]),
        lambda content: content["annotations"][0]["segments_info"][0].update(category_id=[1]),
    ],
)
def test_values_of_another_type(folder: Path, change: Callable[[Any], Any]) -> None:
    path = Path(MetadataCatalog.get("own").panoptic_json)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=path.name):
        DatasetCatalog.get("own")


def change_map(folder: Path, change: Callable[[np.ndarray], Any]) -> None:
    path = folder / "panoptic/1.png"
    pixels = np.array(Image.open(path))
    Image.fromarray(change(pixels)).save(path)


def recoloured(pixels: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    changed = pixels.copy()
    changed[(pixels == (4, 0, 0)).all(-1)] = color
    return changed


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        (lambda pixels: recoloured(pixels, (0, 0, 0)), {"segment without pixels"}),
        (
            lambda pixels: recoloured(pixels, (0, 1, 0)),
            {"segment without pixels", "pixels without a segment"},
        ),
        (
            lambda pixels: recoloured(pixels, (255, 255, 255)),
            {"segment without pixels", "pixels without a segment"},
        ),
        (lambda pixels: pixels[:-4], {"sizes differ"}),
    ],
)
def test_maps_that_do_not_fit(
    folder: Path, change: Callable[[np.ndarray], Any], kinds: set[str]
) -> None:
    change_map(folder, change)
    problems = check_instance_dataset("own").problems
    assert all("1.png" in problem.message for problem in problems)
    assert kinds <= {problem.kind for problem in problems}
    assert main(["check", "own"]) == 1


def test_a_map_that_is_not_there(folder: Path) -> None:
    (folder / "panoptic/0.png").unlink()
    (problem,) = check_instance_dataset("own").problems
    assert problem.kind == "unreadable"
    assert "0.png" in problem.message


def test_segments_alone_are_no_instances(folder: Path) -> None:
    """Where nothing is annotated at all, that is what is said."""
    content = json.loads((folder / "panoptic.json").read_text())
    for entry in content["annotations"]:
        entry["segments_info"] = []
    (folder / "panoptic.json").write_text(json.dumps(content))
    kinds = {problem.kind for problem in check_instance_dataset("own").problems}
    assert kinds == {"pixels without a segment", "nothing annotated"}


def test_the_picture_shows_segments(folder: Path) -> None:
    path = folder / "picture.png"
    assert main(["check", "own", "--picture", str(path), "--rows", "2"]) == 0
    (folder / "panoptic/0.png").unlink()
    (record,) = [r for r in DatasetCatalog.get("own") if r["image_id"] == 1]
    image = np.full((SIDE, SIDE, 3), 200, np.uint8)
    drawn = draw_record_segments(image, record, ["light", "dark", "grass", "sky"])
    ids, _ = two_boxes_on_stuff()
    assert ((drawn != 200).any(-1) == (ids > 0)).mean() > 0.95
    # A map that is missing leaves its image out.
    assert main(["check", "own", "--picture", str(path), "--rows", "2"]) == 1


def test_images_without_an_entry_are_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = json.loads((folder / "panoptic.json").read_text())
    del content["annotations"][0]
    (folder / "panoptic.json").write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING, "semask"):
        assert [record["image_id"] for record in DatasetCatalog.get("own")] == [1]
    assert "'0.png'" in caplog.text


def test_maps_that_cannot_hold_ids(folder: Path) -> None:
    """A JPEG changes colours; of 16 bits the upper eight would be read."""
    (path, *_) = [record["pan_seg_file_name"] for record in DatasetCatalog.get("own")]
    with Image.open(path) as image:
        picture = image.convert("RGB")
    picture.save(path, format="JPEG")
    (problem,) = check_instance_dataset("own").problems
    assert (problem.kind, "JPEG" in str(problem)) == ("unusable panoptic map", True)
    Image.fromarray(np.full((picture.height, picture.width), 7, np.uint16)).save(path, format="PNG")
    (problem,) = check_instance_dataset("own").problems
    assert (problem.kind, "I;16" in str(problem)) == ("unusable panoptic map", True)
    picture.convert("RGBA").save(path, format="PNG")
    assert check_instance_dataset("own").problems == []


def test_segments_of_a_dataset_registered_in_python(folder: Path) -> None:
    """Its dicts are the user's: what they lack is named, as what a file has wrongly."""
    records = DatasetCatalog.get("own")
    first, second, *_ = records[0]["segments_info"]
    second["category_id"] = "road"
    first.pop("id")
    DatasetCatalog.pop("own")
    DatasetCatalog.register("own", lambda: records)
    messages = [problem.message for problem in check_instance_dataset("own").problems]
    assert any("id None" in message for message in messages)
    assert any("'road'" in message for message in messages)
