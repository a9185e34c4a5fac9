"""Predictions written to disk as label maps, one at a time."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog
from PIL import Image

from semask.errors import DataError
from semask.evaluation.metric import EvaluatedImage, Metric, MetricResult
from semask.utils.files import replacing, without_suffixes


class PredictionFiles(Metric):
    """Writes one PNG per image with the class of each pixel; keeps nothing in memory.

    The files have the images' relative paths, with the suffix ".png" instead of the image's, or
    after it if two names would collide. Up to 256 classes they are palette PNGs, shown in the
    classes' colours and read as class indices; beyond, they have 16 bits. The indices are those
    that the model was trained on, even if the dataset's own label maps use raw values.
    """

    def __init__(self, dataset_name: str, folder: str, colors: np.ndarray) -> None:
        """
        Args:
            dataset_name: a registered dataset; paths are relative to its images' common folder.
            folder: the output folder; existing files are replaced.
            colors: (K, 3) uint8, RGB of each class.
        """
        self._dataset_name = dataset_name
        self._folder = folder
        self._colors = colors
        self._root: str | None = None
        self._names: dict[Path, Path] = {}

    def reset(self) -> None:
        """See ``Metric``."""

    def process(self, image: EvaluatedImage) -> None:
        """Write one prediction."""
        classes = image.prediction.cpu().numpy()
        if len(self._colors) <= 256:
            picture = Image.fromarray(classes.astype(np.uint8))
            picture.putpalette(self._colors.astype(np.uint8).tobytes())
        else:
            picture = Image.fromarray(classes.astype(np.uint16))
        with replacing(os.path.join(self._folder, self.file_name(image.record))) as file:
            picture.save(file, format="PNG")

    def file_name(self, record: Mapping[str, Any]) -> str:
        """The path relative to the folder, for a dataset dict.

        Raises:
            DataError: the image is outside the common folder of the dataset's images.
        """
        if self._root is None:
            images = [
                os.path.abspath(known["file_name"])
                for known in DatasetCatalog.get(self._dataset_name)
            ]
            self._root = os.path.commonpath({os.path.dirname(image) for image in images})
            names = {Path(os.path.relpath(image, self._root)) for image in images}
            self._names = without_suffixes(names)
        name = Path(os.path.relpath(os.path.abspath(record["file_name"]), self._root))
        if name not in self._names:
            raise DataError(
                f"'{record['file_name']}' is not an image of dataset '{self._dataset_name}', whose "
                f"images are in '{self._root}', so its prediction cannot be saved."
            )
        return f"{self._names[name]}.png"

    def share(self) -> None:
        """Nothing: the results are on disk."""

    def evaluate(self, shares: Sequence[Any]) -> MetricResult:
        """Nothing to add."""
        return MetricResult()
