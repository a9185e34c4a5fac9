"""Instance and panoptic segmentation by mask classification: evaluated, reported and predicted."""

import json
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import nn

import semask
import tiny
import tiny_masks
from browser import assert_is_readable, count, screenshot
from semask.cli import main
from semask.data import register_coco_folder
from semask.data.datasets.catalog import forget_dataset
from semask.engine import Trainer, check_run
from semask.errors import ConfigError, DataError
from semask.inference.class_names import prior_classes_of
from semask.inference.masks import RunLengthMasks
from semask.inference.predictor import PREDICTORS
from semask.inference.video import writing_video
from semask.report import pictures
from semask.report.page import REPORT_FILE
from semask.tasks import TASK_REGISTRY, PanopticTask, build_task, inference_folder
from tiny_instances import SIDE, two_boxes, write_dataset
from tiny_model import photograph
from tiny_panoptic import register_joint, two_boxes_on_stuff
from tiny_runs import assert_same_state

pytestmark = pytest.mark.usefixtures("catalogs", "one_thread")


def config(folder: Path, task: str, **overrides: Any) -> CfgNode:
    """A model for the dataset "own", which is written and registered."""
    if task == "panoptic":
        register_joint(folder)
    elif task == "semantic":
        tiny.register("own", tiny.write_images(folder / "images", 3))
    else:
        path = write_dataset(folder, [two_boxes(), two_boxes(), []])
        register_coco_folder("own", folder / "images", path)
    test = {
        "SEMANTIC_ON": task != "instance",
        "INSTANCE_ON": task != "semantic",
        "PANOPTIC_ON": task == "panoptic",
        "OBJECT_MASK_THRESHOLD": 0.0,
        "OVERLAP_THRESHOLD": 0.0,
    }
    keys: dict[str, Any] = {
        "SEM_SEG_HEAD__NUM_CLASSES": 0,
        "SEM_SEG_HEAD__CONVS_DIM": 64,
        "MASK_FORMER__HIDDEN_DIM": 64,
        "SEMASK__PRIOR_TARGET": "instances" if task == "instance" else "sem_seg",
        **{f"MASK_FORMER__TEST__{key}": value for key, value in test.items()},
    }
    file = tiny_masks.write_config(
        folder / "config.yaml",
        TASK=task,
        DATASETS={"TRAIN": ["own"], "TEST": ["own"]},
        OUTPUT_DIR=str(folder / "out"),
    )
    options = [
        part
        for key, value in {**keys, **overrides}.items()
        for part in (f"MODEL.{key.replace('__', '.')}", value)
    ]
    mapper = {"panoptic": "mask_former_panoptic", "semantic": "mask_former_semantic"}
    options += ["TEST.BEST_METRIC", "", "INPUT.MASK_FORMAT", "bitmask"]
    options += ["INPUT.DATASET_MAPPER_NAME", mapper.get(task, "sem_seg")]
    return semask.load_config(file, options)


def seeing(cfg: CfgNode) -> nn.Module:
    """A model with queries that differ."""
    torch.manual_seed(6)
    model = build_model(cfg)
    for name, parameter in model.named_parameters():
        if name.endswith(("gamma", "class_embed.weight", "mask_embed.layers.2.weight")):
            nn.init.normal_(parameter, std=3.0)
    return model


TASKS = ("instance", "panoptic")
RESULT = {"semantic": "sem_seg", "instance": "segm", "panoptic": "panoptic_seg"}


@pytest.mark.parametrize("task", [name for name, _ in TASK_REGISTRY])
def test_every_registered_task_trains_is_evaluated_reported_and_predicted(
    tmp_path: Path, task: str
) -> None:
    cfg = config(tmp_path, task)
    cfg.SOLVER.MAX_ITER = 1
    check_run(cfg)
    trainer = Trainer(cfg)
    trainer.train()
    assert RESULT[task] in trainer.results
    assert (Path(inference_folder(cfg, "own")) / REPORT_FILE).stat().st_size > 0
    predictor = semask.Predictor(cfg, tmp_path / "out" / "model_final.pth")
    assert type(predictor) is build_task(cfg).predictor
    prediction: Any = predictor(photograph(40, 52), priors=True)
    assert prediction.overlay().shape == (40, 52, 3)
    assert prediction.prior is not None


@pytest.mark.parametrize("paths", ["auto", "none"])
@pytest.mark.parametrize("task", TASKS)
def test_evaluation_and_report(
    tmp_path: Path, task: str, paths: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "LOWEST_SCORE", 0.0)  # queries that see nothing have pictures too
    cfg = config(tmp_path, task, FAST_PATHS=paths)
    assert (4 if task == "panoptic" else 2) == cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    assert (4 if task == "panoptic" else 3) == cfg.MODEL.SEMASK.NUM_CLASSES
    build_task(cfg).check_datasets(["own"], eval_only=True)
    model = Trainer.build_model(cfg)
    model.load_state_dict(seeing(cfg).state_dict())
    results = Trainer.test(cfg, model)
    folder = Path(inference_folder(cfg, "own"))
    assert {"bbox", "segm"} <= set(results)
    if task == "panoptic":
        assert {"sem_seg", "panoptic_seg"} <= set(results)
        assert results["panoptic_seg"]["PQ"] >= 0
    page = (folder / REPORT_FILE).read_text()
    root = ET.fromstring(page.split("\n", 1)[1])
    titles = ["".join(element.itertext()) for element in root.iter("figcaption")]
    for title in ("Image", "Ground truth", "Prediction", "Errors", "Priors summed"):
        assert any(each.startswith(title) for each in titles)
    names = "light|dark|grass|sky" if task == "panoptic" else "light|dark"
    assert any(re.fullmatch(rf"({names}) [01]\.\d\d · query \d", each) for each in titles)
    assert "http" not in page.replace('http-equiv="', "")
    words = " ".join("".join(root.itertext()).split())
    assert ("SQ" in words) == (task == "panoptic")
    legends = [
        "".join(element.itertext()).split()
        for element in root.iter("p")
        if element.get("class") == "legend"
    ]
    assert all({"light", "dark"} <= set(legend) for legend in legends)  # in priors and queries
    assert "light" in words


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("task", TASKS)
def test_browser_shows_the_report(
    tmp_path: Path, task: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page of semantic segmentation: ``tests/test_report.py``."""
    monkeypatch.setattr(pictures, "LOWEST_SCORE", 0.0)
    cfg = config(tmp_path, task)
    if task == "panoptic":
        colors = {"stuff_colors": [[250, 0, 250], [0, 250, 250], [250, 250, 0], [0, 99, 250]]}
        MetadataCatalog.get("own").set(**colors)
    Trainer.test(cfg, seeing(cfg).eval())
    pixels = screenshot(Path(inference_folder(cfg, "own")) / REPORT_FILE, width)
    assert_is_readable(pixels)
    grey = count(pixels, 230, 230, 230) + count(pixels, 20, 20, 20)
    assert grey > 3000  # the bright and the dark boxes of the images
    if task == "panoptic":  # sky and grass of the ground truth
        assert min(count(pixels, 250, 250, 0), count(pixels, 0, 99, 250)) > 3000


@pytest.mark.parametrize("task", TASKS)
def test_fast_and_plain_evaluation_find_the_same(tmp_path: Path, task: str) -> None:
    found = []
    cfg = config(tmp_path, task)
    cfg.defrost()
    for paths in ("auto", "none"):
        cfg.MODEL.FAST_PATHS = paths
        cfg.OUTPUT_DIR = str(tmp_path / paths)
        cfg.TEST.REPORT = False
        model = Trainer.build_model(cfg)
        model.load_state_dict(seeing(cfg).state_dict())
        results = Trainer.test(cfg, model)
        found.append({k: v for kind in results.values() for k, v in kind.items()})
    assert found[0] == pytest.approx(found[1], rel=1e-5, abs=1e-5, nan_ok=True)


def test_the_one_stuff_beside_the_things_is_no_background() -> None:
    MetadataCatalog.get("own").set(thing_classes=["cell"], stuff_classes=["ground", "cell"])
    assert prior_classes_of("own", 2)[0] == ["ground", "cell"]
    MetadataCatalog.get("instances").set(thing_classes=["cell"])
    assert prior_classes_of("instances", 2)[0] == ["cell", "background"]


class Perfect(nn.Module):
    """Returns the ground truth, with things and stuff in one list of classes."""

    def forward(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        ids, _ = two_boxes_on_stuff()
        classes = np.select([ids == k for k in (1, 2, 3, 4)], [2, 3, 0, 1])
        segments = [
            {"id": number, "isthing": number > 2, "category_id": category}
            for number, category in {1: 2, 2: 3, 3: 0, 4: 1}.items()
        ]
        things = torch.from_numpy(np.stack([ids == 3, ids == 4]))
        corners = [[x, y, x + w, y + h] for x, y, w, h in (each["bbox"] for each in two_boxes())]
        instances = Instances((SIDE, SIDE), pred_boxes=Boxes(torch.tensor(corners).float()))
        instances.scores, instances.pred_classes = torch.ones(2), torch.tensor([0, 1])
        instances.pred_masks = things
        scores = torch.nn.functional.one_hot(torch.from_numpy(classes), 4).permute(2, 0, 1).float()
        output = {
            "panoptic_seg": (torch.from_numpy(ids), segments),
            "instances": instances,
            "sem_seg": scores,
        }
        return [output for _ in batch]


def test_the_ground_truth_is_perfect(tmp_path: Path) -> None:
    """AP of the things and mIoU are computed from the panoptic maps alone."""
    cfg = config(tmp_path, "panoptic")
    cfg.defrost()
    cfg.TEST.BOUNDARY_IOU = True
    results = Trainer.test(cfg, Perfect())
    for kind, name in (
        *(("panoptic_seg", "PQ"), ("panoptic_seg", "PQ_th"), ("panoptic_seg", "PQ-sky")),
        *(("segm", "AP"), ("bbox", "AP"), ("boundary", "AP"), ("segm", "AP-dark")),
        ("sem_seg", "mIoU"),
    ):
        assert results[kind][name] == pytest.approx(100), (kind, name)
    document = json.loads(
        (Path(inference_folder(cfg, "own")) / "panoptic_evaluation.json").read_text()
    )
    assert [image["PQ"] for image in document["images"]] == [100, 100]
    assert [row["right"] for row in document["classes"]] == [2, 2, 2, 2]


def test_a_task_derived_from_panoptic_has_its_names(tmp_path: Path) -> None:
    class OwnTask(PanopticTask):
        name = "own_panoptic"

    cfg = config(tmp_path, "panoptic")
    torch.save({"model": seeing(cfg).state_dict()}, tmp_path / "model.pth")
    try:
        TASK_REGISTRY.register(OwnTask)
        cfg.defrost()
        cfg.TASK = "own_panoptic"
        predictor: Any = semask.Predictor(cfg, tmp_path / "model.pth")
        assert predictor.class_names == ("light", "dark", "grass", "sky")
        assert predictor.category_ids == (3, 7, 10, 11)
    finally:
        del TASK_REGISTRY._obj_map["own_panoptic"], PREDICTORS["own_panoptic"]


@pytest.mark.parametrize("task", TASKS)
def test_predictor(tmp_path: Path, task: str) -> None:
    cfg = config(tmp_path, task)
    torch.save({"model": seeing(cfg).state_dict()}, tmp_path / "model.pth")
    predictor: Any = semask.Predictor(cfg, tmp_path / "model.pth")
    assert isinstance(predictor, semask.InstancePredictor)
    found = predictor(photograph(50, 70), priors=True)  # predicted at 40 x 56
    assert isinstance(found.each_mask, RunLengthMasks)  # as the model gives them
    assert found.masks.shape == (len(found), 50, 70)
    assert np.all(np.diff(found.scores) <= 0)
    assert found.prior.shape == (50, 70)
    assert {name: maps.shape[1:] for name, maps in found.priors.items()} == {
        "prior2": (10, 14),
        "prior3": (5, 7),
        "prior4": (3, 4),
        "prior5": (2, 2),
    }
    assert (found.panoptic is not None) == (task == "panoptic")
    overlay = found.overlay(min_score=0.0)
    assert overlay.shape == (50, 70, 3)
    found.save(str(tmp_path / "saved"), "a")
    found.save_classes(str(tmp_path / "saved"))
    described = json.loads((tmp_path / "saved/classes.json").read_text())
    if task == "panoptic":
        assert found.class_names == ("light", "dark", "grass", "sky")
        assert found.category_ids == (3, 7, 10, 11)
        assert set(found.classes.tolist()) <= {0, 1}  # things alone are instances
        assert (overlay != photograph(50, 70)).any(axis=-1)[found.panoptic > 0].all()
        assert (tmp_path / "saved/panoptic/a.png").is_file()
        assert "stuff" in described
    else:
        assert found.class_names == ("light", "dark")


def test_what_a_task_needs_is_asked_for(tmp_path: Path) -> None:
    for task, key in (("instance", "INSTANCE_ON"), ("panoptic", "PANOPTIC_ON")):
        folder = tmp_path / task
        folder.mkdir()
        cfg = config(folder, task, **{f"MASK_FORMER__TEST__{key}": False})
        with pytest.raises(ConfigError, match=rf"MODEL\.MASK_FORMER\.TEST\.{key}"):
            build_task(cfg).check_datasets(["own"], eval_only=False)
        forget_dataset("own")


def test_maps_of_another_size_are_refused(tmp_path: Path) -> None:
    cfg = config(tmp_path, "panoptic")
    evaluator = build_task(cfg).build_evaluator("own", inference_folder(cfg, "own"))
    evaluator.reset()
    (output,) = Perfect()([{}])
    output["panoptic_seg"] = (output["panoptic_seg"][0][:-1], output["panoptic_seg"][1])
    with pytest.raises(DataError, match=r"0\.png"):
        evaluator.process([DatasetCatalog.get("own")[0]], [output])


# ---- training ----

# Stochastic depth, random points and every augmentation are on.
LONG = (
    *("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.ACCUMULATE_STEPS", 2),
    *("INPUT.RANDOM_FLIP", "horizontal", "TEST.REPORT", False, "TEST.NUM_PANELS", 0),
    *("TEST.EVAL_PERIOD", 4, "TEST.BEST_METRIC", "segm/AP", "SOLVER.AMP.ENABLED", True),
)


@pytest.mark.parametrize("task", TASKS)
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path: Path, task: str) -> None:
    cfg = config(tmp_path, task)
    cfg.defrost()
    cfg.merge_from_list(list(LONG))
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    finals = []
    for folder in (whole, stopped):
        cfg.OUTPUT_DIR = str(folder)
        check_run(cfg, resume=folder == stopped)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=folder == stopped)
        assert trainer.start_iter == (2 if folder == stopped else 0)
        trainer.train()
        assert (Path(inference_folder(cfg, "own")) / "instance_evaluation.json").is_file()
        finals.append(torch.load(folder / "model_final.pth", weights_only=True))
        if folder == whole:
            stopped.mkdir()
            shutil.copy(whole / "model_0000001.pth", stopped)
            (stopped / "last_checkpoint").write_text("model_0000001.pth")
    assert_same_state(*finals)
    lines = map(json.loads, (whole / "metrics.json").read_text().splitlines())
    losses = next(line for line in lines if "total_loss" in line)
    for name in ("loss_ce", "loss_mask", "loss_dice", "loss_prior"):
        assert losses[name] > 0


def own_folder(folder: Path, task: str, number: int = 2) -> None:
    """The layout of ``configs/own_dataset`` with some images in each part."""
    register_joint(folder, "written", number)
    for split in ("train", "val"):
        shutil.copytree(folder / "images", folder / "own/images" / split)
        annotations = folder / "own/annotations"
        if task == "panoptic":
            shutil.copytree(folder / "panoptic", annotations / f"panoptic_{split}")
        else:
            annotations.mkdir(exist_ok=True, parents=True)
        file = "panoptic.json" if task == "panoptic" else "instances.json"
        shutil.copy(folder / file, annotations / f"{file.removesuffix('.json')}_{split}.json")


@pytest.mark.parametrize("task", TASKS)
def test_a_folder_of_ones_own_needs_the_config_alone(tmp_path: Path, task: str) -> None:
    """``semask train``: checked, trained, evaluated and reported; then ``semask predict``."""
    own_folder(tmp_path, task)
    small = {
        **{"SWIN.EMBED_DIM": 8, "SWIN.DEPTHS": [1, 1, 1, 1], "SWIN.NUM_HEADS": [1, 1, 2, 2]},
        **{"MASK_FORMER.TRAIN_NUM_POINTS": 64, "MASK_FORMER.NUM_OBJECT_QUERIES": 8},
    }
    keys = {
        "DATASETS.FOLDER_ROOT": tmp_path / "own",
        "OUTPUT_DIR": tmp_path / "out",
        "MODEL.DEVICE": "cpu",
        **{f"MODEL.{key}": value for key, value in small.items()},
        **{"SOLVER.MAX_ITER": 2, "SOLVER.IMS_PER_BATCH": 2, "TEST.EVAL_PERIOD": 2},
        **{"DATALOADER.NUM_WORKERS": 0, "INPUT.MIN_SIZE_TEST": 64},
    }
    name = f"own_dataset/semask_mask2former_{task}_example"
    with tiny.own_loggers():
        assert main.run("train", [name, *(f"{key}={value}" for key, value in keys.items())]) == 0
    folder = tmp_path / "out/inference" / f"own_{task}{'s' if task == 'instance' else ''}_val"
    assert (folder / REPORT_FILE).is_file()
    assert (tmp_path / "out/model_best.pth").is_file()
    arguments = [
        "--config",
        tmp_path / "out/config.yaml",
        "--weights",
        tmp_path / "out/model_final.pth",
    ]
    seen = [*arguments, tmp_path / "own/images/val", "--output", tmp_path / "seen", "--priors"]
    assert main.run("predict", [*map(str, seen)]) == 0
    written = {
        path.relative_to(tmp_path / "seen").as_posix() for path in (tmp_path / "seen").rglob("*.*")
    }
    assert {"classes.json", "overlay/0.png", "prior2/1.png"} <= written
    assert ("panoptic/0.png" in written) == (task == "panoptic")
    with writing_video(tmp_path / "drive.mp4", 10) as video:
        for index in range(3):
            video.write(photograph(48, 64, seed=index))
    driven = [*arguments, tmp_path / "drive.mp4", "--output", tmp_path / "driven"]
    assert main.run("predict", [*map(str, driven)]) == 0
    with av.open(str(tmp_path / "driven/overlay/drive.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert [(f.height, f.width) for f in container.decode(stream)] == [(48, 64)] * 3
