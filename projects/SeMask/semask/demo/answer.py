"""The page's output for an uploaded file, as self-contained HTML with all pictures and files."""

import base64
import json
import mimetypes
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from semask.data.bands import WITH_BANDS, stored_size
from semask.data.checks.report import dark_words
from semask.data.image_files import opened_image
from semask.data.reading import is_nearly_black
from semask.engine.launch.ending import is_out_of_memory
from semask.errors import DataError, UserError
from semask.inference.prediction import ImagePrediction
from semask.inference.predictor import ImagePredictor
from semask.inference.regions import Regions
from semask.inference.video import VIDEO_EXTENSIONS, VideoReader, predict_frames
from semask.report.page import percent, template_environment
from semask.report.pictures import data_uri
from semask.utils.text import pluralize
from semask.visualize.drawing import resized

# The maximum side of shown pictures, in pixels; downloads keep the image's size.
SIDE, VIDEO_SIDE = 1600, 960
# Called with the number of predicted frames and the total number.
Report = Callable[[int, int], None]

# Descriptions of the folders and files of ``ImagePrediction.save``.
_KINDS = {"labels": "Label map", "panoptic": "Segments"}

_environment = template_environment("semask.demo")


@dataclass(frozen=True)
class Limits:
    """Limits on uploads.

    Attributes:
        pixels: maximum number of pixels of an image or a frame.
        frames: maximum number of frames of a video; later ones are left out.
    """

    pixels: int = 50_000_000
    frames: int = 300


@dataclass(frozen=True)
class LegendEntry:
    """A region of a picture: its name, colour "#rrggbb", share of the pixels, and score or
    confidence.
    """

    name: str
    color: str
    share: float
    certainty: float


@dataclass(frozen=True)
class View:
    """A picture with the region of each pixel.

    Attributes:
        title, details: the caption, and additional text.
        width, height: of the image.
        layers: data URIs; the second is blended over the first with the opacity of the page's
            slider.
        map: data URI of an RGB picture: R + 256 G is the pixel's region plus 1, 0 = none; B is its
            confidence, 0..255. "" = unknown.
        names: of the regions, in JSON; a region's score is appended to its name.
        has_confidence: whether B is used.
        legend: the visible regions.
    """

    title: str
    details: str
    width: int
    height: int
    layers: tuple[str, ...]
    map: str = ""
    names: str = "[]"
    has_confidence: bool = False
    legend: tuple[LegendEntry, ...] = ()


@dataclass(frozen=True)
class Download:
    """A file embedded in the page: its name, a data URI and a description."""

    name: str
    uri: str
    text: str


@dataclass(frozen=True)
class Answer:
    """The page's output for one file.

    Attributes:
        html: the HTML.
        prediction: to redraw with another ``min_score``; None if nothing depends on it.
        name: of the file.
    """

    html: str
    prediction: ImagePrediction | None = None
    name: str = ""


class Demo:
    """Predicts uploaded files and renders the results."""

    def __init__(self, predictor: ImagePredictor, limits: Limits | None = None) -> None:
        """
        Args:
            predictor: of any task.
            limits: on uploads; None = the defaults.
        """
        self.predictor = predictor
        self.limits = limits or Limits()

    def answer(
        self, file: Path, *, min_score: float = 0.5, report: Report = lambda done, total: None
    ) -> Answer:
        """Predict an image or a video.

        Args:
            file: an image or a video, by its suffix.
            min_score: instances with a lower score are left out.
            report: called with the progress of a video.

        Returns:
            The prediction, or a message that says what is wrong with the file.
        """
        try:
            if file.suffix.lower() in VIDEO_EXTENSIONS:
                return self._video(file, min_score, report)
            return self._image(file, min_score)
        except UserError as error:
            return problem(str(error).replace(str(file), file.name))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return problem(
                f"There is not enough memory for '{file.name}'. Try a smaller file, or start the "
                "page with --opts TEST.PROTOCOL=slide."
            )

    def drawn(
        self,
        prediction: ImagePrediction,
        name: str,
        *,
        min_score: float,
        facts: tuple[str, ...] = (),
        notes: Sequence[str] = (),
        frame: int | None = None,
        videos: Sequence[tuple[str, str]] = (),
    ) -> Answer:
        """Render a prediction.

        Args:
            prediction: of an image.
            name: of its file.
            min_score: as for :meth:`answer`.
            facts: short texts above the picture.
            notes: sentences about the file.
            frame: for a video, the number of the frame.
            videos: title and data URI of each video.
        """
        opaque = prediction.pictures(alpha=1, min_score=min_score)
        image = prediction.pictures(alpha=0, min_score=min_score).get("overlay", prediction.image)
        regions = prediction.regions(min_score=min_score)
        known = regions.get("overlay")
        overlay = _view("", (image, opaque.pop("overlay", image)), known)
        others = [
            _view(_title(key), (picture,), regions.get(key)) for key, picture in opaque.items()
        ]
        if known is not None and known.confidence is not None:
            shade = np.rint(255 * known.confidence).astype(np.uint8)
            colors = cv2.cvtColor(cv2.applyColorMap(shade, cv2.COLORMAP_CIVIDIS), cv2.COLOR_BGR2RGB)
            others.insert(0, _view("Confidence", (colors,), known, legend=False))
        if is_nearly_black(prediction.image):
            notes = [*notes, dark_words(1, 1)]
        height, width = prediction.image.shape[:2]
        stem = Path(name).stem if frame is None else f"{Path(name).stem}_{frame:06}"
        html = _environment.get_template("answer.html.j2").render(
            name=name,
            videos=videos,
            facts=(f"{width} × {height} pixels", *_findings(prediction, known), *facts),
            overlay=overlay,
            certainty=_certainty_word(known),
            others=others,
            prior_classes=_unknown_classes(regions),
            downloads=_downloads(prediction, stem),
            notes=notes,
        )
        return Answer(html, prediction if prediction.has_scores else None, name)

    def _image(self, file: Path, min_score: float) -> Answer:
        self._check_stored_size(file)
        start = time.perf_counter()
        prediction = self.predictor.in_detail(file)
        seconds = f"{time.perf_counter() - start:.2f} s"
        return self.drawn(prediction, file.name, min_score=min_score, facts=(seconds,))

    def _video(self, file: Path, min_score: float, report: Report) -> Answer:
        first: ImagePrediction | None = None
        count, limit = 0, self.limits.frames
        with VideoReader(file) as frames, tempfile.TemporaryDirectory() as folder:
            self._check_pixels(file, *frames.size)
            total = min(frames.num_frames or limit, limit)
            predictions = predict_frames(
                self.predictor.in_detail,
                frames,
                lambda found: _for_video(found, min_score),
                lambda kind: Path(folder) / f"{kind}.mp4",
                limit=limit,
            )
            for count, prediction in enumerate(predictions, 1):
                if first is None:
                    first = prediction
                report(count, total)
            files = sorted(Path(folder).iterdir())
            files.sort(key=lambda path: path.stem != "overlay")
            videos = [(_title(path.stem), _file_uri(path)) for path in files]
            notes = [frames.missing.replace(str(file), file.name)] if frames.missing else []
            if frames.num_frames > count == limit:
                notes.append(
                    f"The first {limit} of {frames.num_frames} frames are shown (--max-frames)."
                )
        assert first is not None  # a video without frames raises an error
        answer = self.drawn(
            *(first, file.name),
            min_score=min_score,
            frame=0,
            facts=(pluralize(count, "frame"),),
            videos=videos,
            notes=notes,
        )
        return Answer(answer.html)

    def _check_stored_size(self, file: Path) -> None:
        """Reject images with too many pixels before they are decoded."""
        if not file.is_file():
            raise DataError(f"'{file.name}' is no longer available: upload it again.")
        try:
            width, height = _stored_size(file)
        except DataError:  # unknown format, or damaged: the predictor reports it
            return
        self._check_pixels(file, width, height)

    def _check_pixels(self, file: Path, width: int, height: int) -> None:
        if width * height > self.limits.pixels:
            raise DataError(
                f"'{file.name}' has {width} x {height} = {width * height / 1e6:.1f} megapixels; "
                f"the maximum is {self.limits.pixels / 1e6:g} (--max-megapixels)."
            )


def _stored_size(file: Path) -> tuple[int, int]:
    """Width and height of an image file, also of formats that Pillow does not read.

    Raises:
        DataError: the file is not an image, or damaged.
    """
    try:
        with opened_image(file, "image") as image:
            return image.size
    except DataError:
        if not file.name.lower().endswith(WITH_BANDS):
            raise
        return stored_size(file)[:2]


def problem(sentence: str) -> Answer:
    """Render an error message."""
    return Answer(_environment.get_template("problem.html.j2").render(sentence=sentence))


def _title(kind: str) -> str:
    """The title for a name such as "prior2", the prior of stage 1."""
    number = kind.removeprefix("prior")
    if kind.startswith("prior") and number.isdecimal():
        return f"Semantic prior of stage {int(number) - 1}"
    return kind.capitalize()


def _findings(prediction: ImagePrediction, regions: Regions | None) -> list[str]:
    if regions is None:
        return []
    if regions.confidence is not None:
        return [f"mean confidence {percent(float(regions.confidence.mean()))}"]
    return [pluralize(len(regions.names), "instance" if prediction.has_scores else "segment")]


def _certainty_word(regions: Regions | None) -> str:
    if regions is None or np.isnan(regions.certainties()).all():
        return ""
    return "confidence" if regions.scores is None else "score"


def _unknown_classes(regions: dict[str, Regions]) -> list[tuple[str, str]]:
    """Names and colours of the classes in the other pictures, if they differ from the overlay's."""
    known = regions.get("overlay")
    found: dict[tuple[str, str], None] = {}
    for other in regions.values():
        if other is known or (known is not None and other.names == known.names):
            continue
        for index in np.unique(other.index[other.index >= 0]).tolist():
            found[other.names[index], _hexadecimal(other.colors[index])] = None
    return sorted(found)


def _hexadecimal(color: np.ndarray) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color.tolist())


def _view(
    title: str,
    pictures: tuple[np.ndarray, ...],
    regions: Regions | None,
    *,
    legend: bool = True,
) -> View:
    height, width = pictures[0].shape[:2]
    details = ""
    if regions is not None and regions.index.shape != (height, width):
        details = f"{regions.index.shape[1]} × {regions.index.shape[0]}"
    # Photographs as JPEG; pictures with hard edges, such as coloured classes, as PNG.
    kinds = ("JPEG", "PNG") if len(pictures) > 1 else ("PNG",)
    layers = tuple(
        data_uri(Image.fromarray(_shrunk(picture, SIDE)), kind)
        for picture, kind in zip(pictures, kinds, strict=True)
    )
    if regions is None:
        return View(title, details, width, height, layers)
    return View(
        *(title, details, width, height, layers),
        map=_region_map(regions),
        names=json.dumps(_hover_names(regions)),
        has_confidence=regions.confidence is not None,
        legend=_legend(regions) if legend else (),
    )


def _hover_names(regions: Regions) -> list[str]:
    if regions.scores is None:
        return list(regions.names)
    scores = regions.scores.tolist()
    return [
        name if np.isnan(score) else f"{name} · {percent(score, 0)}"
        for name, score in zip(regions.names, scores, strict=True)
    ]


def _legend(regions: Regions) -> tuple[LegendEntry, ...]:
    """Classes by area, instances by score, highest first."""
    shares, certainties = regions.shares(), regions.certainties()
    order = range(len(shares)) if regions.scores is not None else np.argsort(-shares, kind="stable")
    return tuple(
        LegendEntry(
            regions.names[index],
            _hexadecimal(regions.colors[index]),
            float(shares[index]),
            float(certainties[index]),
        )
        for index in order
        if shares[index] > 0
    )


def _region_map(regions: Regions) -> str:
    """The map of :class:`View`, resized like the shown picture."""
    step = -(-max(regions.index.shape) // SIDE)
    numbers = regions.index[::step, ::step] + 1
    channels = [numbers & 255, numbers >> 8, np.zeros_like(numbers)]
    if regions.confidence is not None:
        channels[2] = np.rint(255 * regions.confidence[::step, ::step])
    return data_uri(Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8)), "PNG")


def _shrunk(picture: np.ndarray, side: int) -> np.ndarray:
    height, width = picture.shape[:2]
    if max(height, width) <= side:
        return picture
    scale = side / max(height, width)
    return np.asarray(
        resized(picture, (max(1, round(width * scale)), max(1, round(height * scale))))
    )


def _for_video(prediction: ImagePrediction, min_score: float) -> dict[str, np.ndarray]:
    pictures = prediction.pictures(min_score=min_score)
    return {name: _shrunk(picture, VIDEO_SIDE) for name, picture in pictures.items()}


def _downloads(prediction: ImagePrediction, name: str) -> list[Download]:
    """The files that ``semask predict`` writes for an image, without pictures."""
    with tempfile.TemporaryDirectory() as folder:
        prediction.save(folder, name)
        prediction.save_classes(folder)
        files = (path for path in Path(folder).rglob("*") if path.is_file())
        return [_download(path, path.relative_to(folder)) for path in sorted(files, key=_rank)]


def _rank(path: Path) -> tuple[bool, bool, Path]:
    """Sort key: maps first, then other data of the image, then descriptions of the classes."""
    kind = path.parent.name
    return kind not in (*_KINDS, "instances"), kind not in _KINDS or path.suffix != ".png", path


def _download(path: Path, relative: Path) -> Download:
    """The download of a file such as "labels/NAME.png" or "classes.json"."""
    kind = relative.parts[0] if len(relative.parts) > 1 else relative.stem
    name = f"{relative.stem}_{kind}{path.suffix}" if len(relative.parts) > 1 else relative.name
    size = os.path.getsize(path)
    amount = f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{max(1, round(size / 1e3))} kB"
    words = _KINDS.get(kind, kind.capitalize())
    return Download(name, _file_uri(path), f"{words} · {path.suffix[1:].upper()} · {amount}")


def _file_uri(path: Path) -> str:
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
