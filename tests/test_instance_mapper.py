"""The training targets of detectors; single bad annotations do not end a training."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, PolygonMasks
from PIL import Image

from semask.config.loading import load_config
from semask.data import InstanceMapper, register_coco_folder
from semask.data.annotations import inspect, is_usable, list_problems
from semask.data.datasets.coco_folder import load_coco_folder
from semask.errors import ConfigError, DataError, UnreadableError
from semask.modeling.heads import PriorSupervision
from semask.modeling.heads.prior import PRIOR_TARGET
from semask.tasks import build_task
from tiny_instances import (
    SIDE,
    SMALL_MODEL,
    Annotations,
    box_annotation,
    box_polygon,
    flat,
    two_boxes,
    write_dataset,
)

CONFIGS = Path(__file__).parents[1] / "configs"


def config(name: str = "coco/semask_swin_tiny_mask_rcnn_1x.yaml", **overrides: Any) -> CfgNode:
    plain = {"INPUT.MIN_SIZE_TRAIN": [SIDE], "INPUT.RANDOM_FLIP": "none", "INPUT.MIN_SIZE_TEST": 0}
    keys = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_config(str(CONFIGS / name), flat({**SMALL_MODEL, **plain, **keys}))


def mapped(folder: Path, annotations: Annotations, cfg: CfgNode | None = None) -> dict[str, Any]:
    path = write_dataset(folder, [annotations])
    record = load_coco_folder(str(path), str(folder / "images"))[0]
    return InstanceMapper(cfg or config(), is_train=True)(record)


def test_what_a_detector_gets(tmp_path: Path) -> None:
    sample = mapped(tmp_path, two_boxes())
    assert (sample["image"].shape, sample["image"].dtype) == ((3, SIDE, SIDE), torch.uint8)
    assert (sample["height"], sample["width"], sample["image_id"]) == (SIDE, SIDE, 0)
    assert "annotations" not in sample
    found = sample["instances"]
    assert found.gt_boxes.tensor.tolist() == [[4, 6, 24, 30], [36, 30, 52, 50]]
    assert found.gt_classes.tolist() == [0, 1]
    assert isinstance(found.gt_masks, PolygonMasks)
    expected = torch.full((SIDE, SIDE), 2)
    expected[6:30, 4:24], expected[30:50, 36:52] = 0, 1
    assert torch.equal(sample["prior_target"], expected)


@pytest.mark.usefixtures("catalogs")
def test_no_module_is_built_to_know_whether_the_prior_is_supervised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a module was built")

    monkeypatch.setattr(torch.nn.Module, "__init__", refuse)
    monkeypatch.setattr(PriorSupervision, "__init__", refuse)
    path = write_dataset(tmp_path, [two_boxes()])
    register_coco_folder("own", tmp_path / "images", path)
    cfg = config(DATASETS__TRAIN=("own",), DATASETS__TEST=("own",), TEST__BEST_METRIC="bbox/AP")
    task = build_task(cfg)
    task.check_datasets(["own"], eval_only=False)
    task.check_images("own", is_train=True)
    sample = task.build_mapper(is_train=True)(DatasetCatalog.get("own")[0])
    assert PRIOR_TARGET in sample  # it is supervised
    with pytest.raises(AssertionError, match="module"):
        build_model(cfg)


def test_image_instances_and_target_are_augmented_alike(tmp_path: Path) -> None:
    cfg = config(INPUT__MIN_SIZE_TRAIN=[96, 128], INPUT__RANDOM_FLIP="horizontal")
    for seed in range(4):
        np.random.seed(seed)
        sample = mapped(tmp_path, [box_annotation(8, 12, 24, 16)], cfg)
        bright = sample["image"].float().mean(0) > 200
        inside = sample["prior_target"] == 0
        assert inside.shape == bright.shape
        edges = (bright != inside).float().mean()
        assert edges < 0.02  # antialiasing at the border
        (box,) = sample["instances"].gt_boxes.tensor.round().int().tolist()
        assert torch.equal(inside.nonzero().amin(0).flip(0), torch.tensor(box[:2])), (
            "the box of the target"
        )


def test_crops_clip_masks_and_boxes(tmp_path: Path) -> None:
    crop: dict[str, Any] = {
        "INPUT__CROP__ENABLED": True,
        "INPUT__CROP__TYPE": "absolute",
        "INPUT__CROP__SIZE": [32, 32],
        "INPUT__MIN_SIZE_TRAIN": [32],
    }
    for seed in range(6):
        np.random.seed(seed)
        sample = mapped(tmp_path, two_boxes(), config(**crop))
        bright = sample["image"].float().mean(0) > 200
        found = sample["instances"]
        if bright.any():
            light = found[found.gt_classes == 0]
            assert isinstance(light.gt_masks, BitMasks)
            assert torch.equal(light.gt_masks.tensor[0].bool(), bright)
            rows, columns = bright.nonzero().unbind(1)
            ends = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert light.gt_boxes.tensor[0].tolist() == [float(end) for end in ends]
        assert torch.equal(sample["prior_target"] == 0, bright)


def test_crowds_are_no_instances_and_ignored_in_the_target(tmp_path: Path) -> None:
    crowd = {**box_annotation(0, 0, 30, 10), "iscrowd": 1}
    mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
    mask[:10, :30] = 1
    runs = np.diff(np.flatnonzero(np.diff(mask.T.reshape(-1), prepend=2, append=2)))
    counts = [0, *runs.tolist()]  # begins with ones
    crowd["segmentation"] = {"counts": counts, "size": [SIDE, SIDE]}
    sample = mapped(tmp_path, [crowd, box_annotation(40, 40, 8, 8)])
    assert len(sample["instances"]) == 1
    assert torch.equal(sample["prior_target"] == 255, torch.from_numpy(mask).bool())


def rle(height: int, width: int) -> dict[str, Any]:
    mask = np.zeros((height, width), dtype=np.uint8, order="F")
    mask[4:20, 4:20] = 1
    encoded = mask_util.encode(mask)
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "two points": ({"segmentation": [[1, 1, 9, 9]]}, "fewer than three points"),
    "odd number": ({"segmentation": [[1, 1, 9, 9, 4, 7, 3]]}, "not a list of x, y"),
    "no numbers": ({"segmentation": [["a", 1, 9, 9, 4, 7]]}, "not a list of x, y"),
    "RLE of another size": ({"segmentation": rle(32, 32)}, "another size"),
    "RLE too short": (
        {"segmentation": {"size": [SIDE, SIDE], "counts": [3, 4]}},
        "damaged mask",
    ),
    "empty RLE": (
        {"segmentation": {"size": [SIDE, SIDE], "counts": [SIDE * SIDE]}},
        "empty mask",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_annotations_without_a_usable_mask_are_skipped_and_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    change, words = BAD[case]
    bad = {**box_annotation(4, 4, 16, 16), **change}
    with caplog.at_level(logging.WARNING, "semask"):
        sample = mapped(tmp_path, [bad, box_annotation(40, 40, 8, 8, category=7)])
    assert sample["instances"].gt_classes.tolist() == [1]
    assert (sample["prior_target"][4:20, 4:20] == 255).all()
    assert (sample["prior_target"] == 255).sum() == 16 * 16
    assert words in caplog.text
    assert "annotation 1 of" in caplog.text


def test_a_box_is_enough_for_a_detector_without_masks(tmp_path: Path) -> None:
    bad = {**box_annotation(4, 4, 16, 16), "segmentation": [[1, 1, 9, 9]]}
    cfg = config("coco/semask_swin_tiny_retinanet_1x.yaml")
    sample = mapped(tmp_path, [bad], cfg)
    assert len(sample["instances"]) == 1
    assert not sample["instances"].has("gt_masks")
    assert torch.equal((sample["prior_target"] == 0).nonzero().amax(0), torch.tensor([19, 19]))


@pytest.mark.parametrize(
    "box", [None, [], [1, 2, 3], [1, 2, float("nan"), 4], [5, 5, 0, 3], [99, 5, 4, 4], "x"]
)
def test_an_unusable_box_is_replaced_by_the_masks(tmp_path: Path, box: Any) -> None:
    annotation = {**box_annotation(4, 4, 16, 16), "bbox": box}
    record = {"file_name": "a.png", "height": SIDE, "width": SIDE, "annotations": [annotation]}
    found = inspect(annotation, SIDE, SIDE)
    assert found.box == [4, 4, 20, 20]
    assert len(found.problems) == 1
    counts, examples = list_problems([record])
    assert (counts.total(), list(examples)) == (1, found.problems)


def test_neither_box_nor_mask(tmp_path: Path) -> None:
    annotation = {"bbox": [5, 5, 0, 0], "category_id": 3}
    sample = mapped(tmp_path, [annotation])
    assert len(sample["instances"]) == 0
    assert (sample["prior_target"] == 2).all()


def test_of_several_polygons_the_sound_ones_are_kept(tmp_path: Path) -> None:
    annotation = box_annotation(4, 4, 16, 16)
    annotation["segmentation"].append([1, 1, 2, 2])
    sample = mapped(tmp_path, [annotation])
    assert [len(polygon) for polygon in sample["instances"].gt_masks.polygons[0]] == [8]


def test_polygons_beside_masks_are_bit_masks(tmp_path: Path) -> None:
    mixed = [{**box_annotation(4, 4, 16, 16), "segmentation": rle(SIDE, SIDE)}, *two_boxes()]
    found = mapped(tmp_path, mixed)["instances"]
    assert isinstance(found.gt_masks, BitMasks)
    assert found.gt_masks.tensor.sum((1, 2)).tolist() == [256, 480, 320]


def test_an_image_without_annotations(tmp_path: Path) -> None:
    sample = mapped(tmp_path, [])
    assert len(sample["instances"]) == 0
    assert (sample["prior_target"] == 2).all()


def test_2000_instances(tmp_path: Path) -> None:
    many = [box_annotation(n % 50, n // 50, 1, 1) for n in range(2000)]
    sample = mapped(tmp_path, many)
    assert len(sample["instances"]) == 2000
    assert int((sample["prior_target"] == 0).sum()) == 2000


def test_evaluation_gets_the_image_and_its_id(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, [two_boxes()])
    record = load_coco_folder(str(path), str(tmp_path / "images"))[0]
    sample = build_task(config()).build_mapper(is_train=False)(record)
    assert sample.keys() == {"file_name", "image_id", "height", "width", "image"}
    assert "annotations" in record


def broken_size(record: dict[str, Any]) -> None:
    record["width"] = 99


def broken_category(record: dict[str, Any]) -> None:
    record["annotations"][0]["category_id"] = 2


@pytest.mark.parametrize(
    ("change", "words"),
    [(broken_size, "64x64.*99x64"), (broken_category, "category 2.*0..1.*NUM_CLASSES")],
)
def test_what_is_wrong_with_the_whole_dataset_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    path = write_dataset(tmp_path, [two_boxes()])
    record = load_coco_folder(str(path), str(tmp_path / "images"))[0]
    change(record)
    with pytest.raises(DataError, match=words):
        InstanceMapper(config(), is_train=True)(record)


def test_a_missing_image_is_unreadable(tmp_path: Path) -> None:
    with pytest.raises(UnreadableError, match="nowhere"):
        InstanceMapper(config(), is_train=True)({"file_name": "nowhere.png", "annotations": []})


def test_without_supervision_there_is_no_target(tmp_path: Path) -> None:
    assert "prior_target" not in mapped(
        tmp_path, two_boxes(), config("coco/swin_tiny_mask_rcnn_1x.yaml")
    )
    cfg = config(MODEL__SEM_SEG_HEAD__PRIOR_LOSS_WEIGHT=0.0)
    assert "prior_target" not in mapped(tmp_path, two_boxes(), cfg)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("INPUT.FORMAT", "L"),
        ("INPUT.MASK_FORMAT", "rle"),
        ("INPUT.RANDOM_FLIP", "sideways"),
        ("MODEL.SEMASK.PRIOR_TARGET", "boxes"),
    ],
)
def test_settings_that_cannot_be_are_named(key: str, value: str) -> None:
    cfg = config(**{key.replace(".", "__"): value})
    with pytest.raises(ConfigError, match=key.split(".")[-1]):
        build_task(cfg).build_mapper(is_train=True)


def test_box_polygon_is_closed_around_its_pixels() -> None:
    assert inspect({"segmentation": [box_polygon(1, 2, 3, 4)]}, 9, 9).box == [1, 2, 4, 6]


def test_an_instance_outside_the_image_is_not_usable() -> None:
    """Neither its box nor that of its polygons; it would count as missed in AP."""
    annotation = {"bbox": [20, 2, 3, 4], "segmentation": [box_polygon(20, 2, 3, 4)]}
    found = inspect(annotation, 9, 9)
    assert (found.box, found.problems) == (None, ["box outside the image"])
    assert not is_usable(annotation, {"height": 9, "width": 9})


def test_a_panoptic_map_supervises_the_prior(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, [two_boxes()])
    record = load_coco_folder(str(path), str(tmp_path / "images"))[0]
    ids = np.zeros((SIDE, SIDE), dtype=np.int64)
    ids[:, 32:], ids[40:, :], ids[:8, :8] = 7, 300, 70000
    rgb = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=-1).astype(np.uint8)
    Image.fromarray(rgb).save(tmp_path / "panoptic.png")
    record["pan_seg_file_name"] = str(tmp_path / "panoptic.png")
    record["segments_info"] = [
        {"id": 7, "category_id": 1},
        {"id": 300, "category_id": 3},
        {"id": 70000, "category_id": 2, "iscrowd": 1},
    ]
    cfg = config("coco/semask_swin_tiny_panoptic_fpn_1x.yaml", MODEL__SEM_SEG_HEAD__NUM_CLASSES=4)
    sample = InstanceMapper(cfg, is_train=True)(record)
    expected = torch.full((SIDE, SIDE), 255)
    expected[:, 32:] = 1
    expected[40:, :] = 3
    assert torch.equal(sample["prior_target"], expected)
    assert torch.equal(sample["sem_seg"], expected)
    assert len(sample["instances"]) == 2
    assert not {"pan_seg_file_name", "segments_info"} & sample.keys()
    # The classes of mask classification's queries are others than those of the map.
    queries: dict[str, Any] = {
        "MODEL__SEM_SEG_HEAD__NUM_CLASSES": 2,
        "MODEL__SEMASK__NUM_CLASSES": 4,
        "MODEL__SEMASK__PRIOR_TARGET": "sem_seg",
        "INPUT__CROP__ENABLED": False,
    }
    former = config("nuclei/semask_mask2former.yaml", **queries)
    assert torch.equal(InstanceMapper(former, is_train=True)(record)["prior_target"], expected)
    record["segments_info"][0]["category_id"] = 4
    for wrong in (cfg, former):
        with pytest.raises(DataError, match=r"panoptic\.png"):
            InstanceMapper(wrong, is_train=True)(record)
