"""AP by both libraries, against Detectron2's evaluator, and Boundary AP against its definition."""

from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances

from odd_files import open_with_ascii
from semask.data import register_coco_folder
from semask.errors import ConfigError
from semask.evaluation.average_precision import contour_band
from semask.evaluation.instance_evaluators import InstanceEvaluator
from semask.ops.mask_postprocess import EncodedMasks, encode_mask
from tiny_instances import SIDE, box_annotation, write_dataset

pytestmark = pytest.mark.usefixtures("catalogs", "one_thread")

Examples = tuple[list[dict[str, Any]], list[dict[str, Any]]]


@pytest.fixture
def examples(tmp_path: Path) -> Examples:
    """Dataset dicts of random rectangles with crowds, and predictions that are a little off."""
    rng = np.random.default_rng(3)
    annotations, outputs = [], []
    for number in range(8):
        entries, boxes, classes = [], [], []
        for _ in range(0 if number == 5 else 7):
            x, y, w, h = (int(value) for value in rng.integers(3, 26, 4))
            category = int(rng.choice([3, 7]))
            entry = box_annotation(x, y, w, h, category)
            entry["iscrowd"] = int(rng.random() < 0.15)
            entries.append(entry)
            for _ in range(int(rng.integers(0, 3))):
                dx, dy = (int(value) for value in rng.integers(-2, 3, 2))
                boxes.append([x + dx, y + dy, x + w + dy, y + h + dx])
                classes.append(int(category == 7) if rng.random() < 0.8 else 0)
        annotations.append(entries)
        found = Instances((SIDE, SIDE))
        found.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4).float())
        found.scores = torch.from_numpy(rng.random(len(boxes))).float()
        found.pred_classes = torch.tensor(classes, dtype=torch.int64)
        masks = torch.zeros(len(boxes), SIDE, SIDE, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
            mask[y0:y1, x0:x1] = True
        found.pred_masks = masks
        outputs.append({"instances": found})
    path = write_dataset(tmp_path, annotations)
    register_coco_folder("own", tmp_path / "images", path)
    return DatasetCatalog.get("own"), outputs


def evaluated(examples: Examples, folder: Path, **options: Any) -> dict[str, dict[str, float]]:
    folder.mkdir(exist_ok=True)
    evaluator = InstanceEvaluator("own", str(folder), masks=True, **options)
    evaluator.process(*examples)
    results = evaluator.evaluate()
    assert results is not None
    return results


@pytest.mark.parametrize("limit", [100, 12])
def test_both_libraries_give_what_detectron2_gives(
    tmp_path: Path, examples: Examples, limit: int
) -> None:
    reference = COCOEvaluator(
        *("own", ("bbox", "segm")), max_dets_per_image=limit, use_fast_impl=False
    )
    reference.reset()
    reference.process(*examples)
    expected = reference.evaluate()
    assert 1 < expected["segm"]["AP"] < 99
    for library in ("pycocotools", "hotcoco"):
        results = evaluated(
            examples, tmp_path / library, detections_per_image=limit, library=library
        )
        for kind, values in expected.items():
            assert results[kind] == pytest.approx(values, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("library", ["pycocotools", "hotcoco"])
def test_small_limits(tmp_path: Path, examples: Examples, library: str) -> None:
    """COCO's limits include 10, but no more detections of a class count than the limit."""
    records, outputs = examples
    results = evaluated(examples, tmp_path / "all", detections_per_image=2, library=library)
    first = []
    for output in outputs:
        found = output["instances"]
        found = found[found.scores.argsort(descending=True)]
        best = [(found.pred_classes == category).nonzero()[:2, 0] for category in range(2)]
        first.append({"instances": found[torch.cat(best)]})
    want = evaluated((records, first), tmp_path / "first", library=library)
    for kind, values in want.items():
        assert results[kind] == pytest.approx(values, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("library", ["pycocotools", "hotcoco"])
def test_a_negative_limit_is_none(tmp_path: Path, examples: Examples, library: str) -> None:
    results = evaluated(examples, tmp_path / "all", detections_per_image=-1, library=library)
    want = evaluated(examples, tmp_path / "many", detections_per_image=999, library=library)
    for kind, values in want.items():
        assert results[kind] == pytest.approx(values, abs=1e-9, nan_ok=True)


def test_annotations_are_read_as_utf_8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the locale's encoding is."""
    path = write_dataset(tmp_path, [[box_annotation(3, 3, 9, 9, 3)]])
    text = path.read_text(encoding="utf-8").replace('"light"', '"Gebäude"')
    path.write_text(text, encoding="utf-8")
    register_coco_folder("own", tmp_path / "images", path)
    monkeypatch.setattr("builtins.open", open_with_ascii)
    evaluator = InstanceEvaluator("own", str(tmp_path), masks=True)
    assert "Gebäude" in evaluator.category_names.values()


def test_encoded_masks_are_evaluated_as_they_are(tmp_path: Path, examples: Examples) -> None:
    records, outputs = examples
    want = evaluated(examples, tmp_path / "full")
    for output in outputs:
        masks = output["instances"].pred_masks
        output["instances"].pred_masks = EncodedMasks([encode_mask(mask) for mask in masks])
    got = evaluated((records, outputs), tmp_path / "encoded")
    assert str(got) == str(want)
    assert (tmp_path / "encoded/instance_evaluation.json").read_text() == (
        tmp_path / "full/instance_evaluation.json"
    ).read_text()


def test_boundary_ap_sees_contours(tmp_path: Path, examples: Examples) -> None:
    results = evaluated(examples, tmp_path / "out", boundary=True)
    assert 0 < results["boundary"]["AP"] < results["segm"]["AP"]
    records, outputs = examples
    for record, output in zip(records, outputs, strict=True):
        entries = [entry for entry in record["annotations"] if not entry["iscrowd"]]
        corners = torch.tensor([entry["bbox"] for entry in entries]).reshape(-1, 4).float()
        corners[:, 2:] += corners[:, :2]
        found = Instances((SIDE, SIDE), pred_boxes=Boxes(corners), scores=torch.ones(len(entries)))
        found.pred_classes = torch.tensor([e["category_id"] for e in entries], dtype=torch.int64)
        masks = torch.zeros(len(entries), SIDE, SIDE, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, corners.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = True
        found.pred_masks = masks
        output["instances"] = found
    perfect = evaluated((records, outputs), tmp_path / "perfect", boundary=True)
    assert perfect["boundary"]["AP"] == pytest.approx(perfect["segm"]["AP"]) == 100


def test_the_band_is_what_is_near_the_contour() -> None:
    mask = np.zeros((60, 80), np.uint8)
    mask[:40, 10:70] = 1
    band = mask_util.decode(contour_band(mask_util.encode(np.asfortranarray(mask))))
    want = mask.copy()
    want[2:38, 12:68] = 0  # 2 % of the diagonal of 100 pixels; the image's border is a contour
    np.testing.assert_array_equal(band, want)


def test_unknown_library(tmp_path: Path, examples: Examples) -> None:
    with pytest.raises(ConfigError, match=r"TEST\.AP_LIBRARY"):
        evaluated(examples, tmp_path / "out", library="fast")


def test_nothing_found(tmp_path: Path, examples: Examples) -> None:
    records, outputs = examples
    nothing = [{"instances": output["instances"][:0]} for output in outputs]
    results = evaluated((records, nothing), tmp_path / "out", boundary=True)
    assert all(np.isnan(value) for values in results.values() for value in values.values())
