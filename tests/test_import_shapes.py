"""`semask import`: kinds of shapes in files of labels."""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from brought_labels import (
    label_maps,
)
from semask.data.importers import Options, convert_labels

SQUARE = np.zeros((40, 40), bool)
SQUARE[10:30, 10:30] = True
DISC = np.hypot(*(np.mgrid[:40, :40] + 0.5 - 20)) < 10
RING = SQUARE.copy()
RING[15:25, 15:25] = False


def cvat_shape(root: Path, shape: str) -> None:
    image = f'<image id="0" name="a.png" width="40" height="40">{shape}</image>'
    other = image.replace("a.png", "b.png")
    (root / "annotations.xml").write_text(f"<annotations>{image}{other}</annotations>")


def labelme_shape(root: Path, shape: dict[str, Any]) -> None:
    for name in ("a", "b"):
        content = {"shapes": [{"label": "car", **shape}], "imagePath": f"{name}.png"}
        (root / f"{name}.json").write_text(json.dumps(content))


def label_studio_shape(root: Path, kind: str, value: dict[str, Any]) -> None:
    sizes = {"original_width": 40, "original_height": 40}
    result = {"type": kind, "value": {**value, kind: ["car"]}, **sizes}
    tasks = [
        {"id": 1, "data": {"image": f"s3://b/{name}.png"}, "annotations": [{"result": [result]}]}
        for name in ("a", "b")
    ]
    (root / "export.json").write_text(json.dumps(tasks))


def supervisely_shape(root: Path, shape: dict[str, Any]) -> None:
    (root / "meta.json").write_text(json.dumps({"classes": [{"title": "car"}]}))
    for name in ("a", "b"):
        for kind in ("ann", "img"):
            (root / "ds" / kind).mkdir(parents=True, exist_ok=True)
        (root / f"{name}.png").rename(root / "ds" / "img" / f"{name}.png")
        content = {"size": {"height": 40, "width": 40}, "objects": [{"classTitle": "car", **shape}]}
        (root / "ds" / "ann" / f"{name}.png.json").write_text(json.dumps(content))


def png(mask: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(file, "PNG")
    return file.getvalue()


TURNED = '<box label="car" xtl="10" ytl="10" xbr="30" ybr="30" rotation="90.0"/>'
ELLIPSE = '<ellipse label="car" cx="20" cy="20" rx="10" ry="10"/>'
RUNS = ", ".join(["0, 20"] + ["0, 20"] * 4)  # the first five rows, whole
MASK = f'<mask label="car" rle="{RUNS}" left="10" top="10" width="20" height="5"/>'
CORNERS = [[10, 10], [30, 10], [30, 30], [10, 30]]
HOLE = [[15, 15], [25, 15], [25, 25], [15, 25]]


@pytest.mark.parametrize(
    ("write", "shape", "expected"),
    [
        (cvat_shape, (TURNED,), SQUARE),
        (cvat_shape, (ELLIPSE,), DISC),
        (cvat_shape, (MASK,), SQUARE & (np.arange(40)[:, None] < 15)),
        (labelme_shape, ({"shape_type": "rectangle", "points": [[30, 10], [10, 30]]},), SQUARE),
        (labelme_shape, ({"shape_type": "circle", "points": [[20, 20], [30, 20]]},), DISC),
        (
            labelme_shape,
            (
                {
                    "shape_type": "mask",
                    "points": [[10, 10], [29, 29]],
                    "mask": base64.b64encode(png(RING[10:30, 10:30])).decode(),
                },
            ),
            RING,
        ),
        (
            label_studio_shape,
            ("rectanglelabels", {"x": 75, "y": 25, "width": 50, "height": 50, "rotation": 90}),
            SQUARE,
        ),
        (
            label_studio_shape,
            ("ellipselabels", {"x": 50, "y": 50, "radiusX": 25, "radiusY": 25}),
            DISC,
        ),
        (
            supervisely_shape,
            ({"geometryType": "polygon", "points": {"exterior": CORNERS, "interior": [HOLE]}},),
            RING,
        ),
        (
            supervisely_shape,
            ({"geometryType": "rectangle", "points": {"exterior": [[10, 10], [29, 29]]}},),
            SQUARE,
        ),
    ],
)
def test_kinds_of_shapes(
    tmp_path: Path, write: Callable[..., None], shape: tuple[Any, ...], expected: np.ndarray
) -> None:
    root = tmp_path / "in"
    root.mkdir()
    for name in ("a", "b"):
        Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(root / f"{name}.png")
    write(root, *shape)
    found = label_maps(convert_labels(root, tmp_path / "out"))["a"] == 1
    assert (found != expected).mean() < 0.02
    result = convert_labels(root, tmp_path / "coco", Options(layout="coco"))
    assert result.counts == [("car", 2, 2)]
