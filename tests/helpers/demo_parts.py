"""Predictors, files and the parsed page, for the tests of the demo."""

import base64
import io
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.modeling import build_model
from PIL import Image

from semask import load_config
from semask.inference.prediction import ImagePrediction
from semask.inference.predictor import ImagePredictor, Predictor
from semask.inference.video import writing_video
from tiny_instances import SMALL_MODEL, flat
from tiny_model import checkpoint, config, photograph

HEIGHT, WIDTH = 60, 90
MODELS = {
    "instance": "coco/semask_swin_tiny_mask_rcnn_1x",
    "panoptic": "coco/semask_swin_tiny_panoptic_fpn_1x",
}


def predictor_of(kind: str, folder: Path) -> ImagePredictor:
    if kind == "semantic":
        return Predictor(config(folder), checkpoint(folder))
    keys = {
        "DATASETS.TRAIN": (),
        "DATASETS.TEST": (),
        "INPUT.MIN_SIZE_TEST": 50,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 4,
        "MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT": 1,
        "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH": 0.0,
        "TEST.DETECTIONS_PER_IMAGE": 7,
    }
    cfg = load_config(MODELS[kind], flat({**SMALL_MODEL, **keys}))
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, folder / "model.pth")
    predictor: ImagePredictor = Predictor(cfg, folder / "model.pth")
    return predictor


class Plugin(ImagePredictor):
    """A predictor that somebody else has written."""

    has_priors = False

    def __init__(self, predict: Callable[[], ImagePrediction]) -> None:
        self.predict = predict

    def set_up(self) -> None: ...

    def __call__(self, image: Any, *, priors: bool = False) -> ImagePrediction:
        return self.predict()


def save_photo(folder: Path) -> Path:
    path = folder / "my <photo>.png"
    Image.fromarray(photograph(HEIGHT, WIDTH)).save(path)
    return path


def save_video(path: Path, frames: int = 6) -> None:
    with writing_video(path, 5) as video:
        for index in range(frames):
            video.write(photograph(HEIGHT, WIDTH, seed=index))


class Page(HTMLParser):
    """The elements of a page: (tag, attributes) in order, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str, of_class: str = "") -> list[dict[str, str]]:
        found = [values for name, values in self.elements if name == tag]
        return [values for values in found if of_class in values.get("class", "").split() + [""]]

    def downloads(self) -> dict[str, bytes]:
        return {link["download"]: content(link["href"]) for link in self.all("a")}


def content(uri: str) -> bytes:
    return base64.b64decode(uri.partition("base64,")[2])


def pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image)


def rgb(uri: str) -> np.ndarray:
    with Image.open(io.BytesIO(content(uri))) as image:
        return np.array(image.convert("RGB"))
