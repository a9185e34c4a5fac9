"""Odd annotations of instances and segments, from a user's folder to predictions and reports."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

import tiny
from semask.cli import main
from semask.data.segments import panoptic_picture
from semask.report.page import REPORT_FILE
from tiny_instances import box_annotation, box_polygon

pytestmark = pytest.mark.usefixtures("catalogs", "one_thread")

SIDE = 64
NAMES = ("light", "dark", "never")


def rle(*box: int, side: int = SIDE, listed: bool = False) -> dict[str, Any]:
    x, y, w, h = box
    mask = np.zeros((side, side), np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    if listed:
        changes = np.flatnonzero(np.diff(mask.reshape(-1, order="F"), prepend=0, append=2))
        return {"size": [side, side], "counts": np.diff(changes, prepend=0).tolist()}
    encoded = mask_util.encode(mask)
    return {"size": [side, side], "counts": encoded["counts"].decode()}


def other(segmentation: Any, box: Any = (8, 8, 20, 20), **more: Any) -> dict[str, Any]:
    entry = {**box_annotation(*(box or (8, 8, 20, 20))), "segmentation": segmentation, **more}
    return {**entry, "bbox": box}


# The annotations of an image each.
INSTANCES: dict[str, list[dict[str, Any]]] = {
    "none": [],
    "usual": [box_annotation(8, 8, 20, 20), box_annotation(36, 30, 16, 20, 7)],
    "crowd alone": [other(rle(8, 8, 30, 20, listed=True), iscrowd=1)],
    "crowd and RLE": [
        other(rle(0, 0, 30, 8, listed=True), (0, 0, 30, 8), iscrowd=1),
        other(rle(20, 20, 30, 30), (20, 20, 30, 30)),
    ],
    "polygons beside RLE": [box_annotation(2, 2, 20, 20), other(rle(30, 30, 9, 9))],
    "empty lists": [other([]), other([[]]), box_annotation(30, 30, 20, 20, 7)],
    "without masks": [other(None), {"bbox": [1, 2, 30, 30], "category_id": 3}],
    "one pixel": [
        other([box_polygon(9, 9, 1, 1)], (9, 9, 1, 1)),
        other(rle(50, 50, 1, 1), (50, 50, 1, 1)),
        other([[9.2, 9.2, 9.4, 9.2, 9.4, 9.4]], (9.2, 9.2, 0.2, 0.2)),
    ],
    "float boxes": [other([box_polygon(8.5, 7.25, 20.1, 19.9)], [8.5, 7.25, 20.1, 19.9])],
    "bad boxes": [other([box_polygon(8, 8, 9, 9)], None), other(rle(8, 8, 9, 9), [9, 9, 0, 0])],
    "outside": [other([box_polygon(-20, 40, 60, 60)], [-20, 40, 60, 60])],
    "far outside": [other([box_polygon(80, 80, 9, 9)], [80, 80, 9, 9])],
    "RLE of another size": [other(rle(8, 8, 9, 9, side=32))],
    "2000": [box_annotation(x, y, 1, 1) for y in range(0, 40) for x in range(0, 50)],
}


def save_image(path: Path, number: int) -> None:
    """Of 8 or 16 bits, in grey, with a palette or with transparency."""
    rng = np.random.default_rng(number)
    pixels = rng.integers(60, 200, (SIDE, SIDE, 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    match number % 5:
        case 0:
            image.save(path)
        case 1:
            Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(path)
        case 2:
            assert cv2.imwrite(str(path), pixels.astype(np.uint16) * 257)
        case 3:
            image.convert("P").save(path)
        case 4:
            image.convert("RGBA").save(path)


def write_instances(folder: Path, split: str) -> None:
    categories = [{"id": i, "name": name} for i, name in zip((3, 7, 9), NAMES, strict=True)]
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
    (folder / "images" / split).mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    for number, (name, entries) in enumerate(INSTANCES.items()):
        save_image(folder / "images" / split / f"{name}.png", number)
        size = {"height": SIDE, "width": SIDE}
        content["images"].append({"id": number, "file_name": f"{name}.png", **size})
        for entry in entries:
            identity = {"id": len(content["annotations"]) + 1, "image_id": number}
            content["annotations"].append({**entry, **identity})
    (folder / f"annotations/instances_{split}.json").write_text(json.dumps(content))


# Ids in four strips of an image, and its segments with their categories; 9 is a crowd.
SEGMENTS: dict[str, tuple[list[int], dict[int, int]]] = {
    "none": ([0, 0, 0, 0], {}),
    "usual": ([1, 2, 70000, 0], {1: 3, 2: 7, 70000: 11}),
    "things alone": ([1, 2, 4, 0], {1: 3, 2: 7, 4: 7}),
    "stuff alone": ([1, 1, 2, 2], {1: 10, 2: 11}),
    "one segment": ([5, 5, 5, 5], {5: 11}),
    "a crowd": ([9, 9, 1, 1], {9: 3, 1: 10}),
    "a crowd alone": ([9, 9, 9, 9], {9: 3}),
    "not in the map": ([1, 1, 1, 1], {1: 10, 2: 3}),
    "not in the file": ([1, 77, 77, 0xFFFFFF], {1: 10}),
    "nothing in common": ([77, 0, 0, 0], {1: 10, 2: 3}),
    "one pixel": ([1, 1, 1, 1], {1: 10, 6: 3}),
    "2000": ([1, 1, 1, 1], {1: 10, **dict.fromkeys(range(100, 2100), 3)}),
}


def write_segments(folder: Path, split: str) -> None:
    ids = (3, 7, 9, 10, 11, 12)
    categories = [
        {"id": i, "name": name, "isthing": int(i < 10)}
        for i, name in zip(ids, (*NAMES, "grass", "sky", "nowhere"), strict=True)
    ]
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
    (folder / "images" / split).mkdir(parents=True)
    maps = folder / f"annotations/panoptic_{split}"
    maps.mkdir(parents=True)
    for number, (name, (strips, segments)) in enumerate(SEGMENTS.items()):
        save_image(folder / "images" / split / f"{name}.png", number)
        picture = np.repeat(strips, SIDE // 4)[None].repeat(SIDE, 0)
        if name == "one pixel":
            picture[30, 30] = 6
        if name == "2000":
            picture[:40, :50] = np.arange(100, 2100).reshape(40, 50)
        Image.fromarray(panoptic_picture(picture)).save(maps / f"{name}.png")
        size = {"height": SIDE, "width": SIDE}
        content["images"].append({"id": number, "file_name": f"{name}.png", **size})
        info = [
            {"id": i, "category_id": category, "iscrowd": int(i == 9)}
            for i, category in segments.items()
        ]
        entry = {"image_id": number, "file_name": f"{name}.png", "segments_info": info}
        content["annotations"].append(entry)
    (folder / f"annotations/panoptic_{split}.json").write_text(json.dumps(content))


@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_odd_annotations_are_named_and_the_rest_is_used(
    tmp_path: Path,
    task: str,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """``semask check``, ``train`` with evaluation and report, and ``predict``."""
    write = write_segments if task == "panoptic" else write_instances
    for split in ("train", "val"):
        write(tmp_path / "own", split)
    small = {
        **{"SWIN.EMBED_DIM": 8, "SWIN.DEPTHS": [1, 1, 1, 1], "SWIN.NUM_HEADS": [1, 1, 2, 2]},
        **{"MASK_FORMER.TRAIN_NUM_POINTS": 64, "MASK_FORMER.NUM_OBJECT_QUERIES": 8},
        "DEVICE": "cpu",
    }
    keys = {
        "DATASETS.FOLDER_ROOT": tmp_path / "own",
        "OUTPUT_DIR": tmp_path / "out",
        **{f"MODEL.{key}": value for key, value in small.items()},
        **{"SOLVER.MAX_ITER": 8, "SOLVER.IMS_PER_BATCH": 2, "TEST.EVAL_PERIOD": 8},
        **{"DATALOADER.NUM_WORKERS": 0, "INPUT.MIN_SIZE_TEST": 64, "INPUT.MIN_SIZE_TRAIN": (64,)},
        "DATALOADER.FILTER_EMPTY_ANNOTATIONS": False,
        "TEST.DETECTIONS_PER_IMAGE": 20,
    }
    name = f"own_dataset/semask_mask2former_{task}_example"
    options = [f"{key}={value}" for key, value in keys.items()]
    with tiny.own_loggers():
        assert main.run("check", ["--config", name, *options]) == 1
    said = capsys.readouterr().out
    wanted = {
        "instance": ["RLE) of another size", "no mask", "outside the image", "never", "has 2000"],
        "panoptic": ["no pixel of the segments 2 of", "ids 77, 16777215", "never, nowhere"],
    }
    assert [words for words in wanted[task] if words not in said] == []
    with tiny.own_loggers():
        assert main.run("train", [name, *options]) == 0
    said = caplog.text + (tmp_path / "out/log.txt").read_text()
    assert [words for words in (*wanted[task][:2], "NUM_OBJECT_QUERIES") if words not in said] == []
    folder = tmp_path / "out/inference" / f"own_{task}{'s' if task == 'instance' else ''}_val"
    assert (folder / REPORT_FILE).is_file()
    lines = map(json.loads, (tmp_path / "out/metrics.json").read_text().splitlines())
    losses = next(line for line in lines if "total_loss" in line)
    assert np.isfinite(losses["total_loss"])
