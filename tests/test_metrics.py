"""The metrics of an evaluation in addition to its confusion matrix."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from PIL import Image
from torch import nn

import tiny
import tiny_model
from oracle import IGNORE, NAME, NAMES, Oracle, dataset
from semask.config.loading import load_config
from semask.data.mappers.semantic import SemSegMapper
from semask.data.reading import read_label
from semask.engine import Trainer
from semask.errors import DataError
from semask.evaluation import (
    BoundaryIoU,
    Calibration,
    CalibrationCurve,
    EvaluatedImage,
    ImageScores,
    PredictionFiles,
    SemSegConfusionEvaluator,
    confusion_matrix,
)
from semask.evaluation.calibration import NUM_BINS
from semask.evaluation.confusion import ranked
from semask.modeling.heads import ScoreKind
from semask.ops.lazy_scores import lazy
from semask.report.semantic import report_metrics
from semask.tasks import build_task, inference_folder, write_reports


@pytest.fixture
def records(tmp_path: Path) -> Iterator[list[dict[str, Any]]]:
    with dataset(tmp_path) as records:
        yield records


# ---- calibration and scores ----


def evaluated(
    scores: torch.Tensor, label: np.ndarray, name: str = "a.jpg", kind: ScoreKind = "logits"
) -> EvaluatedImage:
    truth = torch.from_numpy(label)
    on_demand = lazy(scores, kind)
    prediction, confidence = on_demand.labels_and_confidence()
    return EvaluatedImage(
        record={"file_name": name},
        scores=on_demand,
        prediction=prediction,
        label=truth,
        ignore_label=IGNORE,
        matrix=confusion_matrix(prediction, truth, len(scores), IGNORE),
        confidence=confidence,
    )


def random_image(seed: int, classes: int = 5) -> EvaluatedImage:
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(classes, 70, 90, generator=generator)
    label = np.random.default_rng(seed).integers(0, classes, (70, 90)).astype(np.uint8)
    right = np.random.default_rng(seed + 1).random(label.shape) < 0.7
    label = np.where(right, scores.argmax(dim=0).numpy(), label).astype(np.uint8)
    label[:5] = IGNORE
    return evaluated(scores, label, f"{seed}.jpg")


def curve_of(*parts: Calibration) -> CalibrationCurve:
    document = parts[0].evaluate([part.share() for part in parts]).document
    return CalibrationCurve.from_document(document["calibration"])


def test_calibration_equals_a_direct_computation() -> None:
    part = Calibration()
    confidences, right = [], []
    for seed in range(3):
        image = random_image(seed)
        part.process(image)
        valid = image.label != IGNORE
        probabilities = image.scores.full().double().softmax(dim=0).amax(dim=0)
        confidences.append(probabilities[valid].numpy())
        right.append((image.prediction == image.label)[valid].numpy())
    confident, correct = np.concatenate(confidences), np.concatenate(right)
    bins = np.ceil(confident * NUM_BINS).astype(int) - 1
    curve = curve_of(part)
    assert curve.pixels.sum() == correct.size
    expected = 0.0
    for index in range(NUM_BINS):
        inside = bins == index
        assert curve.pixels[index] == pytest.approx(inside.sum(), abs=2)
        if inside.sum() > 50:
            assert curve.accuracy[index] == pytest.approx(correct[inside].mean(), abs=0.01)
            assert curve.mean_confidence[index] == pytest.approx(confident[inside].mean(), abs=1e-3)
        if inside.any():
            gap = abs(correct[inside].mean() - confident[inside].mean())
            expected += inside.mean() * gap
    assert curve.expected_calibration_error == pytest.approx(expected, abs=1e-4)
    assert curve.overconfidence == pytest.approx(confident.mean() - correct.mean(), abs=1e-5)


def test_calibration_by_hand() -> None:
    """Three pixels at 0.57, two of them right; one at 1, wrong; one ignored."""
    first = torch.tensor([0.57, 0.57, 0.57, 1.0, 0.9])
    scores = torch.stack([first, 1 - first])[:, None]
    label = np.array([[0, 0, 1, 1, IGNORE]], dtype=np.uint8)
    part = Calibration()
    part.process(evaluated(scores, label, kind="probabilities"))
    curve = curve_of(part)
    assert {index: n for index, n in enumerate(curve.pixels) if n} == {11: 3, NUM_BINS - 1: 1}
    assert {index: n for index, n in enumerate(curve.correct) if n} == {11: 2}
    assert curve.confidence[[11, -1]] == pytest.approx([1.71, 1], abs=1e-5)
    assert curve.confidence.sum() == pytest.approx(2.71, abs=1e-5)
    assert curve.expected_calibration_error == pytest.approx((0.29 + 1) / 4, abs=1e-5)
    assert np.isnan(curve.accuracy[0])


def test_calibration_adds_up_exactly_in_any_order() -> None:
    alone, shares = Calibration(), [Calibration() for _ in range(3)]
    for seed in range(7):
        alone.process(random_image(seed))
    for seed in reversed(range(7)):
        shares[seed % 3].process(random_image(seed))
    for field in ("pixels", "correct", "confidence"):
        expected = getattr(curve_of(alone), field)
        assert np.array_equal(getattr(curve_of(*shares), field), expected)


def test_image_scores_by_hand() -> None:
    """Of class 0, 3 of 4 pixels are right; of class 1, 1 of 2; class 2 is only predicted."""
    label = np.array([[0, 0, 0, 0, 1, 1, IGNORE]], dtype=np.uint8)
    prediction = torch.tensor([[0, 0, 0, 2, 1, 0, 0]])
    part = ImageScores()
    part.process(evaluated(nn.functional.one_hot(prediction, 3).permute(2, 0, 1).float(), label))
    part.process(evaluated(torch.rand(3, 1, 7), np.full((1, 7), IGNORE, np.uint8), "b.jpg"))
    first, second = part.evaluate([part.share()]).document["images"]
    assert first["mIoU"] == pytest.approx(100 * (3 / 5 + 1 / 2) / 2)
    assert first["pACC"] == pytest.approx(100 * 4 / 6)
    assert second == {"file_name": "b.jpg", "mIoU": None, "pACC": None}
    assert ranked([first, second]) == [first]


# ---- predictions on disk ----


def test_predictions_are_written_as_they_come(
    tmp_path: Path, records: list[dict[str, Any]]
) -> None:
    colors = np.array([[0, 0, 9], [200, 0, 0], [0, 200, 0], [0, 0, 200]], dtype=np.uint8)
    folder = tmp_path / "out" / "predictions"
    part = PredictionFiles(NAME, str(folder), colors)
    model = Oracle()
    evaluator = SemSegConfusionEvaluator(NAME, metrics=[part])
    with torch.no_grad():
        for number, record in enumerate(records, start=1):
            evaluator.process([record], model([record]))
            assert len(list(folder.rglob("*.png"))) == number
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*")) == sorted(
        f"{'first' if index < 5 else 'second'}/{index}.png" for index in range(10)
    )
    with Image.open(folder / "second" / "7.png") as picture:
        assert picture.mode == "P"
        expected = model.scores(records[7]).argmax(dim=0).numpy()
        assert np.array_equal(np.array(picture), expected)
        assert np.array_equal(np.array(picture.convert("RGB")), colors[expected])
    assert np.array_equal(read_label(folder / "second" / "7.png"), expected)
    assert part.evaluate([None]).metrics == {}


def test_predictions_of_very_many_classes_have_16_bits(
    tmp_path: Path, records: list[dict[str, Any]]
) -> None:
    part = PredictionFiles(NAME, str(tmp_path / "out"), np.zeros((300, 3), dtype=np.uint8))
    scores = torch.zeros(300, 4, 5)
    scores[299, 0] = 1
    image = evaluated(scores, np.zeros((4, 5), dtype=np.uint8), records[0]["file_name"])
    part.process(image)
    with Image.open(tmp_path / "out" / "first" / "0.png") as picture:
        assert np.array(picture).tolist() == [[299] * 5] + [[0] * 5] * 3


def test_predictions_do_not_take_each_others_place(tmp_path: Path, catalogs: None) -> None:
    names = ["a.jpg", "a.png", "b/a.jpg"]
    tiny.register("meeting", [{"file_name": str(tmp_path / name)} for name in names])
    part = PredictionFiles("meeting", str(tmp_path / "out"), np.zeros((2, 3), dtype=np.uint8))
    found = [part.file_name({"file_name": str(tmp_path / name)}) for name in names]
    assert found == ["a.jpg.png", "a.png.png", "b/a.png"]


def test_prediction_of_a_foreign_image_is_refused(
    tmp_path: Path, records: list[dict[str, Any]]
) -> None:
    part = PredictionFiles(NAME, str(tmp_path / "out"), np.zeros((4, 3), dtype=np.uint8))
    image = evaluated(torch.zeros(4, 2, 2), np.zeros((2, 2), np.uint8), "/elsewhere/a.jpg")
    with pytest.raises(DataError, match=r"'/elsewhere/a\.jpg'"):
        part.process(image)
    assert not (tmp_path / "out").exists()


# ---- from a config, and in several processes ----


@pytest.fixture
def tiny_cfg(tmp_path: Path) -> Iterator[CfgNode]:
    with tiny.datasets(tmp_path):
        path = tiny.write_config(tmp_path / "config.yaml", MODEL={"DEVICE": "cpu"})
        yield load_config(path, ["OUTPUT_DIR", str(tmp_path / "out")])


def run_evaluation(cfg: CfgNode) -> tuple[nn.Module, dict[str, float], Path]:
    model = tiny_model.build_tiny_model(cfg)
    evaluator = build_task(cfg).build_evaluator("tiny_val", inference_folder(cfg, "tiny_val"))
    mapper = SemSegMapper(cfg, is_train=False)
    with torch.no_grad():
        for record in DatasetCatalog.get("tiny_val"):
            inputs = mapper(record)
            evaluator.process([inputs], model([inputs]))
    results = evaluator.evaluate()
    assert results is not None
    return model, results["sem_seg"], Path(inference_folder(cfg, "tiny_val"))


def test_what_a_config_asks_for(tiny_cfg: CfgNode) -> None:
    tiny_cfg.merge_from_list(["TEST.BOUNDARY_IOU", True, "TEST.SAVE_PREDICTIONS", True])
    model, results, folder = run_evaluation(tiny_cfg)
    assert 0 <= results["mBoundaryIoU"] <= 100
    assert len(list((folder / "predictions").iterdir())) == 2
    (path,) = write_reports(tiny_cfg, model)
    assert path == str(folder / "report.html")
    page = Path(path).read_text()
    captions = re.findall("<figcaption>([^<]*)<", page)[:7]
    assert captions[:4] == ["Image", "Ground truth", "Prediction", "Errors"]
    assert [caption.split(" ·")[0] for caption in captions[4:]] == [
        "Prior, stride 4",
        "Prior, stride 8",
        "Priors summed",
    ]
    assert "<dd>SeMaskSwin + SeMaskFPNHead</dd>" in page


def test_nothing_more_where_nothing_is_asked_for(tiny_cfg: CfgNode) -> None:
    tiny_cfg.TEST.REPORT = False
    model, results, folder = run_evaluation(tiny_cfg)
    assert write_reports(tiny_cfg, model) == []
    assert [path.name for path in folder.iterdir()] == ["sem_seg_evaluation.json"]
    assert "mBoundaryIoU" not in results
    assert not {"images", "calibration"} & set(json.loads(next(folder.iterdir()).read_text()))


def test_the_trainer_reports_on_every_dataset(tiny_cfg: CfgNode) -> None:
    tiny_cfg.DATASETS.TEST = ("tiny_val", "tiny_train")
    model = tiny_model.build_tiny_model(tiny_cfg)
    results = Trainer.test(tiny_cfg, model)
    for name in tiny_cfg.DATASETS.TEST:
        path = Path(inference_folder(tiny_cfg, name)) / "report.html"
        assert f"{results[name]['sem_seg']['mIoU']:.2f}<small> %" in path.read_text()
        path.unlink()
    # Somebody's own evaluators may write nothing to report on.
    Trainer.test(tiny_cfg, model, [SemSegConfusionEvaluator(name) for name in results])
    assert not path.exists()


@pytest.mark.parametrize("protocol", ["multi_scale", "slide"])
def test_other_test_protocols(tiny_cfg: CfgNode, protocol: str) -> None:
    tiny_cfg.merge_from_list(
        ["TEST.PROTOCOL", protocol, "TEST.SLIDE_CROP", "[24, 24]", "TEST.SLIDE_STRIDE", "[16, 16]"]
    )
    model, _, folder = run_evaluation(tiny_cfg)
    (path,) = write_reports(tiny_cfg, model)
    assert f"<dd>{protocol.replace('_', ' ')}</dd>" in Path(path).read_text()
    document = json.loads((folder / "sem_seg_evaluation.json").read_text())
    curve = CalibrationCurve.from_document(document["calibration"])
    assert 1 / 3 <= curve.confidence.sum() / curve.pixels.sum() <= 1


def evaluate_share(rank: int, folder: Path, records: list[dict[str, Any]], ranks: int) -> None:
    """One process of a distributed evaluation."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=ranks
    )
    evaluate_records(folder / "several", records[rank::ranks], is_main=rank == 0)
    torch.distributed.destroy_process_group()


def evaluate_records(folder: Path, records: list[dict[str, Any]], is_main: bool) -> None:
    evaluator = SemSegConfusionEvaluator(
        NAME, output_dir=str(folder), metrics=[BoundaryIoU(NAMES), *report_metrics()]
    )
    model = Oracle()
    with torch.no_grad():
        for record in records:
            evaluator.process([record], model([record]))
    assert (evaluator.evaluate() is not None) == is_main


def test_two_processes_gather_the_same(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    # Forked, as data loaders are: new interpreters would import everything again.
    torch.multiprocessing.start_processes(
        evaluate_share, args=(tmp_path, records, 2), nprocs=2, start_method="fork"
    )
    evaluate_records(tmp_path / "one", records, is_main=True)
    several, one = (
        (tmp_path / name / "sem_seg_evaluation.json").read_text() for name in ("several", "one")
    )
    assert several == one
    assert len(json.loads(one)["images"]) == 10
    assert not math.isnan(json.loads(one)["results"]["mBoundaryIoU"])
