"""The report of a panoptic evaluation: ``report.html``, one self-contained file.

It is made from the file that ``PanopticEvaluator`` writes, and from AP and mIoU if they were
evaluated. Only the few shown images are predicted again.
"""

import copy
import functools
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from torch import nn

from semask.data.bands import reader_of
from semask.evaluation import sem_seg_evaluator
from semask.evaluation.instance_evaluators import RESULT_FILE
from semask.evaluation.matching import match_segments
from semask.evaluation.panoptic_evaluator import PANOPTIC_FILE
from semask.evaluation.panoptic_truth import PanopticTruth, Segment, found_segments
from semask.inference.class_names import prior_classes_of, stuff_classes_of
from semask.inference.model_outputs import (
    Mapper,
    class_map,
    evaluating,
    predict_instances,
    prior_strides_of,
)
from semask.ops.lazy_scores import LazyScores
from semask.report.charts import histogram_values
from semask.report.page import (
    defined,
    modification_date,
    read_evaluation,
    worst_and_best_records,
    write_page,
)
from semask.report.pictures import (
    NOT_THERE,
    WRONG,
    ShownImage,
    fitting,
    mark,
    pale,
    photograph,
    prior_pictures,
    query_pictures,
)
from semask.utils.files import read_json
from semask.utils.palette import class_colors
from semask.visualize.instances import DrawnSegment, draw_segments

# Results, their names on the page, and explanations.
_TILES = (
    ("PQ", "PQ", "panoptic quality"),
    ("SQ", "SQ", "mean IoU of the correct segments"),
    ("RQ", "RQ", "F1 of the segments"),
    ("PQ_th", "PQ things", "mean over things"),
    ("PQ_st", "PQ stuff", "mean over stuff"),
)
# The same for optional evaluations: file and key of the result.
_BESIDE = (
    (RESULT_FILE, ("segm", "AP"), "Mask AP", "things, mean over IoU 0.50 to 0.95"),
    (RESULT_FILE, ("bbox", "AP"), "Box AP", "things, mean over IoU 0.50 to 0.95"),
    (sem_seg_evaluator.RESULT_FILE, ("mIoU",), "mIoU", "mean IoU of the classes"),
)


def write_panoptic_report(
    model: nn.Module,
    dataset_name: str,
    mapper: Mapper,
    folder: str,
    *,
    num_images: int = 4,
    facts: Sequence[tuple[str, str]] = (),
) -> str:
    """Write the report of an evaluation next to its result file, atomically.

    Args, Returns, Raises: as for :func:`semask.report.semantic.write_report`.
    """
    source = os.path.join(folder, PANOPTIC_FILE)
    document = read_evaluation(source, dataset_name, ("images", "classes"))
    images: list[dict[str, Any]] = document["images"]
    groups = worst_and_best_records(document, "PQ", num_images, dataset_name, source)
    truth = PanopticTruth(dataset_name)
    with evaluating(model) as model:
        worst, best = (
            [
                show_segments(model, record, image, mapper, dataset_name=dataset_name, truth=truth)
                for record, image in group
            ]
            for group in groups
        )
    results = {key: defined(value) for key, value in document["results"].items()}
    beside = {file: _results(folder, file, dataset_name) for file in {row[0] for row in _BESIDE}}
    classes = _class_rows(document["classes"], beside[RESULT_FILE])
    return write_page(
        folder,
        "panoptic.html.j2",
        title=dataset_name,
        facts=[
            ("Evaluated", modification_date(source)),
            ("Images", f"{len(images):,}"),
            ("Classes", f"{len(classes)}, {sum(row['isthing'] for row in classes)} of them things"),
            ("Segments", f"{sum(image['segments'] for image in images):,}"),
            *facts,
        ],
        tiles=[
            *((name, results[key], words) for key, name, words in _TILES),
            *(
                (name, value, words)
                for file, place, name, words in _BESIDE
                if (value := _result(beside[file], place)) is not None
            ),
        ],
        results=results,
        groups=[
            (name, key, _best_first(classes, isthing=isthing))
            for name, key, isthing in (("Things", "PQ_th", True), ("Stuff", "PQ_st", False))
        ],
        **histogram_values(images, "PQ"),
        worst=worst,
        best=best,
    )


def _class_rows(
    classes: Sequence[Mapping[str, Any]], instances: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The classes of the result file with NaN for null, and with their AP of masks, if known."""
    return [
        {
            **row,
            **{key: defined(row[key]) for key in ("PQ", "SQ", "RQ")},
            "AP": _result(instances, ("segm", f"AP-{row['name']}")),
        }
        for row in classes
    ]


def _best_first(classes: Sequence[Mapping[str, Any]], *, isthing: bool) -> list[Mapping[str, Any]]:
    """Things or stuff, absent ones last; the sort is stable."""
    chosen = [row for row in classes if row["isthing"] == isthing]
    return sorted(chosen, key=lambda row: -np.nan_to_num(row["PQ"], nan=-1))


def _results(folder: str, file: str, dataset_name: str) -> Mapping[str, Any]:
    """The results of another evaluation of the same dataset; empty if there is none."""
    path = os.path.join(folder, file)
    document = read_json(path) if os.path.isfile(path) else {}
    results: Mapping[str, Any] = (
        document["results"] if document.get("dataset") == dataset_name else {}
    )
    return results


def _result(results: Mapping[str, Any], place: Sequence[str]) -> float | None:
    """The result with these keys; None if there is none."""
    value: Any = results
    for key in place:
        if key not in value:
            return None
        value = value[key]
    return defined(value)


def show_segments(
    model: nn.Module,
    record: Mapping[str, Any],
    scores: Mapping[str, Any],
    mapper: Mapper,
    *,
    dataset_name: str,
    truth: PanopticTruth,
) -> ShownImage:
    """Predict one image again and draw it.

    Args:
        model: in evaluation mode, not wrapped.
        record: its dataset dict.
        scores: of the evaluation.
        mapper: turns a dataset dict into the model's input.
        dataset_name: the registered dataset.
        truth: of the dataset.

    Raises:
        DataError: a file cannot be read.
    """
    image = reader_of(mapper).read_picture(record["file_name"])
    metadata = MetadataCatalog.get(dataset_name)
    truth_ids, truth_segments, _ = truth.of_image(record["image_id"])
    inputs = mapper(copy.deepcopy(dict(record)))
    output = predict_instances(model, inputs, priors=True)
    found_ids, descriptions = output["panoptic_seg"]
    found_ids, found = found_ids.cpu().numpy(), found_segments(descriptions, metadata)
    colors = _stuff_colors(truth)
    drawn = _drawn(image, truth_ids, truth_segments, truth, colors)
    size = fitting(image.shape[1], image.shape[0])
    pictures = (
        photograph("Image", "The photograph", image, size),
        photograph("Ground truth", f"{scores['segments']} segments", drawn, size),
        photograph(
            "Prediction",
            f"{len(found)} segments",
            _drawn(image, found_ids, found, truth, colors),
            size,
        ),
        photograph(
            "Errors",
            f"{scores['missed']} missed segments in orange, {scores['false']} false ones in blue",
            _error_picture(image, truth_ids, truth_segments, found_ids, found),
            size,
        ),
    )
    priors = output.get("priors", {})
    number = next(iter(priors.values())).shape[0] if priors else 0
    names, prior_colors = prior_classes_of(dataset_name, number)
    semantic = _semantic(truth_ids, truth_segments, metadata, number)
    shown = {segment.category for segment in (*truth_segments.values(), *found.values())}
    return ShownImage(
        name=os.path.basename(record["file_name"]),
        scores=dict(scores),
        size=size,
        pictures=pictures,
        priors=prior_pictures(output, prior_strides_of(model), semantic, names, prior_colors),
        legend=_legend(truth, colors, shown, names, prior_colors, output.get("prior")),
        queries=query_pictures(
            model, inputs, image, functools.partial(stuff_classes_of, dataset_name)
        ),
    )


def _drawn(
    image: np.ndarray,
    ids: np.ndarray,
    segments: Mapping[int, Segment],
    truth: PanopticTruth,
    colors: Mapping[int, tuple[int, ...]],
) -> np.ndarray:
    """The image with its segments: stuff in its colours, each thing in one of its own."""
    shown = {
        number: DrawnSegment(
            truth.categories[segment.category]["name"], colors.get(segment.category)
        )
        for number, segment in segments.items()
        if not segment.crowd
    }
    return draw_segments(image, ids, shown)


def _error_picture(
    image: np.ndarray,
    truth_ids: np.ndarray,
    truth: Mapping[int, Segment],
    found_ids: np.ndarray,
    found: Mapping[int, Segment],
) -> np.ndarray:
    """The pale photograph with missed and false segments."""
    picture = pale(image)
    matching = match_segments(truth_ids, truth, found_ids, found)
    for number in matching.false:
        mark(picture, found_ids == number, NOT_THERE)
    for number in matching.missed:
        mark(picture, truth_ids == number, WRONG)
    return picture.astype(np.uint8)


def _stuff_colors(truth: PanopticTruth) -> dict[int, tuple[int, ...]]:
    """(R, G, B) of each stuff category: the file's own, else from a fixed palette."""
    series = class_colors(len(truth.categories)).tolist()
    return {
        given: tuple(entry.get("color") or color)
        for (given, entry), color in zip(truth.categories.items(), series, strict=True)
        if not entry.get("isthing", 1)
    }


def _legend(
    truth: PanopticTruth,
    colors: Mapping[int, tuple[int, ...]],
    shown: Collection[int],
    names: Sequence[str],
    prior_colors: np.ndarray,
    prior: LazyScores | torch.Tensor | None,
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Names and colours: stuff as drawn, things as in priors and queries.

    Args:
        truth: the dataset.
        colors: of its stuff.
        shown: categories in the ground truth or the prediction.
        names, prior_colors: of the classes of the priors.
        prior: (K, H, W) scores; the legend has each class that covers a hundredth of the image.
    """
    of_prior = dict(zip(names, map(tuple, prior_colors.tolist()), strict=True))
    drawn = {truth.categories[category]["name"] for category in shown}
    listed = set(drawn)
    if prior is not None:
        counts = np.bincount(class_map(prior).reshape(-1), minlength=len(names))
        listed |= {n for n, count in zip(names, counts, strict=True) if 100 * count >= counts.sum()}
    entries = {
        entry["name"]: colors.get(category, of_prior.get(entry["name"]))
        for category, entry in truth.categories.items()
    }
    chosen = [(n, color) for n, color in entries.items() if n in listed and color is not None]
    return tuple(sorted(chosen, key=lambda entry: entry[0] not in drawn))


def _semantic(
    ids: np.ndarray, segments: Mapping[int, Segment], metadata: Any, num_classes: int
) -> np.ndarray | None:
    """(H, W) class of each pixel, -1 = none, by the class indices of priors with ``num_classes``.

    None if things and stuff are indexed separately, or the priors have other classes.
    """
    contiguous = {
        **metadata.get("stuff_dataset_id_to_contiguous_id", {}),
        **metadata.get("thing_dataset_id_to_contiguous_id", {}),
    }
    if not len(set(contiguous.values())) == len(contiguous) == num_classes:
        return None
    classes = np.full(ids.shape, -1, np.int64)
    for number, segment in segments.items():
        if not segment.crowd:
            classes[ids == number] = contiguous[segment.category]
    return classes
