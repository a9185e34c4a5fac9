"""Panoptic quality computed by hotcoco, with counts for every image and class."""

import contextlib
import io
import itertools
import json
import logging
import math
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from hotcoco.panoptic import pq_compute
from PIL import Image

from semask.data.segments import Disagreement, panoptic_picture
from semask.errors import DataError
from semask.evaluation.matching import match_segments, segment_scores
from semask.evaluation.panoptic_truth import PanopticTruth, Segment, found_segments
from semask.utils.files import replacing
from semask.utils.text import value_table

logger = logging.getLogger(__name__)

PANOPTIC_FILE = "panoptic_evaluation.json"
# Detectron2's name of the predicted segments.
PREDICTIONS_FILE = "predictions.json"
# Groups of categories: hotcoco's names, and the suffixes of their results.
_GROUPS = {"All": "", "Things": "_th", "Stuff": "_st"}


class PanopticEvaluator(DatasetEvaluator):
    """PQ, SQ and RQ in percent, over all classes, things, stuff, and for each class.

    Detectron2's ``COCOPanopticEvaluator`` needs panopticapi, which is not on PyPI; hotcoco
    implements the same protocol. Arguments, results and the file ``PREDICTIONS_FILE`` are those of
    Detectron2's, plus "PQ-<class>", "SQ-<class>" and "RQ-<class>". The main process also writes
    ``PANOPTIC_FILE``, with these results and a score for each image.
    """

    def __init__(self, dataset_name: str, output_dir: str | None = None) -> None:
        """
        Args:
            dataset_name: a registered dataset with "panoptic_json" and "panoptic_root".
            output_dir: the output folder; None = write nothing.
        """
        self._dataset_name = dataset_name
        self._folder = output_dir
        self._truth = PanopticTruth(dataset_name)
        self.reset()

    def reset(self) -> None:
        """Discard all results."""
        self._predictions: list[dict[str, Any]] = []
        self._images: list[dict[str, Any]] = []
        self._disagreements: dict[Any, Disagreement] = {}

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Score the "panoptic_seg" of a batch and store it, compressed.

        Raises:
            DataError: the ground truth lacks an image, or a map is damaged or of another size.
        """
        metadata = MetadataCatalog.get(self._dataset_name)
        for entry, output in zip(inputs, outputs, strict=True):
            image_id = entry["image_id"]
            predicted, descriptions = output["panoptic_seg"]
            found_ids = predicted.cpu().numpy()
            name = self._truth.file_name(image_id)
            truth_ids, truth, disagreement = self._truth.of_image(image_id)
            if disagreement:
                self._disagreements[image_id] = disagreement
            if truth_ids.shape != found_ids.shape:
                raise DataError(
                    f"The panoptic map '{name}' is {truth_ids.shape[1]}x{truth_ids.shape[0]} "
                    f"pixels (width x height), the prediction {found_ids.shape[1]}x"
                    f"{found_ids.shape[0]}: image and map must have the same size."
                )
            found = found_segments(descriptions, metadata)
            matching = match_segments(truth_ids, truth, found_ids, found)
            self._images.append(
                {
                    "image_id": image_id,
                    "file_name": str(entry["file_name"]),
                    **segment_scores(matching),
                    "counts": _counts(matching, truth, found),
                    "areas": _areas(truth_ids),
                }
            )
            self._predictions.append(_prediction(image_id, name, found_ids, descriptions, found))

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """{"panoptic_seg": {"PQ": ..., ...}}; None except in the main process."""
        comm.synchronize()
        images = list(itertools.chain(*comm.gather(self._images)))
        predictions = list(itertools.chain(*comm.gather(self._predictions)))
        disagreements = {k: v for each in comm.gather(self._disagreements) for k, v in each.items()}
        if not comm.is_main_process():
            return None
        areas = {image["image_id"]: image["areas"] for image in images}
        qualities = self._qualities(predictions, areas, disagreements)
        values = {
            f"{key}{suffix}": 100 * _defined(qualities[group][key.lower()])
            for group, suffix in _GROUPS.items()
            for key in ("PQ", "SQ", "RQ")
        }
        classes = self._classes(qualities["per_class"], images)
        logger.info(
            "Panoptic evaluation of '%s':\n%s\n\n%s",
            self._dataset_name,
            _group_table(values),
            _table(classes),
        )
        for entry in classes:
            values |= {f"{key}-{entry['name']}": entry[key] for key in ("PQ", "SQ", "RQ")}
        if self._folder is not None:
            document = {
                "dataset": self._dataset_name,
                "results": {key: _plain(value) for key, value in values.items()},
                "classes": [{k: _plain(v) for k, v in entry.items()} for entry in classes],
                "images": [
                    {key: value for key, value in image.items() if key not in ("counts", "areas")}
                    for image in images
                ],
            }
            with replacing(os.path.join(self._folder, PANOPTIC_FILE)) as file:
                file.write(json.dumps(document, allow_nan=False).encode())
        return {"panoptic_seg": values}

    def _qualities(
        self,
        predictions: list[dict[str, Any]],
        areas: Mapping[Any, Mapping[int, int]],
        disagreements: Mapping[Any, Disagreement],
    ) -> dict[str, Any]:
        """hotcoco's results; writes the predictions if there is an output folder.

        Args:
            predictions: of all images; see :func:`_prediction`.
            areas: of the segments of each image, counted in its map.
            disagreements: between maps and annotations.
        """
        truth, truth_folder = self._truth.content, self._truth.folder
        with tempfile.TemporaryDirectory() as maps, tempfile.TemporaryDirectory() as corrected:
            # Numbered, because images in different folders may share a name, and a path without its
            # "/" may be too long for the name of a file.
            numbered = [
                {**prediction, "file_name": f"{number}.png"}
                for number, prediction in enumerate(predictions)
            ]
            for prediction, entry in zip(predictions, numbered, strict=True):
                del entry["png"]
                with open(os.path.join(maps, entry["file_name"]), "wb") as file:
                    file.write(prediction.pop("png"))
            found = {**truth, "annotations": predictions}
            if self._folder is not None:
                with replacing(os.path.join(self._folder, PREDICTIONS_FILE)) as file:
                    file.write(json.dumps(found).encode())
            if disagreements:
                self._warn(disagreements)
                truth, truth_folder = self._truth.without(disagreements, corrected), corrected
            found = {**found, "annotations": numbered}
            return _pq_compute(_with_areas(truth, areas), found, truth_folder, maps)

    def _warn(self, disagreements: Mapping[Any, Disagreement]) -> None:
        for image_id in list(disagreements)[:3]:
            words = disagreements[image_id].sentences(self._truth.file_name(image_id))
            logger.warning(
                "Dataset '%s': %s; PQ ignores these segments. Such maps: %d of %d",
                self._dataset_name,
                "; ".join(sentence for _, sentence in words),
                len(disagreements),
                len(self._truth.content["annotations"]),
            )

    def _classes(
        self, qualities: Mapping[int, Mapping[str, float]], images: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """For each category its qualities in percent, NaN without segments, and its counts."""
        entries = []
        for category, description in self._truth.categories.items():
            totals = np.zeros(3, np.int64)
            for image in images:
                totals += image["counts"].get(category, (0, 0, 0))
            quality = qualities.get(category, {})
            shares = {
                key: 100 * quality[key.lower()] if totals.any() and quality else float("nan")
                for key in ("PQ", "SQ", "RQ")
            }
            right, missed, false = totals.tolist()
            entries.append(
                {
                    "name": description["name"],
                    "isthing": bool(description.get("isthing", 1)),
                    **shares,
                    "right": right,
                    "missed": missed,
                    "false": false,
                }
            )
        return entries


def _counts(
    matching: Any, truth: Mapping[int, Segment], found: Mapping[int, Segment]
) -> dict[int, tuple[int, int, int]]:
    """Correct, missed and false segments of each category that has any."""
    counts: dict[int, list[int]] = {}
    for place, categories in enumerate(
        (
            [truth[g].category for g, _ in matching.right],
            [truth[g].category for g in matching.missed],
            [found[p].category for p in matching.false],
        )
    ):
        for category in categories:
            counts.setdefault(category, [0, 0, 0])[place] += 1
    return {category: (row[0], row[1], row[2]) for category, row in counts.items()}


def _group_table(values: Mapping[str, float]) -> str:
    keys = ("PQ", "SQ", "RQ")
    rows = [
        [group.lower(), *(values[f"{key}{suffix}"] for key in keys)]
        for group, suffix in _GROUPS.items()
    ]
    return value_table(rows, ["classes", *keys], "segment of these classes")


def _table(classes: list[dict[str, Any]]) -> str:
    columns = ("name", "PQ", "SQ", "RQ", "right", "missed", "false")
    rows = [[entry[key] for key in columns] for entry in classes]
    absent = "segment of this class in ground truth and prediction"
    return value_table(rows, ["class", *columns[1:]], absent)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _areas(ids: np.ndarray) -> dict[int, int]:
    found, numbers = np.unique(ids, return_counts=True)
    return dict(zip(found.tolist(), numbers.tolist(), strict=True))


def _defined(value: float) -> float:
    """hotcoco returns -1 if no category has segments."""
    return math.nan if value < 0 else value


def _prediction(
    image_id: Any,
    name: str,
    ids: np.ndarray,
    descriptions: list[dict[str, Any]],
    segments: Mapping[int, Segment],
) -> dict[str, Any]:
    """The prediction of an image in COCO's panoptic format, with its map as "png".

    Args:
        image_id: of the image.
        name: path of the map of the ground truth, relative to its folder.
        ids: (H, W) segment of each pixel.
        descriptions: the model's "segments_info".
        segments: the same with the dataset's own category ids.
    """
    picture = io.BytesIO()
    Image.fromarray(panoptic_picture(ids)).save(picture, format="PNG")
    return {
        "image_id": image_id,
        "file_name": f"{os.path.splitext(name.replace('/', '_'))[0]}.png",
        "png": picture.getvalue(),
        "segments_info": [
            {
                **{key: value for key, value in entry.items() if key != "isthing"},
                "category_id": segments[entry["id"]].category,
            }
            for entry in descriptions
        ],
    }


def _with_areas(truth: Mapping[str, Any], areas: Mapping[Any, Mapping[int, int]]) -> dict[str, Any]:
    """The ground truth with the areas of its maps, which hotcoco reads from the JSON file."""
    annotations = []
    for entry in truth["annotations"]:
        known = areas.get(entry["image_id"], {})
        segments = [
            {**segment, "area": known.get(segment["id"], segment.get("area", 0))}
            for segment in entry["segments_info"]
        ]
        annotations.append({**entry, "segments_info": segments})
    return {**truth, "annotations": annotations}


def _pq_compute(
    truth: Mapping[str, Any], found: Mapping[str, Any], truth_folder: str, found_folder: str
) -> dict[str, Any]:
    """Panoptic quality by hotcoco, which needs integer image ids; Cityscapes has names.

    Args:
        truth, found: contents of JSON files in COCO's panoptic format.
        truth_folder, found_folder: of their maps.
    """
    numbers = {entry["id"]: number for number, entry in enumerate(truth["images"], start=1)}
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, name) for name in ("truth.json", "found.json")]
        for path, content in zip(paths, (truth, found), strict=True):
            numbered = {
                **content,
                "images": [{**e, "id": numbers[e["id"]]} for e in content["images"]],
                "annotations": [
                    {**e, "image_id": numbers[e["image_id"]]} for e in content["annotations"]
                ],
            }
            with replacing(path) as file:
                file.write(json.dumps(numbered).encode())
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a table
            return dict(pq_compute(paths[0], paths[1], truth_folder, found_folder))
