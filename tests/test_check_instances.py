"""Checking a dataset of instances: every defect is found, named, and told by the exit status."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from semask.cli import main
from semask.data import register_coco_folder
from semask.data.annotations import inspect, list_problems
from semask.data.checks.instances import check_instance_dataset, has_instances
from semask.errors import ConfigError
from tiny_instances import SIDE, box_annotation, two_boxes, write_dataset

Content = dict[str, Any]


pytestmark = pytest.mark.usefixtures("catalogs")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A sound dataset, registered as "own": three images, one of them without annotations."""
    crowd = {**box_annotation(0, 0, 30, 10), "iscrowd": 1}
    path = write_dataset(tmp_path, [two_boxes(), [], [*two_boxes(), crowd]])
    register_coco_folder("own", tmp_path / "images", path)
    return path


def change(file: Path, how: Callable[[Content], Any]) -> None:
    content = json.loads(file.read_text())
    how(content)
    file.write_text(json.dumps(content))


def annotation(**changes: Any) -> Callable[[Content], Any]:
    return lambda content: content["annotations"][0].update(changes)


def test_report_of_a_sound_dataset(file: Path) -> None:
    report = check_instance_dataset("own", threads=2)
    assert report.problems == []
    assert (report.listed, report.examined, report.empty, report.most) == (3, 3, 1, 2)
    assert (dict(report.instances), dict(report.images)) == ({0: 2, 1: 2}, {0: 2, 1: 2})
    assert (report.crowds, report.boxes_alone) == (1, 0)
    assert report.sizes == {(SIDE, SIDE): 3}
    text = report.text()
    assert "Dataset 'own': 3 images with instances" in text
    assert "|       1 | dark       |           2 |        2 |" in text
    assert "1 image without an instance" in text
    assert text.endswith("No problems.")
    plain = json.loads(json.dumps(report.as_dict()))
    assert plain["categories"][0] == {"name": "light", "instances": 2, "images": 2}


def test_many_instances_ask_for_a_higher_limit(tmp_path: Path) -> None:
    many = [box_annotation(3 * (n % 20), 3 * (n // 20), 2, 2) for n in range(400)]
    register_coco_folder("many", tmp_path / "images", write_dataset(tmp_path, [many]))
    report = check_instance_dataset("many")
    assert (report.most, report.problems) == (400, [])
    assert "has 400 instances; set TEST.DETECTIONS_PER_IMAGE" in report.text()
    assert report.absent == ["dark"]


RLE_OF_ANOTHER_SIZE = {"size": [9, 9], "counts": [40, 41]}
DEFECTS: dict[str, tuple[Callable[[Content], Any], str, str]] = {
    "box outside": (annotation(bbox=[99, 5, 4, 4]), "box outside the image", "annotation 1 of '"),
    "empty box": (annotation(bbox=[5, 5, 0, 4]), "box without area", "annotation 1"),
    "no box": (annotation(bbox=None), "no box of four numbers", "annotation 1"),
    "two points": (
        annotation(segmentation=[[1, 1, 9, 9]]),
        "polygon with fewer than three points",
        "annotation 1",
    ),
    "odd": (
        annotation(segmentation=[[1] * 7]),
        "polygon that is not a list of x, y",
        "annotation 1",
    ),
    "RLE": (
        annotation(segmentation=RLE_OF_ANOTHER_SIZE),
        "mask (RLE) of another size than the image",
        "annotation 1",
    ),
    "category": (annotation(category_id=99), "cannot be listed", "annotation 1 with 99"),
    "image id": (annotation(image_id=99), "cannot be listed", "image_id that is not in 'images'"),
    "duplicate": (
        lambda content: content["annotations"].append(content["annotations"][1]),
        "cannot be listed",
        "1 ids more than once in 'annotations': 2",
    ),
    "mixed ids": (annotation(id="one"), "cannot be listed", "neither all integers"),
    "no list": (lambda content: content.pop("images"), "cannot be listed", "needs 'images'"),
    "crowd flag": (annotation(iscrowd="0"), "cannot be listed", "annotation 1 with '0'"),
    "outside": (
        lambda content: content["images"][0].update(file_name="../images/0.png"),
        "cannot be listed",
        "the first is '../images/0.png'",
    ),
    "huge number": (annotation(bbox=[10**400, 1, 2, 3]), "no box of four numbers", "annotation 1"),
    "size": (
        lambda content: content["images"][0].update(width=SIDE + 1),
        "sizes differ",
        f"states {SIDE + 1}x{SIDE}",
    ),
    "missing image": (
        lambda content: content["images"][0].update(file_name="nowhere.png"),
        "unreadable",
        "nowhere.png",
    ),
    "image without a size": (
        lambda content: content["images"][0].update(width=None),
        "cannot be listed",
        "has 1 entries of 'images' that need file_name as a string, height and width as integers",
    ),
    "name twice": (
        lambda content: content["categories"][1].update(name="light"),
        "cannot be listed",
        "has 2 'categories' with the name 'light'",
    ),
    "nothing": (
        lambda content: content.update(annotations=[]),
        "nothing annotated",
        "no annotated instance to train on",
    ),
}


@pytest.mark.parametrize("case", DEFECTS)
def test_every_defect_is_in_the_report(
    file: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    how, kind, words = DEFECTS[case]
    change(file, how)
    report = check_instance_dataset("own")
    (problem,) = report.problems
    assert problem.kind == kind
    assert words in problem.message
    assert main.run("check", ["own", "--threads", "1"]) == 1
    out = capsys.readouterr().out
    assert kind in out
    assert words in out


def test_each_annotation_counts_once_however_many_parts_it_has(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change(file, annotation(segmentation=[[1, 1, 9, 9]] * 8))
    (problem,) = check_instance_dataset("own").problems
    assert "annotation 1" in problem.message
    counts, _ = list_problems(DatasetCatalog.get("own"), masks=True)
    assert counts == {"polygon with fewer than three points": 1}


RECTANGLE = [4.0, 6.0, 24.0, 6.0, 24.0, 30.0, 4.0, 30.0]
POINTS = [[4, 6], [24, 6], [24, 30], [4, 30]]


@pytest.mark.parametrize("given", [[RECTANGLE], RECTANGLE, POINTS, [POINTS]])
def test_polygons_as_people_write_them(given: list[Any]) -> None:
    found = inspect({"bbox": [4, 6, 20, 24], "segmentation": given}, SIDE, SIDE)
    assert found.problems == []
    assert isinstance(found.segmentation, list)
    (polygon,) = found.segmentation
    assert polygon.tolist() == RECTANGLE


@pytest.mark.parametrize("given", [[[1, 2], [3, 4]], [1, 2, 3], "polygon", 5, [[[1, 2], [3]]]])
def test_polygons_that_mean_nothing(given: Any) -> None:
    found = inspect({"bbox": [4, 6, 20, 24], "segmentation": given}, SIDE, SIDE)
    assert found.segmentation is None
    assert len(found.problems) == 1


def test_a_file_tells_everything_that_is_wrong_with_it(file: Path) -> None:
    def break_all(content: Content) -> None:
        content["annotations"].append(dict(content["annotations"][0]))
        content["annotations"][1]["category_id"] = 5
        content["annotations"][2]["image_id"] = 99
        content["images"].append(content["images"][0])

    change(file, break_all)
    kinds = [problem.message for problem in check_instance_dataset("own").problems]
    assert len(kinds) == 4
    assert all(str(file) in message for message in kinds)


def test_categories_of_other_loaders_are_looked_at(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8, 3), 99, np.uint8)).save(tmp_path / "a.png")
    entries = [{"bbox": [1, 1, 4, 4], "bbox_mode": 1, "category_id": number} for number in (0, 2)]
    record = {"file_name": str(tmp_path / "a.png"), "image_id": 1, "annotations": entries}
    DatasetCatalog.register("other", lambda: [record])
    with pytest.raises(ConfigError, match="thing_classes"):
        check_instance_dataset("other")
    MetadataCatalog.get("other").thing_classes = ["a", "b"]
    assert has_instances("other")
    report = check_instance_dataset("other")
    (problem,) = report.problems
    assert (problem.kind, report.boxes_alone) == ("unknown category", 1)
    assert "has the category 2; there are 0..1" in problem.message


def test_command_on_a_folder(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, report = tmp_path / "a.png", tmp_path / "r.json"
    own = ["--images", str(tmp_path / "images"), "--annotations", str(file)]
    assert main.run("check", [*own, "--picture", str(picture), "--json", str(report)]) == 0
    assert "Dataset 'folder': 3 images with instances" in capsys.readouterr().out
    assert np.ptp(np.array(Image.open(picture))) > 0
    (document,) = json.loads(report.read_text())
    assert document["images_without_instances"] == 1
    assert main.run("check", own[2:]) == 2
    assert main.run("check", [*own, "--classes", "a"]) == 2
    assert "is used with --images only" in capsys.readouterr().err


def test_semantic_datasets_are_told_apart() -> None:
    assert has_instances("nuclei_instances_train")
    assert has_instances("coco_2017_val")
    assert has_instances("coco_2017_val_panoptic_separated")
    assert not has_instances("camvid_sem_seg_val")
    with pytest.raises(ConfigError, match="no dataset 'nuclei'"):
        has_instances("nuclei")
