"""The evaluation of instances by Detectron2's evaluators, on files as they come."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances

from semask import load_config
from semask.data import register_coco_folder
from semask.data.annotations import inspect
from semask.data.checks.instances import check_instance_dataset
from semask.data.mappers.prior_target import Region
from semask.errors import ConfigError
from semask.evaluation.instance_evaluators import RESULT_FILE
from semask.tasks import build_task, inference_folder
from tiny_instances import SIDE, box_annotation, flat, two_boxes, write_dataset

CONFIGS = Path(__file__).parents[1] / "configs"

pytestmark = pytest.mark.usefixtures("catalogs", "one_thread")


def perfect(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Outputs that equal the usable annotations."""
    outputs = []
    for record in records:
        found: list[Any] = [inspect(a, SIDE, SIDE) for a in record["annotations"]]
        kept = [
            (a["category_id"], f)
            for a, f in zip(record["annotations"], found, strict=True)
            if isinstance(f.segmentation, list)
        ]
        instances = Instances((SIDE, SIDE))
        instances.pred_boxes = Boxes(torch.tensor([f.box for _, f in kept]).reshape(-1, 4))
        instances.scores = torch.ones(len(kept))
        instances.pred_classes = torch.tensor([c for c, _ in kept], dtype=torch.int64)
        masks = [Region(c, polygons=f.segmentation).mask_of_image(SIDE, SIDE) for c, f in kept]
        instances.pred_masks = torch.from_numpy(np.array(masks)).reshape(-1, 64, 64).bool()
        outputs.append({"instances": instances})
    return outputs


@pytest.mark.parametrize("segmentation", [[[1, 2, 3, 4]], [], None])
def test_files_that_lack_what_pycocotools_wants_are_evaluated(
    tmp_path: Path, segmentation: Any
) -> None:
    """No info, area or iscrowd, ids from 0, an instance without a mask: AP is still 100."""
    bad = {**box_annotation(4, 40, 9, 9), "segmentation": segmentation}
    path = write_dataset(tmp_path, [[*two_boxes(), bad], two_boxes(), []])
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        del annotation["area"]
        annotation["iscrowd"] = None
        annotation["id"] -= 1
    path.write_text(json.dumps(content))
    register_coco_folder("own", tmp_path / "images", path)
    records = DatasetCatalog.get("own")
    cfg = load_config(
        str(CONFIGS / "coco/semask_swin_tiny_mask_rcnn_1x.yaml"),
        flat({"TEST.DETECTIONS_PER_IMAGE": 300}),
    )
    evaluator = build_task(cfg).build_evaluator("own", str(tmp_path / "results"))
    evaluator.reset()
    evaluator.process(records, perfect(records))
    results = evaluator.evaluate()
    assert results["segm"]["AP"] == pytest.approx(100)
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert {"AP-light", "AP-dark"} <= results["segm"].keys()


def test_what_passes_the_check_is_evaluated(tmp_path: Path) -> None:
    """Ids as texts, numbers as texts, sizes that are null, polygons in other forms: AP is 100."""
    path = write_dataset(tmp_path, [two_boxes(), two_boxes()])
    content = json.loads(path.read_text())
    forms: list[Any] = [lambda p: p, lambda p: p[0], lambda p: np.reshape(p[0], (-1, 2)).tolist()]
    for part in ("images", "categories", "annotations"):
        for entry in content[part]:
            entry["id"] = f"number {entry['id']}"
    for index, annotation in enumerate(content["annotations"]):
        annotation["image_id"] = f"number {annotation['image_id']}"
        annotation["category_id"] = f"number {annotation['category_id']}"
        annotation["bbox"] = [str(value) for value in annotation["bbox"]]
        annotation["area"] = [None, "12"][index % 2]
        annotation["segmentation"] = forms[index % 3](annotation["segmentation"])
    path.write_text(json.dumps(content))
    register_coco_folder("own", tmp_path / "images", path)
    assert check_instance_dataset("own").problems == []
    records = DatasetCatalog.get("own")
    cfg = load_config(
        str(CONFIGS / "coco/semask_swin_tiny_mask_rcnn_1x.yaml"),
        flat({"OUTPUT_DIR": str(tmp_path / "out")}),
    )
    evaluator = build_task(cfg).build_evaluator("own", inference_folder(cfg, "own"))
    evaluator.reset()
    evaluator.process(records, perfect(records))
    results = evaluator.evaluate()
    assert results["segm"]["AP"] == results["bbox"]["AP"] == pytest.approx(100)
    document = json.loads((Path(inference_folder(cfg, "own")) / RESULT_FILE).read_text())
    assert [image["right"] for image in document["images"]] == [2, 2]


@pytest.mark.parametrize(("limit", "recall"), [(100, 1 / 3), (400, 1.0)])
def test_the_limit_of_detections_per_image_is_the_configs(
    tmp_path: Path, limit: int, recall: float
) -> None:
    many = [box_annotation(3 * (n % 20), 3 * (n // 20), 2, 2) for n in range(300)]
    path = write_dataset(tmp_path, [many])
    register_coco_folder("own", tmp_path / "images", path)
    records = DatasetCatalog.get("own")
    cfg = load_config(
        str(CONFIGS / "coco/semask_swin_tiny_mask_rcnn_1x.yaml"),
        flat({"TEST.DETECTIONS_PER_IMAGE": limit}),
    )
    evaluator = build_task(cfg).build_evaluator("own", str(tmp_path / "results"))
    evaluator.reset()
    evaluator.process(records, perfect(records))
    # AP of one category is the share of recall levels 0, 0.01, ..., 1 that are reached.
    expected = 100 * (int(100 * recall + 1e-6) + 1) / 101
    assert evaluator.evaluate()["segm"]["AP-light"] == pytest.approx(expected, abs=0.01)


def test_datasets_of_other_kinds_are_refused(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, [two_boxes()])
    cfg = load_config(str(CONFIGS / "coco/semask_swin_tiny_panoptic_fpn_1x.yaml"))
    register_coco_folder("other", tmp_path, path, evaluator_type="lvis")
    with pytest.raises(ConfigError, match="'lvis'"):
        build_task(cfg).build_evaluator("other", inference_folder(cfg, "other"))


def test_a_panoptic_model_is_evaluated_on_instances_alone_without_a_semantic_map() -> None:
    config = str(CONFIGS / "coco/semask_swin_tiny_panoptic_fpn_1x.yaml")
    names = {"DATASETS.TEST": ("coco_2017_val",)}
    build_task(load_config(config, flat(names))).check_metadata("coco_2017_val")
    cfg = load_config(config, flat({**names, "DATASETS.TRAIN": ("coco_2017_val",)}))
    with pytest.raises(ConfigError, match="semantic classes"):
        build_task(cfg).check_metadata("coco_2017_val")
