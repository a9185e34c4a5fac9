"""The pictures of one image in the evaluation report: prediction, errors, priors, queries."""

import base64
import copy
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from semask.data.bands import reader_of
from semask.data.reading import read_label
from semask.errors import DataError
from semask.inference.model_outputs import (
    Mapper,
    class_map,
    predict,
    predict_queries,
    prior_strides_of,
)
from semask.visualize.drawing import hatching, painted, resized

# Larger images are resized to fit into this (width, height).
BOX = (560, 480)
# Maximum number of shown queries of an image, their minimum score, and their maximum picture size.
QUERIES = 12
LOWEST_SCORE = 0.1
QUERY_BOX = (300, 260)
# Vermilion, distinct from grey for every kind of colour vision.
WRONG = (213, 94, 0)
# Sky blue, distinct from vermilion and grey for every kind of colour vision.
NOT_THERE = (86, 180, 233)


@dataclass(frozen=True)
class Picture:
    """An image inside the page.

    Attributes:
        title: the caption above it.
        alt: the alternative text.
        uri: its bytes, as "data:image/...".
        is_map: enlarge it without smoothing.
    """

    title: str
    alt: str
    uri: str
    is_map: bool = True


@dataclass(frozen=True)
class ShownImage:
    """One image of the report.

    Attributes:
        name: of its file.
        scores: of the evaluation, such as "mIoU" in percent.
        size: (width, height), the aspect ratio of all its pictures.
        pictures: image, ground truth, prediction, errors.
        priors: the semantic-prior map of each stage and their sum; empty without priors.
        queries: the masks of the highest-scoring queries; empty for models without queries.
        legend: name and (R, G, B) of the visible classes, most frequent first, or of all classes of
            the priors.
    """

    name: str
    scores: Mapping[str, Any]
    size: tuple[int, int]
    pictures: tuple[Picture, ...]
    priors: tuple[Picture, ...]
    legend: tuple[tuple[str, tuple[int, ...]], ...]
    queries: tuple[Picture, ...] = ()


def show_image(
    model: nn.Module,
    record: Mapping[str, Any],
    scores: Mapping[str, float],
    mapper: Mapper,
    *,
    class_names: Sequence[str],
    colors: np.ndarray,
    ignore_label: int,
) -> ShownImage:
    """Predict one image again and draw it.

    Args:
        model: in evaluation mode, see ``predict``.
        record: its dataset dict, with a label map.
        scores: "mIoU" and "pACC" of the evaluation, in percent.
        mapper: turns a dataset dict into the model's input.
        class_names: of the K classes.
        colors: (K, 3) uint8, RGB.
        ignore_label: label value of ignored pixels.

    Raises:
        DataError: a file cannot be read, or image, label map and prediction differ in size.
    """
    image = reader_of(mapper).read_picture(record["file_name"])
    label = read_label(record["sem_seg_file_name"], label_map=record.get("label_map"))
    inputs = mapper(copy.deepcopy(dict(record)))
    output = predict(model, inputs)
    prediction = class_map(output["sem_seg"])
    if not image.shape[:2] == label.shape == prediction.shape:
        raise DataError(
            f"Image '{record['file_name']}', its label map and the prediction differ in size: "
            f"{image.shape[:2]}, {label.shape} and {prediction.shape} (height, width)."
        )
    truth = np.where(label == ignore_label, -1, label.astype(np.int64))
    size = fitting(image.shape[1], image.shape[0])
    return ShownImage(
        name=os.path.basename(record["file_name"]),
        scores=dict(scores),
        size=size,
        pictures=(
            photograph("Image", "The photograph", image, size),
            class_picture("Ground truth", truth, class_names, colors),
            class_picture("Prediction", prediction, class_names, colors),
            _error_picture(image, truth, prediction, size),
        ),
        priors=prior_pictures(output, prior_strides_of(model), truth, class_names, colors),
        legend=_legend(truth, prediction, class_names, colors),
        queries=query_pictures(model, inputs, image, lambda _: (class_names, colors)),
    )


def _legend(
    truth: np.ndarray, prediction: np.ndarray, names: Sequence[str], colors: np.ndarray
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Names and colours of the classes in both maps, most frequent first."""
    pixels = np.bincount(
        np.concatenate([truth[truth >= 0], prediction.ravel()]), minlength=len(names)
    )
    seen = [int(index) for index in np.argsort(-pixels, kind="stable") if pixels[index]]
    return tuple((names[index], tuple(colors[index].tolist())) for index in seen)


def photograph(title: str, alt: str, pixels: np.ndarray, size: tuple[int, int]) -> Picture:
    """(H, W, 3) RGB pixels as a picture of ``size`` (width, height)."""
    return Picture(title, alt, data_uri(resized(pixels, size), "JPEG"), is_map=False)


def class_picture(
    title: str, classes: np.ndarray, names: Sequence[str], colors: np.ndarray, note: str = ""
) -> Picture:
    """A class map, -1 = none, in the colours of the classes.

    Args:
        title: of the map.
        classes: (H, W).
        names, colors: of the K classes; colours are (K, 3) uint8, RGB.
        note: appended to the title.
    """
    shown = painted(classes, colors, fitting(classes.shape[1], classes.shape[0]))
    alt = f"{title}: {_summary(classes, names)}"
    return Picture(f"{title}{note}", alt, data_uri(shown, "PNG"))


def prior_pictures(
    output: Mapping[str, Any],
    strides: Mapping[str, int],
    truth: np.ndarray | None,
    names: Sequence[str],
    colors: np.ndarray,
) -> tuple[Picture, ...]:
    """The prior map of each stage and their sum, with their accuracy.

    Args:
        output: of the model; without "priors" the result is empty.
        strides: of the stages' maps.
        truth: (H, W) class of each pixel, -1 = ignored; None = unknown.
        names, colors: of the priors' classes.
    """
    maps = {prior_title(name, strides): each for name, each in output.get("priors", {}).items()}
    if maps and "prior" in output:
        maps["Priors summed"] = output["prior"]
    pictures = []
    for title, scores in maps.items():
        classes = class_map(scores)
        note = "" if truth is None else agreement(classes, truth)
        pictures.append(class_picture(title, classes, names, colors, note))
    return tuple(pictures)


def query_pictures(
    model: nn.Module,
    inputs: dict[str, Any],
    image: np.ndarray,
    classes_of: Callable[[int], tuple[Sequence[str], np.ndarray]],
) -> tuple[Picture, ...]:
    """The masks of the highest-scoring queries, each in the colour of its class.

    Args:
        model: in evaluation mode; see ``semask.inference.model_outputs.predict_queries``.
        inputs: what the mapper made of the image.
        image: (H, W, 3) uint8, RGB.
        classes_of: names of K classes, and their colours, (K, 3) uint8, RGB.

    Returns:
        A picture for each shown query; empty for models without queries.
    """
    found = predict_queries(model, inputs, QUERIES)
    if found is None:
        return ()
    names, colors = classes_of(found.num_classes)
    size = fitting(image.shape[1], image.shape[0], QUERY_BOX)
    ground = np.asarray(resized(pale(image), size), dtype=np.float64)
    pictures = []
    for query, category, score, mask in zip(
        found.queries.tolist(),
        found.classes.tolist(),
        found.scores.tolist(),
        found.masks.float().cpu().numpy(),
        strict=True,
    ):
        if score < LOWEST_SCORE:
            break
        opacity = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.BILINEAR))
        shown = ground + 0.85 * opacity[..., None] * (colors[category] - ground)
        share = 100 * (mask >= 0.5).mean()
        pictures.append(
            Picture(
                f"{names[category]} {score:.2f} · query {query}",
                f"Query {query}: {names[category]} with score {score:.2f}, in {share:.0f} % of "
                "the image",
                data_uri(Image.fromarray(shown.astype(np.uint8)), "JPEG"),
                is_map=False,
            )
        )
    return tuple(pictures)


def pale(image: np.ndarray) -> np.ndarray:
    """A light grey version of a photograph, as background of marks, (H, W, 3) float64."""
    grey = image.mean(axis=2, keepdims=True)
    return np.repeat(165 + grey * 85 / 255, 3, axis=2)


def mark(picture: np.ndarray, mask: np.ndarray, color: tuple[int, int, int]) -> None:
    """Blend a colour over the pixels of a mask (H, W), in place."""
    where = mask > 0
    picture[where] = 0.25 * picture[where] + 0.75 * np.array(color)


def prior_title(name: str, strides: Mapping[str, int]) -> str:
    """The title of a prior map; models of other projects may not state its stride."""
    return f"Prior, stride {strides[name]}" if name in strides else f"Prior, {name}"


def fitting(width: int, height: int, box: tuple[int, int] = BOX) -> tuple[int, int]:
    """The (width, height) of a picture after shrinking it to fit into a box."""
    scale = min(1.0, box[0] / width, box[1] / height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _error_picture(
    image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, size: tuple[int, int]
) -> Picture:
    """The pale photograph with wrong pixels in orange and ignored pixels hatched.

    Args:
        image: (H, W, 3) uint8, RGB.
        truth: (H, W) class of each pixel, -1 = ignored.
        prediction: (H, W) classes.
        size: (width, height) of the picture.
    """
    valid = truth >= 0
    wrong = valid & (prediction != truth)
    ground = pale(image)
    ground[wrong] = 0.12 * ground[wrong] + 0.88 * np.array(WRONG)
    picture = resized(ground, size)
    if not valid.all():
        ignored = Image.fromarray((~valid).astype(np.uint8) * 255)
        picture.paste(hatching(size), mask=ignored.resize(size, Image.Resampling.NEAREST))
    share = wrong.sum() / max(valid.sum(), 1)
    alt = f"Wrong pixels in orange: {100 * share:.1f} % of labelled pixels"
    return Picture("Errors", alt, data_uri(picture, "JPEG"), is_map=False)


def agreement(classes: np.ndarray, truth: np.ndarray) -> str:
    """The accuracy of a class map of any size, enlarged to the image without interpolation."""
    rows = np.arange(truth.shape[0]) * classes.shape[0] // truth.shape[0]
    columns = np.arange(truth.shape[1]) * classes.shape[1] // truth.shape[1]
    valid = truth >= 0
    if not valid.any():
        return ""
    right = (classes[rows[:, None], columns] == truth)[valid].mean()
    return f" · {100 * right:.1f}\u00a0%\u00a0correct"


def _summary(classes: np.ndarray, names: Sequence[str], shown: int = 4) -> str:
    """A text with the most frequent classes."""
    known = classes[classes >= 0]
    if not known.size:
        return "no labelled pixel"
    pixels = np.bincount(known.ravel(), minlength=len(names))
    order = [index for index in np.argsort(-pixels, kind="stable") if pixels[index]]
    parts = [f"{names[index]} {100 * pixels[index] / known.size:.0f} %" for index in order[:shown]]
    rest = len(order) - shown
    return ", ".join(parts) + (f" and {rest} more" if rest > 0 else "")


def data_uri(picture: Image.Image, kind: str) -> str:
    """A picture as "data:image/...", as "PNG" or "JPEG"."""
    buffer = io.BytesIO()
    if kind == "PNG":
        _with_palette(picture).save(buffer, format="PNG", optimize=True)
    else:
        picture.save(buffer, format=kind, quality=86, subsampling=0)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _with_palette(picture: Image.Image) -> Image.Image:
    """The same picture as a palette image, a third of the bytes, if it has few enough colours."""
    if picture.getcolors(256) is None:
        return picture
    red, green, blue = np.moveaxis(np.asarray(picture, dtype=np.int32), -1, 0)
    values, indices = np.unique((red << 16) + (green << 8) + blue, return_inverse=True)
    colors = np.stack([values >> 16, values >> 8 & 255, values & 255], axis=1)
    compact = Image.fromarray(indices.reshape(red.shape).astype(np.uint8))
    compact.putpalette(colors.astype(np.uint8).tobytes())
    return compact
