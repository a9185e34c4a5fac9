"""The evaluator: Detectron2's metrics, from one exact confusion matrix."""

import semask  # noqa: F401, isort: skip  (first: it makes Detectron2 importable)

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, SemSegEvaluator
from detectron2.utils import comm
from PIL import Image

from semask.errors import ConfigError, DataError
from semask.evaluation import (
    SemSegConfusionEvaluator,
    class_table,
    confusion_matrix,
    mean_iou_of_labelled_classes,
    metrics_from_confusion,
)

IGNORE = 255
NAMES = ["sky", "wall", "road"]
# Ground truth: 4 sky, 4 wall, 3 road, 1 ignored.
LABEL = np.array([[0, 0, 0, 0], [1, 1, 1, 1], [2, 2, 2, IGNORE]], dtype=np.uint8)
PREDICTION = np.array([[0, 0, 0, 1], [1, 1, 2, 2], [2, 2, 0, 2]], dtype=np.uint8)


def scores_of(prediction: np.ndarray, classes: int) -> torch.Tensor:
    """(K, H, W) scores with this argmax."""
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(prediction).long(), classes)
    return one_hot.permute(2, 0, 1).float()


def matrix_of(prediction: np.ndarray, label: np.ndarray, classes: int) -> np.ndarray:
    return confusion_matrix(
        torch.from_numpy(prediction), torch.from_numpy(label), classes, IGNORE
    ).numpy()


class Dataset:
    """Label maps on disk under a registered name."""

    name = "evaluator_test"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: list[dict[str, Any]] = []
        DatasetCatalog.register(self.name, lambda: self.records)
        MetadataCatalog.get(self.name).set(stuff_classes=NAMES, ignore_label=IGNORE)

    def add(self, label: np.ndarray) -> dict[str, Any]:
        path = self.folder / f"{len(self.records)}.png"
        Image.fromarray(label).save(path)
        height, width = label.shape
        record = {
            "file_name": str(path.with_suffix(".jpg")),
            "sem_seg_file_name": str(path),
            "height": height,
            "width": width,
        }
        self.records.append(record)
        return record

    def remove(self) -> None:
        DatasetCatalog.remove(self.name)
        MetadataCatalog.remove(self.name)


def results(evaluator: DatasetEvaluator) -> dict[str, float]:
    evaluated = evaluator.evaluate()
    assert evaluated is not None
    assert list(evaluated) == ["sem_seg"]
    return evaluated["sem_seg"]


@pytest.fixture
def dataset(tmp_path: Path) -> Iterator[Dataset]:
    registered = Dataset(tmp_path)
    yield registered
    registered.remove()


def test_confusion_matrix_by_hand() -> None:
    expected = [[3, 0, 1, 0], [1, 2, 0, 0], [0, 2, 2, 1]]  # rows: prediction; last: ignored
    matrix = matrix_of(PREDICTION, LABEL, 3)
    assert matrix.dtype == np.int64
    assert matrix.tolist() == expected


def test_metrics_by_hand() -> None:
    metrics = metrics_from_confusion(matrix_of(PREDICTION, LABEL, 3), NAMES)
    iou = [3 / 5, 2 / 5, 2 / 5]
    accuracy = [3 / 4, 2 / 4, 2 / 3]
    expected = {
        "mIoU": sum(iou) / 3,
        "fwIoU": (4 * iou[0] + 4 * iou[1] + 3 * iou[2]) / 11,
        **{f"IoU-{name}": value for name, value in zip(NAMES, iou, strict=True)},
        "mACC": sum(accuracy) / 3,
        "pACC": 7 / 11,
        **{f"ACC-{name}": value for name, value in zip(NAMES, accuracy, strict=True)},
    }
    assert list(metrics) == list(expected)
    assert metrics == pytest.approx({key: 100 * value for key, value in expected.items()})


def test_equals_independent_count() -> None:
    rng = np.random.default_rng(0)
    prediction = rng.integers(0, 7, (3, 20, 30))
    label = rng.choice([*range(7), IGNORE], (3, 20, 30))
    matrix = matrix_of(prediction, label, 7)
    for p in range(7):
        for g in range(7):
            assert matrix[p, g] == ((prediction == p) & (label == g)).sum()
        assert matrix[p, 7] == ((prediction == p) & (label == IGNORE)).sum()


@pytest.mark.parametrize("ignore_label", [IGNORE, 1], ids=["255", "a class"])
def test_ignored_pixels_count_nowhere(ignore_label: int) -> None:
    label = np.where(LABEL == IGNORE, ignore_label, LABEL)
    valid = torch.from_numpy(label != ignore_label)
    prediction, truth = torch.from_numpy(PREDICTION), torch.from_numpy(label)
    with_ignored = confusion_matrix(prediction, truth, 3, ignore_label)
    without = confusion_matrix(prediction[valid], truth[valid], 3, ignore_label)
    assert torch.equal(with_ignored[:, :-1], without[:, :-1])
    assert with_ignored[:, -1].sum() == (~valid).sum()


@pytest.mark.parametrize("case", ["all classes", "absent class"])
def test_equals_detectron2(dataset: Dataset, case: str) -> None:
    rng = np.random.default_rng(1)
    present = [0, 1, 2] if case == "all classes" else [0, 2]
    inputs, outputs = [], []
    for _ in range(4):
        inputs.append(dataset.add(rng.choice([*present, IGNORE], (12, 17)).astype(np.uint8)))
        prediction = rng.choice(present, (12, 17))
        outputs.append({"sem_seg": scores_of(prediction, 3) + torch.rand(3, 12, 17) / 2})
    stock = SemSegEvaluator(dataset.name, distributed=False)
    ours = SemSegConfusionEvaluator(dataset.name, distributed=False)
    for evaluator in (stock, ours):
        evaluator.reset()
        evaluator.process(inputs, outputs)
    expected, result = results(stock), results(ours)
    assert set(result) <= set(expected)
    assert result == pytest.approx({key: expected[key] for key in result}, nan_ok=True)
    assert math.isnan(result["IoU-wall"]) == (case == "absent class")
    if case == "all classes":
        assert list(result) == [key for key in expected if key in result]


def test_both_definitions_of_mean_iou(dataset: Dataset) -> None:
    """A class without ground truth that is predicted: v0.6 counts its 0, later versions do not."""
    label = np.array([[0, 0, 2, 2]], dtype=np.uint8)
    prediction = np.array([[0, 1, 2, 2]], dtype=np.uint8)
    matrix = matrix_of(prediction, label, 3)
    metrics = metrics_from_confusion(matrix, NAMES)
    assert metrics["mIoU"] == pytest.approx(100 * (1 / 2 + 0 + 1) / 3)
    assert mean_iou_of_labelled_classes(matrix) == pytest.approx(100 * (1 / 2 + 1) / 2)
    assert math.isnan(metrics["IoU-wall"])
    assert math.isnan(metrics["ACC-wall"])

    record = dataset.add(label)
    stock = SemSegEvaluator(dataset.name, distributed=False)
    stock.reset()
    stock.process([record], [{"sem_seg": scores_of(prediction, 3)}])
    stocks = results(stock)["mIoU"]
    ours = [metrics["mIoU"], mean_iou_of_labelled_classes(matrix)]
    assert any(stocks == pytest.approx(value) for value in ours)

    table = class_table(matrix, NAMES)
    assert "mIoU 50.00" in table
    assert "1 of 3 classes are predicted but absent from the ground truth" in table
    assert "75.00" in table.splitlines()[-1]


def test_table_marks_absent_classes() -> None:
    matrix = matrix_of(np.zeros((2, 1500), int), np.zeros((2, 1500), int), 2)
    lines = class_table(matrix, ["here", "gone"]).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "here",
        "3,000",
        "100.00",
        "100.00",
    ]
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == ["gone", "0", "absent", "absent"]
    assert "mIoU 100.00" in lines[5]
    assert "1 of 2 classes are absent from ground truth and prediction" in lines[6]


def test_table_of_many_classes_keeps_order_and_alignment() -> None:
    names = [f"class {index}" for index in range(171)]
    rng = np.random.default_rng(2)
    matrix = matrix_of(rng.integers(0, 171, 5000), rng.integers(0, 171, 5000), 171)
    lines = class_table(matrix, names).splitlines()[: 171 + 2]
    assert [line.split("|")[1].strip() for line in lines[2:]] == names
    assert len({len(line) for line in lines}) == 1


def test_matrix_of_other_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="2x3"):
        metrics_from_confusion(np.zeros((3, 4), dtype=np.int64), ["a", "b"])


def test_nothing_labelled_gives_nan_and_a_warning(
    dataset: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    record = dataset.add(np.full((3, 4), IGNORE, dtype=np.uint8))
    evaluator = SemSegConfusionEvaluator(dataset.name)
    evaluator.process([record], [{"sem_seg": torch.rand(3, 3, 4)}])
    with caplog.at_level(logging.WARNING):
        result = results(evaluator)
    assert all(math.isnan(value) for value in result.values())
    assert "No labelled pixel" in caplog.text


def test_reset_forgets(dataset: Dataset) -> None:
    record = dataset.add(LABEL)
    evaluator = SemSegConfusionEvaluator(dataset.name)
    evaluator.process([record], [{"sem_seg": scores_of(PREDICTION, 3)}])
    evaluator.reset()
    evaluator.process([record], [{"sem_seg": scores_of(np.where(LABEL == IGNORE, 0, LABEL), 3)}])
    assert results(evaluator)["pACC"] == 100


def test_inputs_without_label_path_find_it_in_the_dataset(dataset: Dataset) -> None:
    record = dict(dataset.add(LABEL))
    del record["sem_seg_file_name"]  # as Detectron2's own mapper leaves its dicts
    evaluator = SemSegConfusionEvaluator(dataset.name)
    evaluator.process([record], [{"sem_seg": scores_of(PREDICTION, 3)}])
    assert results(evaluator)["pACC"] == pytest.approx(100 * 7 / 11)
    with pytest.raises(DataError, match=r"unknown\.jpg"):
        evaluator.process([{"file_name": "unknown.jpg"}], [{"sem_seg": torch.rand(3, 3, 4)}])


def test_writes_results_and_matrix(dataset: Dataset, tmp_path: Path) -> None:
    label = LABEL[:1]  # sky alone: the JSON has null where metrics are undefined
    evaluator = SemSegConfusionEvaluator(dataset.name, output_dir=str(tmp_path / "new" / "out"))
    evaluator.process([dataset.add(label)], [{"sem_seg": scores_of(label, 3)}])
    evaluator.evaluate()
    (file,) = (tmp_path / "new" / "out").iterdir()
    assert file.name == "sem_seg_evaluation.json"
    written = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert written["dataset"] == dataset.name
    assert written["class_names"] == NAMES
    assert written["results"]["mIoU"] == 100
    assert written["results"]["IoU-road"] is None
    assert written["confusion_matrix"] == [[4, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_prediction_of_another_size(dataset: Dataset) -> None:
    evaluator = SemSegConfusionEvaluator(dataset.name)
    with pytest.raises(DataError, match=r"0\.png'.* 4x3 .* 5x3"):
        evaluator.process([dataset.add(LABEL)], [{"sem_seg": torch.rand(3, 3, 5)}])


def test_label_value_out_of_range(dataset: Dataset) -> None:
    label = LABEL.copy()
    label[0, 0] = 3
    evaluator = SemSegConfusionEvaluator(dataset.name)
    with pytest.raises(DataError, match=r"0\.png' .*3 \(1 pixel\)"):
        evaluator.process([dataset.add(label)], [{"sem_seg": scores_of(PREDICTION, 3)}])


def test_missing_label(dataset: Dataset) -> None:
    record = {"file_name": "a.jpg", "sem_seg_file_name": str(dataset.folder / "missing.png")}
    evaluator = SemSegConfusionEvaluator(dataset.name)
    with pytest.raises(DataError, match=r"missing\.png"):
        evaluator.process([record], [{"sem_seg": torch.rand(3, 3, 4)}])


@pytest.mark.parametrize(
    ("shape", "message"),
    [((4, 3, 4), r"predicts 4 classes .* has 3"), ((3, 4), r"\(K, H, W\)")],
)
def test_model_of_another_class_count(
    dataset: Dataset, shape: tuple[int, ...], message: str
) -> None:
    evaluator = SemSegConfusionEvaluator(dataset.name)
    with pytest.raises(ConfigError, match=message):
        evaluator.process([dataset.add(LABEL)], [{"sem_seg": torch.rand(shape)}])


def test_metadata_are_checked_at_the_start(dataset: Dataset) -> None:
    with pytest.raises(ConfigError, match=r" 150 .* 3\b"):
        SemSegConfusionEvaluator(dataset.name, num_classes=150)
    with pytest.raises(ConfigError, match="stuff_classes"):
        SemSegConfusionEvaluator("evaluator_test_without_metadata")


def test_ignore_label_argument(dataset: Dataset) -> None:
    evaluator = SemSegConfusionEvaluator(dataset.name, num_classes=3, ignore_label=0)
    label = np.where(LABEL == IGNORE, 0, LABEL)
    evaluator.process([dataset.add(label)], [{"sem_seg": scores_of(PREDICTION, 3)}])
    assert results(evaluator)["pACC"] == pytest.approx(100 * 4 / 7)


def process_share(evaluator: SemSegConfusionEvaluator, folder: Path, rank: int, ranks: int) -> None:
    """Give an evaluator images rank, rank + ranks, ... of five."""
    rng = np.random.default_rng(3)
    for index in range(5):
        label = rng.choice([0, 1, 2, IGNORE], (6, 8)).astype(np.uint8)
        prediction = rng.integers(0, 3, (6, 8))
        if index % ranks == rank:
            path = folder / f"{index}.png"
            Image.fromarray(label).save(path)
            record = {"file_name": f"{index}.jpg", "sem_seg_file_name": str(path)}
            evaluator.process([record], [{"sem_seg": scores_of(prediction, 3)}])


def evaluate_share(rank: int, name: str, folder: Path, ranks: int) -> None:
    """One process of a distributed evaluation."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=ranks
    )
    evaluator = SemSegConfusionEvaluator(name, output_dir=str(folder / "several"))
    process_share(evaluator, folder, rank, ranks)
    assert (evaluator.evaluate() is None) == (rank > 0)
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(dataset: Dataset, tmp_path: Path) -> None:
    # Forked, as data loaders are: new interpreters would import everything again.
    torch.multiprocessing.start_processes(
        evaluate_share, args=(dataset.name, tmp_path, 2), nprocs=2, start_method="fork"
    )
    alone = SemSegConfusionEvaluator(dataset.name, output_dir=str(tmp_path / "one"))
    process_share(alone, tmp_path, rank=0, ranks=1)
    alone.evaluate()
    several, one = (
        json.loads((tmp_path / name / "sem_seg_evaluation.json").read_text())
        for name in ("several", "one")
    )
    assert sum(map(sum, one["confusion_matrix"])) == 5 * 6 * 8
    assert several == one


def test_shares_add_up(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = [SemSegConfusionEvaluator(dataset.name) for _ in range(3)]
    for rank, evaluator in enumerate(shares):
        process_share(evaluator, tmp_path, rank, ranks=3)
    alone = SemSegConfusionEvaluator(dataset.name, distributed=False)
    process_share(alone, tmp_path, rank=0, ranks=1)

    gathered: list[np.ndarray] = []

    def gather(matrix: np.ndarray) -> list[np.ndarray]:
        gathered.append(matrix)
        return gathered

    monkeypatch.setattr(comm, "gather", gather)
    monkeypatch.setattr(comm, "is_main_process", lambda: len(gathered) == len(shares))
    results = [evaluator.evaluate() for evaluator in shares]
    assert results[:2] == [None, None]
    assert results[2] == alone.evaluate()


def test_not_distributed_evaluates_what_it_has_seen(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comm, "gather", lambda matrix: pytest.fail("gathered"))
    evaluator = SemSegConfusionEvaluator(dataset.name, distributed=False)
    evaluator.process([dataset.add(LABEL)], [{"sem_seg": scores_of(PREDICTION, 3)}])
    assert results(evaluator)["pACC"] == pytest.approx(100 * 7 / 11)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_counts_on_the_device_of_the_predictions(dataset: Dataset) -> None:
    evaluator = SemSegConfusionEvaluator(dataset.name)
    evaluator.process([dataset.add(LABEL)], [{"sem_seg": scores_of(PREDICTION, 3).cuda()}])
    assert results(evaluator)["pACC"] == pytest.approx(100 * 7 / 11)
