"""Instances from a trained detector: in Python, on the command line, and with its priors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from PIL import Image

from semask import InstancePrediction, InstancePredictor, Predictor, load_config
from semask.cli import main
from semask.data import register_coco_folder
from semask.data.segments import panoptic_picture
from semask.errors import ConfigError
from semask.inference.model_outputs import prior_maps_of
from semask.tasks import build_task
from semask.visualize.instances import detection_texts, draw_instances
from tiny_instances import SMALL_MODEL, flat, two_boxes, write_dataset
from tiny_model import photograph

CONFIGS = Path(__file__).parents[1] / "configs"
MASK_RCNN = "coco/semask_swin_tiny_mask_rcnn_1x.yaml"
PANOPTIC = "coco/semask_swin_tiny_panoptic_fpn_1x.yaml"


@pytest.fixture(autouse=True)
def own(tmp_path: Path, catalogs: None, one_thread: None) -> None:
    """A dataset "own" whose categories the models have."""
    register_coco_folder("own", tmp_path / "images", write_dataset(tmp_path, [two_boxes()]))


def config(name: str = MASK_RCNN, **overrides: Any) -> CfgNode:
    keys: dict[str, Any] = {
        "DATASETS.TRAIN": ("own",),
        "DATASETS.TEST": ("own",),
        "INPUT.MIN_SIZE_TEST": 50,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
        "TEST.DETECTIONS_PER_IMAGE": 7,
        **{key.replace("__", "."): value for key, value in overrides.items()},
    }
    return load_config(str(CONFIGS / name), flat({**SMALL_MODEL, **keys}))


def weights(cfg: CfgNode, folder: Path) -> str:
    torch.manual_seed(0)
    path = folder / "model.pth"
    torch.save({"model": build_model(cfg).state_dict()}, path)
    return str(path)


def test_a_prediction_is_what_the_evaluation_sees(tmp_path: Path) -> None:
    cfg = config()
    predictor = InstancePredictor(cfg, weights(cfg, tmp_path))
    pixels = photograph(60, 90)
    found = predictor(pixels)
    inputs = build_task(cfg).build_mapper(is_train=False).transform(pixels)
    with torch.no_grad():
        expected = predictor.model([inputs])[0]["instances"]
    assert len(found) == len(expected) == 7
    assert np.all(np.diff(found.scores) <= 0)
    assert np.allclose(np.sort(found.scores), np.sort(expected.scores.numpy()))
    assert found.masks is not None
    assert found.masks.shape == (7, 60, 90)
    assert found.class_names == ("light", "dark")
    assert found.category_ids == (3, 7)
    assert found.priors is None
    assert found.prior_pictures() == {}
    assert found.overlay(min_score=0.0).shape == (60, 90, 3)
    assert np.array_equal(found.overlay(min_score=1.1), pixels)
    with pytest.raises(ValueError, match="alpha"):
        found.overlay(2)


def test_a_folder_is_predicted(tmp_path: Path) -> None:
    cfg = config()
    predictor = InstancePredictor(cfg, weights(cfg, tmp_path))
    for name in ("a.png", "sub/a.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph(50, 70)).save(tmp_path / "photos" / name)
    for path, prediction in predictor.predict_folder(tmp_path / "photos", priors=True):
        assert prediction.priors
        prediction.save(str(tmp_path / "out"), str(path.relative_to(tmp_path / "photos")))
    written = {str(path.relative_to(tmp_path / "out")) for path in tmp_path.rglob("out/**/*.json")}
    assert written == {"instances/a.png.json", "instances/sub/a.png.json"}


def test_priors_are_those_of_the_backbone_without_padding(tmp_path: Path) -> None:
    cfg = config()
    predictor = InstancePredictor(cfg, weights(cfg, tmp_path))
    found = predictor(photograph(50, 70), priors=True)
    assert found.priors is not None
    assert {name: maps.shape for name, maps in found.priors.items()} == {
        "prior2": (3, 13, 18),
        "prior3": (3, 7, 9),
        "prior4": (3, 4, 5),
        "prior5": (3, 2, 3),
    }
    assert found.prior is not None
    assert found.prior.shape == (50, 70)  # the image's size, as a semantic prediction's
    assert found.prior_names == ("light", "dark", "background")
    assert {picture.shape for picture in found.prior_pictures().values()} == {(50, 70, 3)}
    plain = predictor(photograph(50, 70))
    assert np.array_equal(plain.boxes, found.boxes)


def test_nothing_of_the_priors_stays_on_the_backbone() -> None:
    model = build_model(config()).eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        with prior_maps_of(model.backbone) as maps:
            levels = model.backbone(image)
        assert set(maps) == {"prior2", "prior3", "prior4", "prior5"}
        assert set(maps) <= set(levels)
        assert not set(maps) & set(model.backbone(image))


def test_results_in_cocos_format(tmp_path: Path) -> None:
    cfg = config()
    found = InstancePredictor(cfg, weights(cfg, tmp_path))(photograph(60, 90))
    results = json.loads(json.dumps(found.coco_results("a")))
    assert len(results) == 7
    assert found.masks is not None
    for index, result in enumerate(results):
        assert result["image_id"] == "a"
        assert result["category_id"] in (3, 7)
        x, y, w, h = result["bbox"]
        assert np.allclose([x, y, x + w, y + h], found.boxes[index], atol=1e-4)
        assert np.array_equal(mask_util.decode(result["segmentation"]) > 0, found.masks[index])


def test_boxes_alone(tmp_path: Path) -> None:
    cfg = config("coco/swin_tiny_retinanet_1x.yaml", MODEL__RETINANET__SCORE_THRESH_TEST=0.0)
    predictor = InstancePredictor(cfg, weights(cfg, tmp_path))
    found = predictor(photograph(60, 90))
    assert found.masks is None
    assert len(found) > 0
    assert "segmentation" not in found.coco_results(1)[0]
    assert found.overlay(min_score=0.0).shape == (60, 90, 3)
    with pytest.raises(ConfigError, match="no semantic priors"):
        predictor(photograph(60, 90), priors=True)


def test_a_predictor_is_that_of_the_task(tmp_path: Path) -> None:
    cfg = config()
    path = weights(cfg, tmp_path)
    predictor: Any = Predictor(cfg, path)
    assert isinstance(predictor, InstancePredictor)
    assert len(predictor(photograph(60, 90))) == 7
    with pytest.raises(ConfigError, match="Predictor"):
        InstancePredictor("ade20k/semask_swin_tiny_fpn", path)


def test_panoptic_segments(tmp_path: Path) -> None:
    cfg = config(PANOPTIC, MODEL__SEM_SEG_HEAD__NUM_CLASSES=4)
    found = InstancePredictor(cfg, weights(cfg, tmp_path))(photograph(60, 90), priors=True)
    assert found.panoptic is not None
    assert found.panoptic.shape == (60, 90)
    ids = {segment["id"] for segment in found.segments}
    assert set(np.unique(found.panoptic).tolist()) <= {0, *ids}
    assert len(found.prior_names) == 4
    assert found.stuff_names == ("class 0", "class 1", "class 2", "class 3")
    assert found.overlay().shape == (60, 90, 3)


def test_segments_are_drawn_with_their_names() -> None:
    panoptic = np.zeros((60, 90), np.int32)
    panoptic[:40], panoptic[40:, :30], panoptic[45:, 60:] = 1, 2, 3
    found = InstancePrediction(
        image=np.full((60, 90, 3), 200, np.uint8),
        boxes=np.zeros((0, 4), np.float32),
        scores=np.zeros(0, np.float32),
        classes=np.zeros(0, np.int64),
        each_mask=np.zeros((0, 60, 90), bool),
        class_names=("light",),
        category_ids=(3,),
        panoptic=panoptic,
        segments=(
            {"id": 1, "isthing": False, "category_id": 1},
            {"id": 2, "isthing": False, "category_id": 2},
            {"id": 3, "isthing": True, "category_id": 0},
            {"id": 4, "isthing": False, "category_id": 2},  # nowhere
        ),
        stuff_names=("things", "sky", "sea"),
        stuff_colors=np.array([[9, 9, 9], [0, 0, 100], [0, 100, 0]], np.uint8),
    )
    drawn = found.overlay(alpha=0.5)
    assert (drawn[10, 10] == (100, 100, 150)).all()
    assert (drawn[50, 15] == (100, 150, 100)).all()
    assert (drawn[41:45, 31:] == 200).all()  # no segment
    assert (drawn[46:, 61:] != 200).any(axis=-1).all()  # a thing
    assert (drawn[10:30, 20:70] == 30).any()  # the ground of the name


def test_panoptic_pictures_have_cocos_ids() -> None:
    ids = np.array([[0, 5], [300, 70000]], np.int32)
    picture = panoptic_picture(ids).astype(np.int64)
    assert np.array_equal(picture @ [1, 256, 65536], ids)


@pytest.mark.parametrize("name", [MASK_RCNN, PANOPTIC])
def test_command(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(name)
    path = weights(cfg, tmp_path)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photograph(40, 60)).save("a.png")
    Path("config.yaml").write_text(cfg.dump())
    arguments = ["a.png", "--config", "config.yaml", "--weights", path, "--output", "out"]
    assert main.run("predict", [*arguments, "--priors", "--min-score", "0"]) == 0
    assert capsys.readouterr().out.splitlines() == ["1 of 1 inputs segmented.", "out"]
    expected = [
        "classes.json",
        "instances/a.json",
        "overlay/a.png",
        *(f"prior{n}/a.png" for n in range(2, 6)),
    ]
    if name == PANOPTIC:
        expected += ["legend.png", "panoptic/a.json", "panoptic/a.png"]
    written = sorted(p.relative_to("out").as_posix() for p in Path("out").rglob("*.*"))
    assert written == sorted(expected)
    (result, *_) = json.loads(Path("out/instances/a.json").read_text())
    assert result.keys() == {"image_id", "category_id", "bbox", "score", "segmentation"}
    assert result["image_id"] == "a"
    described = json.loads(Path("out/classes.json").read_text())
    assert result["category_id"] in {entry["id"] for entry in described["classes"]}
    assert ("stuff" in described) == (name == PANOPTIC)


# ---- drawing ----


def test_drawn_instances_are_where_they_are() -> None:
    image = np.full((40, 60, 3), 200, np.uint8)
    masks = np.zeros((2, 40, 60), bool)
    masks[0, 5:15, 5:20] = True
    masks[1, 20:35, 30:50] = True
    boxes = np.array([[5, 5, 20, 15], [30, 20, 50, 35]], np.float32)
    drawn = draw_instances(image, boxes, masks)
    changed = (drawn != image).any(-1)
    assert np.array_equal(changed, masks.any(0))
    assert len(np.unique(drawn[masks[0]], axis=0)) <= 3
    boxes_alone = (draw_instances(image, boxes) != image).any(-1)
    assert boxes_alone[5, 5:20].all()
    assert not boxes_alone[8:12, 8:18].any()
    assert np.array_equal(draw_instances(image, np.zeros((0, 4)), None), image)


def test_texts() -> None:
    classes, scores = np.array([1, 0]), np.array([0.876, 0.5])
    assert detection_texts(classes, scores, ["a", "b"]) == ["b 0.88", "a 0.50"]
    assert detection_texts(np.array([0]), scores[:1], ["a"]) == ["0.88"]
    assert detection_texts(np.array([0]), None, ["a"]) == [""]
    image = np.full((40, 60, 3), 200, np.uint8)
    box = np.array([[20, 20, 40, 35]])
    named = draw_instances(image, box, texts=["a 0.88"])
    assert (named[8:20] == 255).any()
    crowd = np.repeat(box, 40, axis=0)
    assert not (draw_instances(image, crowd, texts=["a long name"] * 40) == 255).any()


def test_an_image_without_instances() -> None:
    empty = InstancePrediction(
        image=np.zeros((4, 5, 3), np.uint8),
        boxes=np.zeros((0, 4), np.float32),
        scores=np.zeros(0, np.float32),
        classes=np.zeros(0, np.int64),
        each_mask=np.zeros((0, 4, 5), bool),
        class_names=("a",),
        category_ids=(1,),
    )
    assert (len(empty), empty.coco_results(1)) == (0, [])
    assert np.array_equal(empty.overlay(), empty.image)


def test_texts_at_one_place_do_not_overprint() -> None:
    image = np.full((80, 80, 3), 128, np.uint8)
    box = np.array([[10.0, 20, 60, 70]])

    def paper(number: int) -> int:
        texts = [f"0.{index}8" for index in range(number)]
        drawn = draw_instances(image, np.repeat(box, number, axis=0), texts=texts)
        return int((drawn == 30).all(-1).sum())

    assert paper(3) > 2.5 * paper(1) > 0
