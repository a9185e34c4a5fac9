"""The pictures of one image in the panoptic report: prediction, ground truth, errors, priors."""

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
from semask.evaluation.matching import match_segments
from semask.evaluation.panoptic_truth import PanopticTruth, Segment, found_segments
from semask.inference.model_outputs import (
    Mapper,
    class_map,
    predict_instances,
    prior_classes_of,
    prior_strides_of,
    stuff_classes_of,
)
from semask.ops.lazy_scores import LazyScores
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
from semask.utils.palette import class_colors
from semask.visualize.instances import DrawnSegment, draw_segments


def show_segments(
    model: nn.Module,
    record: Mapping[str, Any],
    scores: Mapping[str, Any],
    mapper: Mapper,
    *,
    dataset_name: str,
) -> ShownImage:
    """Predict one image again and draw it.

    Args:
        model: in evaluation mode, not wrapped.
        record: its dataset dict.
        scores: of the evaluation.
        mapper: turns a dataset dict into the model's input.
        dataset_name: the registered dataset.

    Raises:
        DataError: a file cannot be read.
    """
    image = reader_of(mapper).read_picture(record["file_name"])
    metadata = MetadataCatalog.get(dataset_name)
    truth = PanopticTruth(dataset_name)
    truth_ids, truth_segments, _ = truth.of_image(record["image_id"])
    inputs = mapper(copy.deepcopy(dict(record)))
    output = predict_instances(model, inputs, priors=True)
    found_ids, descriptions = output["panoptic_seg"]
    found_ids, found = found_ids.cpu().numpy(), found_segments(descriptions, metadata)
    size = fitting(image.shape[1], image.shape[0])
    colors = _stuff_colors(truth)

    def drawn(ids: np.ndarray, segments: Mapping[int, Segment]) -> np.ndarray:
        shown = {
            number: DrawnSegment(
                truth.categories[segment.category]["name"], colors.get(segment.category)
            )
            for number, segment in segments.items()
            if not segment.crowd
        }
        return draw_segments(image, ids, shown)

    errors = pale(image)
    matching = match_segments(truth_ids, truth_segments, found_ids, found)
    for number in matching.false:
        mark(errors, found_ids == number, NOT_THERE)
    for number in matching.missed:
        mark(errors, truth_ids == number, WRONG)
    pictures = (
        photograph("Image", "The photograph", image, size),
        photograph(
            *("Ground truth", f"{scores['segments']} segments"),
            *(drawn(truth_ids, truth_segments), size),
        ),
        photograph("Prediction", f"{len(found)} segments", drawn(found_ids, found), size),
        photograph(
            "Errors",
            f"{scores['missed']} missed segments in orange, {scores['false']} false ones in blue",
            errors.astype(np.uint8),
            size,
        ),
    )
    priors = output.get("priors", {})
    number = next(iter(priors.values())).shape[0] if priors else 0
    names, prior_colors = prior_classes_of(dataset_name, number)
    semantic = _semantic(truth_ids, truth_segments, metadata, number)
    return ShownImage(
        name=os.path.basename(record["file_name"]),
        scores=dict(scores),
        size=size,
        pictures=pictures,
        priors=prior_pictures(output, prior_strides_of(model), semantic, names, prior_colors),
        legend=_legend(
            *(
                truth,
                colors,
                {each.category for each in (*truth_segments.values(), *found.values())},
            ),
            *(names, prior_colors, output.get("prior")),
        ),
        queries=query_pictures(
            model, inputs, image, functools.partial(stuff_classes_of, dataset_name)
        ),
    )


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
