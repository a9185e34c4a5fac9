"""A dataset of ten small images and a model whose accuracy on them decreases."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from torch import nn

from semask.data.reading import read_label
from semask.modeling.backbone.contract import SemSegBackbone

IGNORE = 255
NAMES = ["sky & <clouds>", "wall", "road", "never seen"]
NAME = "oracle_test"
HEIGHT, WIDTH = 24, 32


def label_of(index: int) -> np.ndarray:
    label = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    label[:, 10 + index :] = 1
    label[16:] = 2
    label[:2] = IGNORE
    return label


class Oracle(nn.Module):
    """Predicts the label with errors; later images have more errors."""

    def __init__(self, classes: int = len(NAMES)) -> None:
        super().__init__()
        self.classes = classes
        self.calls = 0

    def scores(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        label = read_label(inputs["sem_seg_file_name"]).astype(np.int64)
        index = int(Path(inputs["file_name"]).stem)
        label[label == IGNORE] = 0
        label[:, : 2 * index] = (label[:, : 2 * index] + 1) % 3
        one_hot = nn.functional.one_hot(torch.from_numpy(label), self.classes)
        return 3 * one_hot.permute(2, 0, 1).float()

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        self.calls += len(batched_inputs)
        assert not torch.is_grad_enabled()
        return [{"sem_seg": self.scores(inputs)} for inputs in batched_inputs]


class Strides(SemSegBackbone):
    """The backbone that the oracle's priors would come from."""

    @property
    def prior_strides(self) -> dict[str, int]:
        return {"prior2": 4, "prior3": 8}

    def forward(self, image: torch.Tensor, return_priors: bool | None = None) -> Any:
        raise AssertionError("the oracle knows the label")


class OracleWithPriors(Oracle):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = Strides()

    def inference(
        self, batched_inputs: list[dict[str, Any]], return_priors: bool = False
    ) -> list[dict[str, Any]]:
        outputs = self(batched_inputs)
        for output in outputs:
            scores = output["sem_seg"]
            output["prior"] = scores
            output["priors"] = {"prior2": scores[:, ::4, ::4], "prior3": scores[:, ::8, ::8]}
        return outputs


@contextlib.contextmanager
def dataset(tmp_path: Path) -> Iterator[list[dict[str, Any]]]:
    """Ten images in two folders, registered as ``NAME``; their dicts."""
    found = []
    for index in range(10):
        folder = tmp_path / "data" / ("first" if index < 5 else "second")
        folder.mkdir(parents=True, exist_ok=True)
        image = np.random.default_rng(index).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        record = {
            "file_name": str(folder / f"{index}.jpg"),
            "sem_seg_file_name": str(folder / f"{index}.png"),
        }
        Image.fromarray(image).save(record["file_name"])
        Image.fromarray(label_of(index)).save(record["sem_seg_file_name"])
        found.append(record)
    DatasetCatalog.register(NAME, lambda: found)
    MetadataCatalog.get(NAME).set(stuff_classes=NAMES, ignore_label=IGNORE)
    try:
        yield found
    finally:
        DatasetCatalog.remove(NAME)
        MetadataCatalog.remove(NAME)
