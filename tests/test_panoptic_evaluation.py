"""Panoptic quality, against its definition, and a Panoptic FPN that is trained and evaluated."""

import json
import logging
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_panoptic_separated
from PIL import Image

from odd_files import open_with_ascii
from semask import load_config
from semask.engine import Trainer
from semask.evaluation.instance_evaluators import RESULT_FILE
from semask.evaluation.panoptic_evaluator import (
    PANOPTIC_FILE,
    PREDICTIONS_FILE,
    PanopticEvaluator,
)
from semask.evaluation.panoptic_truth import PanopticTruth
from semask.report.panoptic import write_panoptic_report
from semask.utils.files import read_json
from tiny_instances import SIDE, SMALL_MODEL, flat, two_boxes, write_dataset
from tiny_panoptic import IDS, two_boxes_on_stuff, write_panoptic

CONFIG = Path(__file__).parents[1] / "configs/coco/semask_swin_tiny_panoptic_fpn_1x.yaml"
pytestmark = pytest.mark.usefixtures("catalogs", "one_thread")


def quality(
    truths: list[tuple[np.ndarray, dict[int, int], dict[int, int]]],
    found: list[tuple[np.ndarray, dict[int, int]]],
    group: Callable[[int], int] = lambda category: category,
) -> dict[int, float]:
    """PQ of each group of categories: {id: category} of segments and of crowds, id 0 = void."""
    iou: dict[int, float] = defaultdict(float)
    hits: dict[int, int] = defaultdict(int)
    errors: dict[int, int] = defaultdict(int)
    for (truth, segments, crowds), (answer, predicted) in zip(truths, found, strict=True):
        matched = set()
        for g, category in segments.items():
            for p, other in predicted.items():
                both = ((truth == g) & (answer == p)).sum()
                either = ((truth == g) | ((answer == p) & (truth != 0))).sum()
                if category == other and both / either > 0.5:
                    iou[group(category)] += both / either
                    hits[group(category)] += 1
                    matched |= {("truth", g), ("answer", p)}
        for g, category in segments.items():
            errors[group(category)] += ("truth", g) not in matched
        for p, category in predicted.items():
            region = truth[answer == p]
            ignored = np.isin(region, [0, *(c for c, k in crowds.items() if k == category)])
            errors[group(category)] += ("answer", p) not in matched and ignored.mean() <= 0.5
    return {k: iou[k] / (hits[k] + errors[k] / 2) for k in {*hits, *errors} if hits[k] + errors[k]}


@pytest.mark.parametrize("seed", range(6))
def test_panoptic_quality_is_as_defined(
    tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    """With void, crowds, segments that overlap several others, misses and false alarms.

    In half of the cases map and JSON file have segments that the other one lacks.
    """
    rng = np.random.default_rng(seed)
    categories = [3, 7, 10, 11]
    truths, found, maps, outputs = [], [], [], []
    segments: list[list[dict[str, Any]]] = []
    for _ in range(6):
        truth = np.zeros((24, 24), np.int64)
        kinds = {}
        for index in range(1, 8):
            y, x, h, w = (int(value) for value in rng.integers(2, 14, 4))
            truth[y : y + h, x : x + w] = 300 * index
            kinds[300 * index] = int(rng.choice(categories))
        kinds = {i: k for i, k in kinds.items() if (truth == i).any()}
        crowds = {max(kinds): kinds.pop(max(kinds))}
        answer = np.roll(truth, (int(rng.integers(-1, 2)), 1), axis=(0, 1))
        answer[rng.random((24, 24)) < 0.1] = 0
        y, x = (int(value) for value in rng.integers(0, 18, 2))
        answer[y : y + 6, x : x + 6] = 5
        predicted = {i: (kinds | crowds).get(i, 3) for i in np.unique(answer).tolist() if i}
        for i in predicted:
            if rng.random() < 0.2:
                predicted[i] = int(rng.choice(categories))
        truths.append((truth, kinds, crowds))
        found.append((answer, predicted))
        maps.append(truth)
        segments.append([])
        if seed % 2:
            maps[-1] = np.where((truth == 0) & (rng.random(truth.shape) < 0.5), 4242, truth)
            segments[-1] += [{"id": 5555, "category_id": 3}]
        segments[-1] += [{"id": i, "category_id": k, "iscrowd": 0} for i, k in kinds.items()] + [
            {"id": i, "category_id": k, "iscrowd": 1} for i, k in crowds.items()
        ]
        info = [
            {"id": i, "isthing": k < 10, "category_id": {3: 0, 7: 1, 10: 1, 11: 2}[k]}
            for i, k in predicted.items()
        ]
        outputs.append({"panoptic_seg": (torch.from_numpy(answer), info)})
    path = write_panoptic(tmp_path, maps, segments)
    MetadataCatalog.get("own").set(
        panoptic_json=str(path), panoptic_root=str(tmp_path / "panoptic"), **IDS
    )
    evaluator = PanopticEvaluator("own", str(tmp_path / "out"))
    evaluator.reset()
    for index, output in enumerate(outputs):
        evaluator.process([{"image_id": index, "file_name": f"{index}.png"}], [output])
    with caplog.at_level(logging.WARNING, "semask"):
        results = evaluator.evaluate()
    assert ("'0.png' has no pixel of the segments 5555" in caplog.text) == bool(seed % 2)
    document = json.loads((tmp_path / "out" / PANOPTIC_FILE).read_text())
    assert results is not None
    expected = quality(truths, found)
    values = results["panoptic_seg"]
    assert 5 < values["PQ"] < 95
    for key, members in (("PQ", categories), ("PQ_th", [3, 7]), ("PQ_st", [10, 11])):
        mean = np.mean([expected[k] for k in members if k in expected])
        assert values[key] == pytest.approx(100 * mean, abs=1e-6)
    for name, category in {"light": 3, "dark": 7, "grass": 10, "sky": 11}.items():
        want = 100 * expected.get(category, math.nan)
        assert values[f"PQ-{name}"] == pytest.approx(want, abs=1e-6, nan_ok=True)
    for image, one, other in zip(document["images"], truths, found, strict=True):
        alone = quality([one], [other], lambda _: 0)
        assert image["PQ"] == pytest.approx(100 * alone[0], abs=1e-6)
        assert image["segments"] == image["right"] + image["missed"]


def test_maps_in_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``a/b_1.png`` and ``a_b/1.png`` stay apart; the annotations are read as UTF-8.

    Paths may be longer than the name of a file.
    """
    long = "/".join(["a" * 100] * 3)
    ids, entries = two_boxes_on_stuff()
    path = write_panoptic(tmp_path, [ids, ids[::-1]], [entries] * 2)
    text = path.read_text(encoding="utf-8").replace('"sky"', '"Himmel über"')
    for old, new in (("0.png", f"{long}/b_1.png"), ("1.png", f"{long}_b/1.png")):
        text = text.replace(f'"{old}"', f'"{new}"')
        (tmp_path / "panoptic" / new).parent.mkdir(parents=True)
        (tmp_path / "panoptic" / old).rename(tmp_path / "panoptic" / new)
    path.write_text(text, encoding="utf-8")
    MetadataCatalog.get("own").set(
        panoptic_json=str(path), panoptic_root=str(tmp_path / "panoptic"), **IDS
    )
    monkeypatch.setattr("builtins.open", open_with_ascii)
    evaluator = PanopticEvaluator("own", str(tmp_path / "out"))
    contiguous = {3: 0, 7: 1, 10: 1, 11: 2}
    info = [
        {"id": e["id"], "isthing": k < 10, "category_id": contiguous[k]}
        for e in entries
        for k in [e["category_id"]]
    ]
    for image_id, found in enumerate((ids, ids[::-1].copy())):
        entry = {"image_id": image_id, "file_name": f"{image_id}.jpg"}
        evaluator.process([entry], [{"panoptic_seg": (torch.from_numpy(found), info)}])
    results = evaluator.evaluate()
    assert results is not None
    assert results["panoptic_seg"]["PQ"] == pytest.approx(100)
    assert results["panoptic_seg"]["PQ-Himmel über"] == pytest.approx(100)
    written = json.loads((tmp_path / "out" / PREDICTIONS_FILE).read_text(encoding="utf-8"))
    names = {entry["file_name"] for entry in written["annotations"]}
    assert names == {f"{long.replace('/', '_')}_b_1.png"}  # Detectron2's, without folders


def test_a_report_reads_each_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """However many classes there are."""
    ids, entries = two_boxes_on_stuff()
    path = write_panoptic(tmp_path, [ids], [entries])
    DatasetCatalog.register("own", list)
    MetadataCatalog.get("own").set(
        panoptic_json=str(path), panoptic_root=str(tmp_path / "panoptic"), **IDS
    )
    evaluator = PanopticEvaluator("own", str(tmp_path / "out"))
    evaluator.process(
        [{"image_id": 0, "file_name": "0.png"}], [{"panoptic_seg": (torch.from_numpy(ids * 0), [])}]
    )
    evaluator.evaluate()
    assert capsys.readouterr().out == ""
    results = {"segm": {"AP": 40.0, "AP-light": 61.5}, "bbox": {"AP": 50.0}}
    (tmp_path / "out" / RESULT_FILE).write_text(json.dumps({"dataset": "own", "results": results}))
    read: list[str] = []

    def counted(path: str) -> Any:
        read.append(path)
        return read_json(path)

    monkeypatch.setattr("semask.report.panoptic.read_json", counted)
    page = write_panoptic_report(
        torch.nn.Module(), "own", dict, str(tmp_path / "out"), num_images=0
    )
    assert read == [str(tmp_path / "out" / RESULT_FILE)]
    assert "61.5" in Path(page).read_text(encoding="utf-8")


def test_without_any_segment_nothing_is_defined(tmp_path: Path) -> None:
    """No quality of -100 %; and AP has no instance without pixels."""
    ids, entries = two_boxes_on_stuff()
    path = write_panoptic(tmp_path, [ids * 0], [entries])
    MetadataCatalog.get("own").set(
        panoptic_json=str(path), panoptic_root=str(tmp_path / "panoptic"), **IDS
    )
    evaluator = PanopticEvaluator("own", str(tmp_path / "out"))
    evaluator.process(
        [{"image_id": 0, "file_name": "0.png"}], [{"panoptic_seg": (torch.from_numpy(ids * 0), [])}]
    )
    results = evaluator.evaluate()
    assert results is not None
    assert all(math.isnan(value) for value in results["panoptic_seg"].values())
    assert PanopticTruth("own").instances().anns == {}


@pytest.mark.slow
def test_a_panoptic_model_is_trained_and_evaluated(tmp_path: Path) -> None:
    """Through the trainer: AP, mIoU and PQ, which also chooses the best checkpoint."""
    instances = write_dataset(tmp_path, [two_boxes()] * 2)
    for index in range(2):  # Detectron2 looks for COCO's file names
        Image.open(tmp_path / f"images/{index}.png").save(tmp_path / f"images/{index}.jpg")
    instances.write_text(instances.read_text().replace(".png", ".jpg"))
    ids, entries = two_boxes_on_stuff()
    semantic = np.select([ids == 0, ids == 1, ids == 2], [255, 1, 2]).astype(np.uint8)
    path = write_panoptic(tmp_path, [ids] * 2, [entries] * 2)
    (tmp_path / "stuff").mkdir()
    for index in range(2):
        Image.fromarray(semantic).save(tmp_path / "stuff" / f"{index}.png")
    metadata = {
        **IDS,
        "thing_classes": ["light", "dark"],
        "stuff_classes": ["things", "grass", "sky"],
    }
    folders = [str(tmp_path / name) for name in ("images", "panoptic", "panoptic.json", "stuff")]
    register_coco_panoptic_separated("own", metadata, *folders, str(instances))
    assert path.exists()
    options = {
        **SMALL_MODEL,
        "MODEL.WEIGHTS": "",
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 3,
        "DATASETS.TRAIN": ("own_separated",),
        "DATASETS.TEST": ("own_separated",),
        "DATALOADER.NUM_WORKERS": 0,
        "SOLVER.IMS_PER_BATCH": 1,
        "SOLVER.MAX_ITER": 2,
        "TEST.EVAL_PERIOD": 2,
        "INPUT.MIN_SIZE_TRAIN": (SIDE,),
        "INPUT.MIN_SIZE_TEST": SIDE,
        "OUTPUT_DIR": str(tmp_path / "out"),
    }
    cfg = load_config(str(CONFIG), flat(options))
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    best = torch.load(tmp_path / "out/model_best.pth", weights_only=True)
    results = Trainer.test(cfg, trainer.model)
    assert {"bbox", "segm", "sem_seg", "panoptic_seg"} <= set(results)
    assert best["value"] == pytest.approx(results["panoptic_seg"]["PQ"])
    written = json.loads((tmp_path / "out/inference/own_separated/predictions.json").read_text())
    assert len(written["annotations"]) == 2
    assert "Panoptic report" in (tmp_path / "out/inference/own_separated/report.html").read_text()
