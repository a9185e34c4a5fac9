"""Instances and segments of published datasets: from the downloaded files to an evaluation."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import builtin
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import Tensor, nn

from semask.cli import main
from semask.config.loading import load_config
from semask.data.reading import read_image
from semask.data.segments import panoptic_picture
from semask.engine import Trainer
from semask.errors import DataError
from semask.evaluation.average_precision import CITYSCAPES_PACKAGE
from semask.report.page import REPORT_FILE
from semask.tasks import build_task, inference_folder
from tiny_instances import SMALL_MODEL, flat

CONFIGS = Path(__file__).parents[1] / "configs"
pytestmark = pytest.mark.usefixtures("catalogs", "one_thread")
HEIGHT, WIDTH = 32, 64


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "datasets"
    monkeypatch.setenv("DETECTRON2_DATASETS", str(folder))
    return folder


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def photograph(path: Path) -> None:
    rng = np.random.default_rng(0)
    save(path, rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))


# Ground, two things side by side, and what is behind them; of each a value of ours.
SHAPES = np.zeros((HEIGHT, WIDTH), np.int64)
SHAPES[:16], SHAPES[16:] = 1, 2
SHAPES[6:28, 4:20], SHAPES[8:30, 24:40], SHAPES[2:12, 44:60] = 3, 4, 5
SHAPES[:1] = 0


def painted(*values: int) -> np.ndarray:
    """An image in which the pixels of each shape, 0 to 5, have a value."""
    return np.array(values)[SHAPES]


def ade20k(root: Path) -> None:
    """Sky over grass; a bed and two cars, of which one has no instance."""
    folder = root / "ADEChallengeData2016"
    for split, stem in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        photograph(folder / "images" / split / f"{stem}.jpg")
        labels = painted(0, 3, 10, 8, 21, 21).astype(np.uint8)
        save(folder / "annotations" / split / f"{stem}.png", labels)
        channels = [painted(0, 0, 0, 1, 9, 0), painted(0, 0, 0, 7, 2, 0), painted(*[0] * 6)]
        save(
            folder / "annotations_instance" / split / f"{stem}.png",
            np.stack(channels, axis=-1).astype(np.uint8),
        )


def cityscapes(root: Path) -> None:
    """Road below a building; a person and a car, and a group of cars."""
    folder = root / "cityscapes"
    for split in ("train", "val"):
        stem = f"{split}/ulm/ulm_000000_000019"
        photograph(folder / f"leftImg8bit/{stem}_leftImg8bit.png")
        ids = painted(3, 11, 7, 24000, 26001, 26).astype(np.uint16)
        save(folder / f"gtFine/{stem}_gtFine_instanceIds.png", ids)


def coco(root: Path) -> None:
    """As its archives unpack: polygons of instances, maps of segments."""
    categories = [{key: c[key] for key in ("id", "name", "isthing")} for c in COCO_CATEGORIES]
    for split in ("train2017", "val2017"):
        photograph(root / f"coco/{split}/000000000139.jpg")
        images = [
            {"id": 139, "file_name": "000000000139.jpg", "height": HEIGHT, "width": WIDTH},
        ]
        annotations = [
            {
                **{"id": number, "image_id": 139, "category_id": 3, "iscrowd": 0},
                **{"bbox": [x, y, w, h], "area": w * h},
                "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
            }
            for number, (x, y, w, h) in ((1, (4, 6, 16, 22)), (2, (24, 8, 16, 22)))
        ]
        content: dict[str, Any] = {"images": images, "annotations": annotations}
        content["categories"] = [entry for entry in categories if entry["isthing"]]
        path = root / f"coco/annotations/instances_{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        ids = painted(0, 1, 2, 3, 4, 0)
        save(root / f"coco/panoptic_{split}/000000000139.png", panoptic_picture(ids))
        segments = [
            {"id": number, "category_id": category, "iscrowd": 0, "area": 1, "bbox": [0, 0, 1, 1]}
            for number, category in ((1, 187), (2, 193), (3, 3), (4, 3))
        ]
        entry = {"image_id": 139, "file_name": "000000000139.png", "segments_info": segments}
        content = {"images": images, "annotations": [entry], "categories": categories}
        (path.parent / f"panoptic_{split}.json").write_text(json.dumps(content))


class Perfect(nn.Module):
    """The predictions of a perfect model: classes of the six shapes, -1 = none.

    Args:
        classes: of the model, of each shape.
        things: the shapes that are instances.
    """

    def __init__(self, classes: list[int], things: list[int], number: int) -> None:
        super().__init__()
        self.classes, self.things, self.number = classes, things, number

    def forward(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        shapes = torch.from_numpy(SHAPES)
        masks = torch.stack([shapes == shape for shape in self.things])
        instances = Instances((HEIGHT, WIDTH), pred_masks=masks)
        instances.pred_classes = torch.tensor([self.classes[shape] for shape in self.things])
        instances.scores = torch.ones(len(self.things))
        instances.pred_boxes = Boxes(torch.stack([box(mask) for mask in masks]))
        kept = [shape for shape in range(6) if self.classes[shape] >= 0]
        segments = [
            {"id": shape, "isthing": shape in self.things, "category_id": self.classes[shape]}
            for shape in kept
        ]
        ids = torch.where(torch.isin(shapes, torch.tensor(kept)), shapes, 0)
        named = torch.tensor([max(0, number) for number in self.classes])[shapes]
        scores = nn.functional.one_hot(named, self.number).permute(2, 0, 1).float()
        output = {"instances": instances, "panoptic_seg": (ids, segments), "sem_seg": scores}
        return [output for _ in batch]


def box(mask: Tensor) -> Tensor:
    rows, columns = mask.nonzero().unbind(1)
    ends = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    return torch.stack(ends).float()


def config(tmp_path: Path, name: str) -> CfgNode:
    small = {
        **SMALL_MODEL,
        "OUTPUT_DIR": str(tmp_path / "out"),
        "SOLVER.MAX_ITER": 1,
        "SOLVER.AMP.ENABLED": False,
        "SOLVER.IMS_PER_BATCH": 1,
        "DATALOADER.NUM_WORKERS": 0,
        "DATALOADER.FILTER_EMPTY_ANNOTATIONS": False,
        "TEST.REPORT": False,
        "INPUT.LSJ.SIZE": [64, 64],
        "INPUT.MIN_SIZE_TRAIN": (64,),
        "INPUT.CROP.SIZE": [64, 64],
        "INPUT.MIN_SIZE_TEST": 32,
        "MODEL.EXPECTS_WEIGHTS": False,
        **{f"MODEL.MASK_FORMER.{key}": value for key, value in SMALL_DECODER.items()},
        "MODEL.SEM_SEG_HEAD.MASK_DIM": 32,
        "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 1,
    }
    if name.startswith("ade20k"):
        small["INPUT.SIZE_DIVISIBILITY"] = 64
    return load_config(str(CONFIGS / name), flat(small))


SMALL_DECODER = {
    **{"HIDDEN_DIM": 32, "NHEADS": 2, "DIM_FEEDFORWARD": 48, "DEC_LAYERS": 2},
    **{"NUM_OBJECT_QUERIES": 6, "TRAIN_NUM_POINTS": 64},
}


def write(kind: str, root: Path) -> None:
    """Write the downloaded files of a dataset, and run the command on them."""
    {"ade20k": ade20k, "cityscapes": cityscapes, "coco": coco}[kind](root)
    if kind != "coco":
        assert main.run("prepare", [kind, "--workers", "0"]) == 0


# Of each config the classes of the six shapes, the things, and the number of classes.
CASES: dict[str, tuple[list[int], list[int], int]] = {
    "ade20k/semask_swin_large_mask2former_instance.yaml": ([-1, -1, -1, 0, 8, -1], [3, 4], 100),
    "ade20k/semask_swin_large_mask2former_panoptic.yaml": ([-1, 2, 9, 7, 20, -1], [3, 4], 150),
    "cityscapes/semask_swin_large_mask2former_instance.yaml": (
        *([-1, -1, -1, 0, 2, -1], [3, 4]),
        8,
    ),
    "cityscapes/semask_swin_large_mask2former_panoptic.yaml": (
        *([-1, 2, 0, 11, 13, -1], [3, 4]),
        19,
    ),
    "coco/semask_swin_tiny_mask2former_instance.yaml": ([-1, -1, -1, 2, 2, -1], [3, 4], 80),
    "coco/semask_swin_tiny_mask2former_panoptic.yaml": ([-1, 119, 125, 2, 2, -1], [3, 4], 133),
}


@pytest.fixture
def detectron2s(root: Path, catalogs: None) -> None:
    """Detectron2's own registrations, as if it had been imported with this DETECTRON2_DATASETS."""
    for catalog in (DatasetCatalog, MetadataCatalog):
        for name in [
            key for key in catalog if key.startswith(("coco_", "keypoints_coco", "cityscapes_fine"))
        ]:
            catalog.pop(name)
    builtin.register_all_coco(str(root))
    builtin.register_all_cityscapes(str(root))
    builtin.register_all_cityscapes_panoptic(str(root))


@pytest.mark.usefixtures("detectron2s")
@pytest.mark.parametrize("name", CASES)
def test_what_is_right_is_evaluated_as_right(root: Path, tmp_path: Path, name: str) -> None:
    """All scores are 100 for the ground truth: ids, classes and files belong together."""
    classes, things, number = CASES[name]
    write(name.partition("/")[0], root)
    cfg = config(tmp_path, name)
    assert number == cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    task = build_task(cfg)
    task.check_datasets([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST], eval_only=False)
    results = Trainer.test(cfg, Perfect(classes, things, number))
    assert results["segm"]["AP"] == pytest.approx(100)
    assert results["bbox"]["AP"] == pytest.approx(100)
    official = (
        cfg.TASK == "instance" and name.startswith("cityscapes") and find_spec(CITYSCAPES_PACKAGE)
    )
    assert ("cityscapes" in results) == bool(official)
    if official:
        assert results["cityscapes"]["AP"] == pytest.approx(100)
    if cfg.TASK == "panoptic":
        assert results["panoptic_seg"]["PQ"] == pytest.approx(100)
        if not name.startswith("ade20k"):  # whose label maps know the car without an instance
            assert results["sem_seg"]["pACC"] == pytest.approx(100)


@pytest.mark.slow
@pytest.mark.usefixtures("detectron2s")
@pytest.mark.parametrize("name", CASES)
def test_a_step_and_an_evaluation(root: Path, tmp_path: Path, name: str) -> None:
    write(name.partition("/")[0], root)
    cfg = config(tmp_path, name)
    cfg.TEST.REPORT = True
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert "AP" in trainer.results["segm"]
    page = Path(inference_folder(cfg, cfg.DATASETS.TEST[0])) / REPORT_FILE
    assert "car" in page.read_text()


def test_ade20k_files(root: Path) -> None:
    write("ade20k", root)
    (record,) = DatasetCatalog.get("ade20k_instance_val")
    found = {entry["category_id"]: entry["bbox"] for entry in record["annotations"]}
    assert found == {0: [4, 6, 16, 22], 8: [24, 8, 16, 22]}
    names = MetadataCatalog.get("ade20k_instance_val").thing_classes
    assert (len(names), names[0], names[8], names[99]) == (100, "bed", "car", "flag")
    (record,) = DatasetCatalog.get("ade20k_panoptic_train")
    ids = read_image(record["pan_seg_file_name"]).astype(np.int64) @ [1, 256, 65536]
    seen = {each["id"]: each["category_id"] for each in record["segments_info"]}
    assert np.array_equal(np.vectorize({0: -1, **seen}.get)(ids), painted(-1, 2, 9, 7, 20, -1))
    things = {each["category_id"] for each in record["segments_info"] if each["isthing"]}
    assert things == {7, 20}


def test_cityscapes_files(root: Path) -> None:
    write("cityscapes", root)
    (record,) = DatasetCatalog.get("cityscapes_instance_val")
    found = {(e["category_id"], e["iscrowd"]): e["bbox"] for e in record["annotations"]}
    boxes = {(0, 0): [4, 6, 16, 22], (2, 0): [24, 8, 16, 22], (2, 1): [44, 2, 16, 10]}
    assert found == boxes
    (record,) = DatasetCatalog.get("cityscapes_panoptic_val")
    assert Path(record["file_name"]).is_file()
    ids = read_image(record["pan_seg_file_name"]).astype(np.int64) @ [1, 256, 65536]
    assert np.array_equal(ids, painted(0, 11, 7, 24000, 26001, 26))  # as the scripts write them
    by_id = {each["id"]: (each["category_id"], each["iscrowd"]) for each in record["segments_info"]}
    assert by_id == {11: (2, 0), 7: (0, 0), 24000: (11, 0), 26001: (13, 0), 26: (13, 1)}
    labels = np.asarray(
        Image.open(root / "cityscapes/gtFine/val/ulm/ulm_000000_000019_gtFine_labelTrainIds.png")
    )
    assert np.array_equal(labels, painted(255, 2, 0, 11, 13, 13))


def test_missing_train_ids_are_written(root: Path) -> None:
    """Also if nothing else is missing."""
    write("cityscapes", root)
    written = {path: path.read_bytes() for path in root.rglob("*.*") if path.is_file()}
    (missing,) = root.rglob("val/ulm/*_labelTrainIds.png")
    missing.unlink()
    assert main.run("prepare", ["cityscapes", "--workers", "0"]) == 0
    assert {path: path.read_bytes() for path in root.rglob("*.*") if path.is_file()} == written


@pytest.mark.usefixtures("detectron2s")
def test_detectron2s_cityscapes_reads_the_same_files(root: Path) -> None:
    write("cityscapes", root)
    loader = {
        name: DatasetCatalog.get(f"cityscapes_{name}_val") for name in ("panoptic", "fine_panoptic")
    }
    ours, theirs = loader["panoptic"][0], loader["fine_panoptic"][0]
    for key in ("file_name", "image_id", "pan_seg_file_name"):
        assert ours[key] == theirs[key]
    assert [
        {key: each[key] for key in ("id", "category_id", "iscrowd")}
        for each in theirs["segments_info"]
    ] == [
        {key: each[key] for key in ("id", "category_id", "iscrowd")}
        for each in ours["segments_info"]
    ]


@pytest.mark.parametrize("kind", ["ade20k", "cityscapes"])
@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_files_that_are_not_made_yet(kind: str, task: str) -> None:
    with pytest.raises(DataError, match=rf"{kind}_{task}_val\.json.*semask prepare {kind}"):
        DatasetCatalog.get(f"{kind}_{task}_val")


@pytest.mark.parametrize("kind", ["ade20k", "cityscapes"])
def test_downloaded_files_that_are_missing(
    root: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run("prepare", [kind, "--workers", "0"]) == 2
    text = capsys.readouterr().err
    assert "Expected there:" in text
    assert "instances" in text


@pytest.mark.parametrize("kind", ["ade20k", "cityscapes"])
def test_existing_files_are_not_changed(
    root: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also those of other programs, whose ids may be others; what is missing is written."""
    write(kind, root)
    maps = sorted(root.rglob("*_panoptic_val/*.png"))
    panoptic, instances = (
        next(root.rglob(f"{kind}_{task}_val.json")) for task in ("panoptic", "instance")
    )
    written = instances.read_bytes()
    panoptic.write_text("{}")
    save(maps[0], np.full((HEIGHT, WIDTH, 3), 7, np.uint8))
    kept = {path: path.read_bytes() for path in (panoptic, maps[0])}
    instances.unlink()
    capsys.readouterr()
    assert main.run("prepare", [kind, "--workers", "0"]) == 0
    assert f"{panoptic} (exists" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in kept} == kept
    assert instances.read_bytes() == written
    panoptic.unlink()  # the map of other ids would not fit the new file
    assert main.run("prepare", [kind, "--workers", "0"]) == 2
    assert str(maps[0]) in capsys.readouterr().err
    assert maps[0].read_bytes() == kept[maps[0]]
    maps[0].unlink()
    panoptic.write_text("{}")
    assert main.run("prepare", [kind, "--workers", "0"]) == 2
    assert maps[0].name in capsys.readouterr().err


@pytest.mark.parametrize("value", [0, 101])
def test_categories_of_instances_that_cannot_be(
    root: Path, value: int, capsys: pytest.CaptureFixture[str]
) -> None:
    ade20k(root)
    path = root / "ADEChallengeData2016/annotations_instance/validation/ADE_val_00000001.png"
    picture = np.array(Image.open(path))
    picture[..., 0][picture[..., 1] == 7] = value
    save(path, picture)
    assert main.run("prepare", ["ade20k", "--workers", "0"]) == 2
    assert path.name in capsys.readouterr().err


def test_annotations_of_dicts_alone_are_evaluated(tmp_path: Path) -> None:
    """A dataset without any file, as Detectron2's own Cityscapes of instances is."""
    write_to = str(tmp_path / "image.png")
    photograph(Path(write_to))
    record = {
        "file_name": write_to,
        **{"image_id": "image", "height": HEIGHT, "width": WIDTH},
        "annotations": [
            {
                **{"bbox": (4, 6, 20, 28), "bbox_mode": 0, "iscrowd": False, "category_id": 0},
                "segmentation": [[4, 6, 20, 6, 20, 28, 4, 28]],
            },
            {
                **{"bbox": (24, 8, 40, 30), "bbox_mode": 0, "iscrowd": False, "category_id": 2},
                "segmentation": [[24, 8, 40, 8, 40, 30, 24, 30]],
            },
        ],
    }
    DatasetCatalog.register("dicts", lambda: [record])
    names = MetadataCatalog.get("cityscapes_instance_val").thing_classes
    MetadataCatalog.get("dicts").set(evaluator_type="cityscapes_instance", thing_classes=names)
    cfg = config(tmp_path, "cityscapes/semask_swin_large_mask2former_instance.yaml")
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("dicts",)
    build_task(cfg).check_datasets(["dicts"], eval_only=True)
    results = Trainer.test(cfg, Perfect([-1, -1, -1, 0, 2, -1], [3, 4], 8))
    assert results["segm"]["AP"] == pytest.approx(100)
