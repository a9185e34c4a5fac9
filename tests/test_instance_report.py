"""The report of an evaluation of instances, and the scores of single images behind it."""

import base64
import io
import json
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train_net
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import nn

import tiny
from semask import load_config
from semask.data import register_coco_folder
from semask.errors import DataError
from semask.evaluation.matching import FALSE, IN_CROWD, match_instances
from semask.report.instances import category_ap, show_instances, write_instance_report
from semask.report.panels import render_instance_samples
from semask.tasks import build_task
from tiny_instances import SIDE, SMALL_MODEL, box_annotation, flat, two_boxes, write_dataset

CONFIGS = Path(__file__).parents[1] / "configs"


pytestmark = pytest.mark.usefixtures("catalogs", "one_thread")


# ---- scores of an image ----


def box(x: float, y: float, side: float = 10) -> list[float]:
    return [x, y, side, side]


def test_each_instance_is_given_once() -> None:
    truth = [box(0, 0), box(20, 0), box(40, 0)]
    found = [box(1, 0), box(0, 0), box(20, 4), box(21, 0), box(40, 0)]
    matching = match_instances(found, [0, 0, 0, 0, 1], truth, [0, 0, 0], [False] * 3)
    # The second comes too late, the third has an IoU of 60 / 140, the last is of another category.
    assert matching.found == (0, FALSE, FALSE, 1, FALSE)
    assert matching.missed == (2,)
    assert matching.f1 == pytest.approx(200 * 2 / (4 + 3 + 1))


def test_crowds_count_neither_way() -> None:
    truth = [[0, 0, 50, 50], box(60, 0)]
    matching = match_instances([box(5, 5), box(60, 0)], [0, 0], truth, [0, 0], [True, False])
    assert matching.found == (IN_CROWD, 1)
    assert matching.missed == ()
    assert matching.f1 == 100


def test_nothing_to_find() -> None:
    assert match_instances([], [], [], [], []).f1 is None
    assert match_instances([box(0, 0)], [0], [], [], []).f1 == 0
    assert match_instances([], [], [box(0, 0)], [0], [False]).missed == (0,)


def test_ap_of_categories() -> None:
    assert category_ap({"AP": 4.0}, ["a"]).tolist() == [4]
    values = category_ap({"AP": 4.0, "AP-a": 3.0, "AP-b": float("nan")}, ["a", "b", "c"])
    assert values[0] == 3
    assert np.isnan(values[1:]).all()


# ---- the page ----


def options(folder: Path) -> dict[str, Any]:
    for name in ("reported_train", "reported_val"):
        path = write_dataset(folder, [two_boxes(), [], two_boxes()], f"{name}.json")
        register_coco_folder(name, folder / "images", path)
    return {
        **SMALL_MODEL,
        "DATASETS.TRAIN": ("reported_train",),
        "DATASETS.TEST": ("reported_val",),
        "INPUT.MIN_SIZE_TRAIN": [64],
        "INPUT.MIN_SIZE_TEST": 0,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.MAX_ITER": 1,
        "SOLVER.STEPS": [],
        "DATALOADER.NUM_WORKERS": 0,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
        "OUTPUT_DIR": str(folder / "out"),
    }


@pytest.mark.parametrize("name", ["semask_swin_tiny_mask_rcnn_1x", "swin_tiny_retinanet_1x"])
def test_a_run_leaves_a_report(tmp_path: Path, name: str) -> None:
    config = str(CONFIGS / "coco" / f"{name}.yaml")
    keys = options(tmp_path)
    with tiny.own_loggers():
        assert train_net.run(["--config-file", config, *map(str, flat(keys))]) == 0
    folder = tmp_path / "out/inference/reported_val"
    document = json.loads((folder / "instance_evaluation.json").read_text())
    assert document["categories"] == ["light", "dark"]
    assert [image["instances"] for image in document["images"]] == [2, 0, 2]
    assert document["masks"] == ("mask" in name)
    page = (folder / "report.html").read_text()
    root = ET.fromstring(page.split("\n", 1)[1])
    assert root.tag == "html"
    titles = ["".join(element.itertext()) for element in root.iter("figcaption")]
    for title in ("Image", "Ground truth", "Prediction", "Errors"):
        assert title in titles
    assert any(title.startswith("Prior, stride 4") for title in titles) == ("semask" in name)
    assert all(image.attrib["src"].startswith("data:image/") for image in root.iter("img"))
    assert "http" not in page.replace('http-equiv="', "")
    words = " ".join("".join(root.itertext()).split())
    assert "light" in words
    assert ("Mask AP50" in words) == ("mask" in name)


class Blind(nn.Module):
    """A detector without predictions."""

    def forward(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        found = Instances((SIDE, SIDE))
        found.pred_boxes, found.scores = Boxes(torch.zeros(0, 4)), torch.zeros(0)
        found.pred_classes = torch.zeros(0, dtype=torch.int64)
        found.pred_masks = torch.zeros(0, SIDE, SIDE, dtype=torch.bool)
        return [{"instances": found}]


@pytest.mark.parametrize("masks", [True, False])
def test_what_the_evaluation_passes_over_is_not_drawn_as_missed(
    tmp_path: Path, masks: bool
) -> None:
    """A box whose mask cannot be used counts for boxes alone."""
    entry = {**box_annotation(8, 8, 40, 40), "segmentation": [[1, 2, 3, 4]]}
    register_coco_folder("own", tmp_path / "images", write_dataset(tmp_path, [[entry]]))
    (record,) = DatasetCatalog.get("own")
    scores = {"instances": 1, "right": 0, "false": 0, "missed": 1, "F1": 0.0}
    shown = show_instances(Blind(), record, scores, dict, dataset_name="own", masks=masks)
    (uri,) = (picture.uri for picture in shown.pictures if picture.title == "Errors")
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))), np.int64)
    assert (np.ptp(pixels, axis=-1).max() > 60) == (not masks)


def test_a_report_needs_its_evaluation(tmp_path: Path) -> None:
    keys = options(tmp_path)
    cfg = load_config(str(CONFIGS / "coco/swin_tiny_mask_rcnn_1x.yaml"), flat(keys))
    model, mapper = build_model(cfg), build_task(cfg).build_mapper(is_train=False)
    with pytest.raises(DataError, match="no evaluation"):
        write_instance_report(model, "reported_val", mapper, str(tmp_path))
    (tmp_path / "instance_evaluation.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        write_instance_report(model, "reported_val", mapper, str(tmp_path))
    (tmp_path / "instance_evaluation.json").write_text('{"dataset": "other"}')
    with pytest.raises(DataError, match="an evaluation of 'other'"):
        write_instance_report(model, "reported_val", mapper, str(tmp_path))
    assert model.training


def test_pictures_of_samples_have_their_file_names(tmp_path: Path) -> None:
    register_coco_folder("own", tmp_path / "images", write_dataset(tmp_path, [two_boxes()]))
    (record,) = DatasetCatalog.get("own")
    other = shutil.copy(record["file_name"], tmp_path / "another name.png")
    pictures = [
        render_instance_samples("own", [{**record, "file_name": name}])
        for name in (record["file_name"], str(other))
    ]
    assert pictures[0] is not None
    assert pictures[1] is not None
    rows = np.flatnonzero((pictures[0] != pictures[1]).any(axis=(1, 2)))
    assert rows.size
    assert rows.min() > SIDE
