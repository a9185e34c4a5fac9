"""Datasets in COCO's format: registered in a line or by a config, and trained on to the end."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train_net
from detectron2.data import DatasetCatalog, MetadataCatalog

import tiny
from semask import load_config
from semask.data import register_coco_folder, register_config_folders
from semask.data.annotations import list_problems
from semask.data.datasets.coco_folder import load_coco_folder
from semask.engine import check_run
from semask.errors import ConfigError, DataError
from semask.evaluation.instance_evaluators import InstanceEvaluator
from semask.tasks import build_task
from tiny_instances import SMALL_MODEL, box_annotation, flat, two_boxes, write_dataset

CONFIGS = Path(__file__).parents[1] / "configs"
EXAMPLE = str(CONFIGS / "own_dataset/semask_coco_example.yaml")
SMALL_EXAMPLE = str(CONFIGS / "own_dataset/semask_coco_small_example.yaml")


pytestmark = pytest.mark.usefixtures("catalogs", "one_thread")


def write_both(folder: Path) -> None:
    """The layout of the example config, with an image without annotations and a bad one."""
    bad = {**box_annotation(4, 40, 9, 9), "segmentation": [[1, 2, 3, 4]]}
    for split in ("train", "val"):
        (folder / "annotations").mkdir(parents=True, exist_ok=True)
        path = write_dataset(folder / split, [two_boxes(), [], [*two_boxes(), bad]])
        content = json.loads(path.read_text())
        for image in content["images"]:
            image["file_name"] = f"{split}_{image['file_name']}"
        (folder / "images" / split).mkdir(parents=True)
        for file in (folder / split / "images").iterdir():
            file.rename(folder / "images" / split / f"{split}_{file.name}")
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


# ---- in a line of Python ----


def test_a_folder_is_registered_in_a_line(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, [two_boxes(), []])
    register_coco_folder("own", tmp_path / "images", path)
    register_coco_folder("own", tmp_path / "images", path)  # the same again
    records = DatasetCatalog.get("own")
    assert [len(record["annotations"]) for record in records] == [2, 0]
    assert [entry["category_id"] for entry in records[0]["annotations"]] == [0, 1]
    assert records[0]["file_name"] == str(tmp_path / "images" / "0.png")
    metadata = MetadataCatalog.get("own")
    assert metadata.thing_classes == ["light", "dark"]
    assert metadata.thing_dataset_id_to_contiguous_id == {3: 0, 7: 1}
    assert (metadata.evaluator_type, metadata.json_file) == ("coco", str(path))
    with pytest.raises(ValueError, match="image_root"):
        register_coco_folder("own", tmp_path, path)


def test_a_name_is_registered_again(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, [two_boxes()])
    register_coco_folder("own", tmp_path, path)
    register_coco_folder("own", tmp_path / "images", path, replace=True)
    assert DatasetCatalog.get("own")[0]["file_name"] == str(tmp_path / "images" / "0.png")


def test_a_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    """As editors on Windows write it; for training and evaluation."""
    path = write_dataset(tmp_path, [two_boxes(), []])
    path.write_text(path.read_text(), encoding="utf-8-sig")
    register_coco_folder("own", tmp_path / "images", path)
    assert len(DatasetCatalog.get("own")) == 2
    assert len(InstanceEvaluator("own", str(tmp_path), masks=False).truth.anns) == 2


@pytest.mark.parametrize("absolute", [False, True])
def test_files_outside_the_folder_need_a_key(tmp_path: Path, absolute: bool) -> None:
    path = write_dataset(tmp_path, [two_boxes()])
    content = json.loads(path.read_text())
    target = tmp_path / "images" / "0.png"
    name = str(target) if absolute else "sub/../../images/0.png"
    content["images"][0]["file_name"] = name
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"{name}.*ALLOW_OUTSIDE"):
        load_coco_folder(str(path), str(tmp_path / "images"))
    (record,) = load_coco_folder(str(path), str(tmp_path / "images"), allow_outside=True)
    assert Path(record["file_name"]).resolve() == target


def without(part: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.pop(part)


def emptied(part: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.update({part: []})


def repeated(part: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[part].append(content[part][0])


def first(part: str, **changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[part][0].update(changes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("annotations"), "not in COCO's format.*'annotations'"),
        (emptied("images"), "has no images"),
        (emptied("categories"), "has no categories"),
        (repeated("annotations"), "1 ids more than once in 'annotations': 1"),
        (repeated("images"), "more than once in 'images': 0"),
        (first("annotations", category_id=5), "category_id that is not in.*annotation 1.*5"),
        (first("annotations", image_id=9), "image_id that is not in.*annotation 1.*9"),
        (
            lambda content: content["images"][0].pop("width"),
            "of 'images' that are not .* has no width",
        ),
        (first("images", height=0), "1 entries of 'images' .* the first is .*'height': 0"),
        (first("images", width="64"), "height and width as integers"),
        (first("images", file_name=5), "need file_name as a string"),
        (first("categories", name=5), "1 entries of 'categories' that need name as a string"),
        (first("categories", name="dark"), "2 'categories' with the name 'dark'"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    path = write_dataset(tmp_path, [two_boxes()])
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=words) as caught:
        load_coco_folder(str(path), "images")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "cannot be read"), ("[" * 100_000, "nested too deeply"), ("[]", "not in COCO's")],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=words):
        load_coco_folder(str(tmp_path / "a.json"), "images")
    with pytest.raises(DataError, match="annotation file"):
        load_coco_folder(str(tmp_path / "b.json"), "images")


# ---- from a config ----


def options(folder: Path, **more: Any) -> list[Any]:
    return flat(
        {
            **SMALL_MODEL,
            "MODEL.ROI_HEADS.NUM_CLASSES": 0,
            "DATASETS.FOLDER_ROOT": str(folder),
            "INPUT.MIN_SIZE_TRAIN": [64],
            "INPUT.MIN_SIZE_TEST": 0,
            "SOLVER.IMS_PER_BATCH": 2,
            "SOLVER.MAX_ITER": 2,
            "SOLVER.STEPS": [],
            "DATALOADER.NUM_WORKERS": 0,
            "OUTPUT_DIR": str(folder / "out"),
            **{key.replace("__", "."): value for key, value in more.items()},
        }
    )


def test_the_categories_are_those_of_the_dataset(tmp_path: Path) -> None:
    write_both(tmp_path)
    cfg = load_config(EXAMPLE, options(tmp_path))
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2
    cfg = load_config(
        EXAMPLE,
        options(
            tmp_path,
            MODEL__META_ARCHITECTURE="SeMaskRetinaNet",
            MODEL__RETINANET__NUM_CLASSES=0,
        ),
    )
    assert (cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.RETINANET.NUM_CLASSES) == (0, 2)
    register_config_folders(cfg)  # once more, as in a process that is started
    assert len(DatasetCatalog.get("own_instances_val")) == 3


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("x", "must be a mapping"),
        ({"NAME": "a", "IMAGE_DIR": "i"}, "needs JSON_FILE"),
        ({"NAME": "a", "IMAGE_DIR": "i", "JSON_FILE": "j", "JSONFILE": 1}, "Did you mean 'JSON_F"),
        ({"NAME": "scenes_sem_seg_val", "IMAGE_DIR": "i", "JSON_FILE": "j"}, "registered already"),
    ],
)
def test_a_wrong_entry_is_named(entry: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"COCO_FOLDERS\[0\].*{words}"):
        load_config("", flat({"DATASETS.COCO_FOLDERS": [entry]}))


def test_a_missing_file_is_a_sentence(tmp_path: Path) -> None:
    cfg = load_config(EXAMPLE, options(tmp_path))  # a config can be read without its data
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 0
    with pytest.raises(DataError, match=r"instances_train\.json"):
        check_run(cfg)


# ---- whole runs ----


@pytest.mark.parametrize("example", [EXAMPLE, SMALL_EXAMPLE])
def test_training_and_evaluation_from_a_config_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, example: str
) -> None:
    write_both(tmp_path)
    argv = ["--config-file", example, *map(str, options(tmp_path))]
    with tiny.own_loggers(), caplog.at_level(logging.WARNING, "semask"):
        assert train_net.run(argv) == 0
    metrics = [json.loads(line) for line in (tmp_path / "out/metrics.json").open()]
    names = {"loss_prior", "loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"}
    assert names <= metrics[0].keys()
    assert {"bbox/AP", "segm/AP50"} <= {key for line in metrics for key in line}
    assert (tmp_path / "out/model_final.pth").is_file()
    assert (tmp_path / "out/inference/own_instances_val/coco_instances_results.json").is_file()
    assert "1 of 5 annotations" in caplog.text


def test_resuming_goes_on(tmp_path: Path) -> None:
    write_both(tmp_path)
    argv = ["--config-file", EXAMPLE, *map(str, options(tmp_path, SOLVER__MAX_ITER=1))]
    with tiny.own_loggers():
        assert train_net.run(argv) == 0
    argv = ["--resume", "--config-file", EXAMPLE, *map(str, options(tmp_path))]
    with tiny.own_loggers():
        assert train_net.run(argv) == 0
    iterations = {json.loads(line)["iteration"] for line in (tmp_path / "out/metrics.json").open()}
    assert 1 in iterations


def test_images_without_annotations_can_be_kept(tmp_path: Path) -> None:
    write_both(tmp_path)
    keys = {"DATALOADER__FILTER_EMPTY_ANNOTATIONS": False, "SOLVER__IMS_PER_BATCH": 3}
    argv = ["--config-file", EXAMPLE, *map(str, options(tmp_path, **keys))]
    with tiny.own_loggers():
        assert train_net.run([*argv, "DATASETS.TEST", "()"]) == 0


def test_check_run_holds_the_datasets_against_the_model(tmp_path: Path) -> None:
    write_both(tmp_path)

    def checked(**more: Any) -> None:
        check_run(load_config(EXAMPLE, options(tmp_path, **more)))

    checked()
    with pytest.raises(ConfigError, match=r"\b2\b.*MODEL\.ROI_HEADS\.NUM_CLASSES is 80"):
        checked(MODEL__ROI_HEADS__NUM_CLASSES=80)
    with pytest.raises(ConfigError, match=r"MODEL\.SEMASK\.NUM_CLASSES is 2.*has 3 classes"):
        checked(MODEL__SEMASK__NUM_CLASSES=2)
    with pytest.raises(ConfigError, match="no semantic classes"):
        checked(MODEL__SEMASK__PRIOR_TARGET="sem_seg")
    with pytest.raises(ConfigError, match="no dataset '"):
        checked(DATASETS__TRAIN=["own_instances_trian"])
    with pytest.raises(ConfigError, match=r"TEST\.BEST_METRIC is 'segm/AP'.*'bbox/AP'"):
        checked(MODEL__MASK_ON=False)
    checked(MODEL__MASK_ON=False, TEST__BEST_METRIC="bbox/AP")
    retinanet = {
        "MODEL__META_ARCHITECTURE": "SeMaskRetinaNet",
        "MODEL__RETINANET__NUM_CLASSES": 0,
        "TEST__BEST_METRIC": "bbox/AP",
    }
    with pytest.raises(ConfigError, match=r"'p7'; .*'build_semask_swin_fpn_backbone'"):
        checked(**retinanet)
    checked(
        **retinanet,
        MODEL__BACKBONE__NAME="build_retinanet_semask_swin_fpn_backbone",
        MODEL__FPN__IN_FEATURES=["res3", "res4", "res5"],
    )
    next((tmp_path / "images/train").glob("*_2.png")).write_bytes(b"no image")
    with pytest.raises(DataError, match=r"_2\.png"):
        checked()


def test_a_dataset_without_instances_is_refused(tmp_path: Path) -> None:
    register_coco_folder("empty", tmp_path / "images", write_dataset(tmp_path, [[], []]))
    cfg = load_config(EXAMPLE, options(tmp_path, DATASETS__TRAIN=["empty"], DATASETS__TEST=[]))
    with pytest.raises(DataError, match="'empty'"):
        check_run(cfg)


def rewrite(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["categories"][1].update(name="black"),
        lambda content: content["categories"].append({"id": 9, "name": "grey"}),
    ],
)
def test_categories_that_differ_between_the_datasets_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    """A class index has to mean the same in training and in evaluation."""
    write_both(tmp_path)
    rewrite(tmp_path / "annotations/instances_val.json", change)
    cfg = load_config(EXAMPLE, options(tmp_path))
    with pytest.raises(
        ConfigError, match=r"number \d is '\w+' in dataset 'own_instances_train' and"
    ):
        check_run(cfg)


@pytest.mark.parametrize("masks", [None, [], [[1, 2, 3, 4]]])
def test_boxes_alone_do_not_train_a_detector_of_masks(tmp_path: Path, masks: Any) -> None:
    write_both(tmp_path)
    rewrite(
        tmp_path / "annotations/instances_train.json",
        lambda content: [a.update(segmentation=masks) for a in content["annotations"]],
    )
    with pytest.raises(DataError, match=r"no annotated instance .* with a mask.*MASK_ON False"):
        check_run(load_config(EXAMPLE, options(tmp_path)))
    if masks:
        with pytest.raises(DataError, match="correct the masks"):
            check_run(load_config(EXAMPLE, options(tmp_path)))
    boxes = {"MODEL__MASK_ON": False, "TEST__BEST_METRIC": "bbox/AP"}
    check_run(load_config(EXAMPLE, options(tmp_path, **boxes)))


def test_an_evaluation_without_annotations_points_to_predict(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_both(tmp_path)
    path = tmp_path / "annotations/instances_val.json"
    rewrite(path, lambda content: content["annotations"].clear())
    check_run(load_config(EXAMPLE, options(tmp_path)))
    assert "'own_instances_val'" in caplog.text
    assert "semask predict" in caplog.text
    path.unlink()
    with pytest.raises(DataError, match=r"instances_val\.json.*semask predict"):
        check_run(load_config(EXAMPLE, options(tmp_path)))


def test_more_instances_than_detections_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_both(tmp_path)
    check_run(load_config(EXAMPLE, options(tmp_path, TEST__DETECTIONS_PER_IMAGE=3)))
    assert "TEST.DETECTIONS_PER_IMAGE" not in caplog.text
    check_run(load_config(EXAMPLE, options(tmp_path, TEST__DETECTIONS_PER_IMAGE=2)))
    assert "'own_instances_val': an image has 3 annotations" in caplog.text
    assert "TEST.DETECTIONS_PER_IMAGE is 2" in caplog.text
    assert "'own_instances_train': an image has" not in caplog.text


# ---- nuclei ----


@pytest.fixture
def nuclei(shared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = shared / "data"
    if not (root / "nuclei_dsb2018" / "annotations").is_dir():
        pytest.skip("needs ../shared/data/nuclei_dsb2018, which is not there")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    return root


def test_nuclei_are_as_described(nuclei: Path) -> None:
    for split, images, instances in (("train", 561, 24809), ("val", 103, 4177)):
        name = f"nuclei_instances_{split}"
        records = DatasetCatalog.get(name)
        assert len(records) == images
        assert sum(len(record["annotations"]) for record in records) == instances
        assert MetadataCatalog.get(name).thing_classes == ["nucleus"]
        assert Path(MetadataCatalog.get(name).json_file).is_relative_to(nuclei)
        assert all(Path(record["file_name"]).is_file() for record in records)
        assert not list_problems(records)[0]


def test_nuclei_give_targets_that_their_masks_cover(nuclei: Path) -> None:
    cfg = load_config(str(CONFIGS / "nuclei/semask_mask_rcnn.yaml"))
    mapper = build_task(cfg).build_mapper(is_train=True)
    np.random.seed(0)
    for record in DatasetCatalog.get("nuclei_instances_val")[:4]:
        sample = mapper(record)
        found = sample["instances"]
        covered = torch.zeros(sample["prior_target"].shape, dtype=torch.bool)
        if len(found):
            covered = found.gt_masks.tensor.any(0)
        assert torch.equal(sample["prior_target"] == 0, covered)
        assert torch.equal(sample["prior_target"] == 1, ~covered)


def test_missing_nuclei_are_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(DataError, match=r"no annotation file.*\n?.*DETECTRON2_DATASETS is"):
        DatasetCatalog.get("nuclei_instances_train")
