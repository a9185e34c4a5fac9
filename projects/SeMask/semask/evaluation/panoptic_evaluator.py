"""Panoptic quality computed by hotcoco, with counts for every image and class."""

import contextlib
import itertools
import json
import logging
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOPanopticEvaluator
from detectron2.utils import comm
from hotcoco.panoptic import pq_compute

from semask.data.segments import Disagreement, panoptic_picture
from semask.errors import DataError
from semask.evaluation.matching import match_segments, segment_scores
from semask.evaluation.panoptic_truth import PanopticTruth, Segment, found_segments
from semask.utils.files import read_json, replacing
from semask.utils.text import value_table

logger = logging.getLogger(__name__)

PANOPTIC_FILE = "panoptic_evaluation.json"


class PanopticEvaluator(COCOPanopticEvaluator):
    """PQ, SQ and RQ in percent, over all classes, things, stuff, and for each class.

    Detectron2's evaluator needs panopticapi, which is not on PyPI; hotcoco implements the same
    protocol. Arguments and results are those of Detectron2's, plus "PQ-<class>", "SQ-<class>" and
    "RQ-<class>". The main process also writes ``PANOPTIC_FILE``, with these results and a score for
    each image.
    """

    def __init__(self, dataset_name: str, output_dir: str | None = None) -> None:
        """
        Args:
            dataset_name: a registered dataset with "panoptic_json" and "panoptic_root".
            output_dir: the output folder; None = write nothing.
        """
        super().__init__(dataset_name, output_dir)
        self._dataset_name = dataset_name
        self._folder = output_dir
        self._truth = PanopticTruth(dataset_name)
        self.reset()

    def reset(self) -> None:
        """Discard all results."""
        super().reset()
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
            found_ids, descriptions = output["panoptic_seg"]
            name = self._truth.file_name(image_id)
            truth_ids, truth, disagreement = self._truth.of_image(image_id)
            if disagreement:
                self._disagreements[image_id] = disagreement
            if truth_ids.shape != tuple(found_ids.shape):
                raise DataError(
                    f"The panoptic map '{name}' is {truth_ids.shape[1]}x{truth_ids.shape[0]} "
                    f"pixels (width x height), the prediction {found_ids.shape[1]}x"
                    f"{found_ids.shape[0]}: image and map must have the same size."
                )
            found = found_segments(descriptions, metadata)
            matching = match_segments(truth_ids, truth, found_ids.cpu().numpy(), found)
            self._images.append(
                {
                    "image_id": image_id,
                    "file_name": str(entry["file_name"]),
                    **segment_scores(matching),
                    "counts": _counts(matching, truth, found),
                    "areas": _areas(truth_ids),
                }
            )
            # Images in different folders may share a name, but all maps go into one folder.
            unique = name.replace("/", "_")
            with _hotcoco_as_panopticapi({}):
                super().process(
                    [{**entry, "file_name": unique}],
                    [{"panoptic_seg": (found_ids, [dict(each) for each in descriptions])}],
                )

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """{"panoptic_seg": {"PQ": ..., ...}}; None except in the main process."""
        images = list(itertools.chain(*comm.gather(self._images)))
        areas = {image["image_id"]: image["areas"] for image in images}
        disagreements = {k: v for each in comm.gather(self._disagreements) for k, v in each.items()}
        computed: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as folder:
            truth = self._corrected(disagreements, folder) if disagreements else None
            with _hotcoco_as_panopticapi(computed, truth, areas):
                results = super().evaluate()
        if results is None:
            return None
        classes = self._classes(computed["per_class"], images)
        logger.info("Panoptic evaluation of '%s':\n%s", self._dataset_name, _table(classes))
        values = dict(results["panoptic_seg"])
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

    def _corrected(self, disagreements: Mapping[Any, Disagreement], folder: str) -> tuple[str, str]:
        """JSON file and folder of the ground truth, without segments that only PNG or JSON has."""
        for image_id in list(disagreements)[:3]:
            words = disagreements[image_id].sentences(self._truth.file_name(image_id))
            logger.warning(
                "Dataset '%s': %s; it counts neither way. Such maps: %d of %d",
                self._dataset_name,
                "; ".join(sentence for _, sentence in words),
                len(disagreements),
                len(self._truth.content["annotations"]),
            )
        return self._truth.write_without(disagreements, folder), folder

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
                    **{"right": right, "missed": missed, "false": false},
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


def _pq_compute(
    areas: Mapping[Any, Mapping[int, int]], gt_json: str, pred_json: str, *folders: str
) -> dict[str, Any]:
    """panopticapi's ``pq_compute``, computed by hotcoco.

    hotcoco reads the true areas from the JSON file, and needs integer image ids, which Cityscapes
    does not have.

    Args:
        areas: of the segments of each image, counted in its map.
        gt_json, pred_json: the files.
        folders: of the maps of both.
    """
    truth, found = read_json(gt_json), read_json(pred_json)
    numbers = {entry["id"]: number for number, entry in enumerate(truth["images"], start=1)}
    for entry in truth["annotations"]:
        known = areas.get(entry["image_id"], {})
        for segment in entry["segments_info"]:
            segment["area"] = known.get(segment["id"], segment.get("area", 0))
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, name) for name in ("truth.json", "found.json")]
        for path, content in zip(paths, (truth, found), strict=True):
            for entries, key in ((content["images"], "id"), (content["annotations"], "image_id")):
                for entry in entries:
                    entry[key] = numbers[entry[key]]
            with replacing(path) as file:
                file.write(json.dumps(content).encode())
        return dict(pq_compute(*paths, *folders))


@contextlib.contextmanager
def _hotcoco_as_panopticapi(
    computed: dict[str, Any],
    truth: tuple[str, str] | None = None,
    areas: Mapping[Any, Mapping[int, int]] | None = None,
) -> Iterator[None]:
    """Provide hotcoco's functions to Detectron2's imports from panopticapi.

    Args:
        computed: filled with the results of ``pq_compute``.
        truth: JSON file and folder of the ground truth, which replace the dataset's.
        areas: see :func:`_pq_compute`.
    """

    def compute(gt_json: str, pred_json: str, gt_folder: str, pred_folder: str) -> dict[str, Any]:
        gt_json, gt_folder = truth or (gt_json, gt_folder)
        computed.update(_pq_compute(areas or {}, gt_json, pred_json, gt_folder, pred_folder))
        for group in ("All", "Things", "Stuff"):
            # hotcoco returns -1 if no category has segments.
            values = computed[group]
            computed[group] = {k: math.nan if v < 0 else v for k, v in values.items()}
        return computed

    utils, evaluation = ModuleType("panopticapi.utils"), ModuleType("panopticapi.evaluation")
    vars(utils)["id2rgb"] = panoptic_picture
    vars(evaluation)["pq_compute"] = compute
    modules = {
        "panopticapi": ModuleType("panopticapi"),
        "panopticapi.utils": utils,
        "panopticapi.evaluation": evaluation,
    }
    installed = {name: sys.modules[name] for name in modules if name in sys.modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
        sys.modules.update(installed)
