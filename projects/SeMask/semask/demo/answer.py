"""The page's output for an uploaded file, as self-contained HTML with all pictures and files."""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from semask.data.bands import WITH_BANDS, upright_size
from semask.data.checks.report import dark_words
from semask.data.image_files import opened_image
from semask.data.reading import is_nearly_black
from semask.demo.views import downloads, file_uri, shrunk, unknown_classes, view
from semask.engine.launch.ending import is_out_of_memory
from semask.errors import DataError, UserError
from semask.inference.prediction import ImagePrediction
from semask.inference.predictor import ImagePredictor
from semask.inference.regions import Regions
from semask.inference.video import VIDEO_EXTENSIONS, VideoReader, predict_frames
from semask.modeling.backbone.contract import stage_of_prior
from semask.report.page import percent, template_environment
from semask.utils.text import pluralize

# The maximum side of shown videos, in pixels.
VIDEO_SIDE = 960
# Called with the number of predicted frames and the total number.
Progress = Callable[[int, int], None]

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
        self, file: Path, *, min_score: float = 0.5, progress: Progress = lambda done, total: None
    ) -> Answer:
        """Predict an image or a video.

        Args:
            file: an image or a video, by its suffix.
            min_score: instances with a lower score are left out.
            progress: called with the progress of a video.

        Returns:
            The prediction, or a message that says what is wrong with the file.
        """
        try:
            if file.suffix.lower() in VIDEO_EXTENSIONS:
                return self._video(file, min_score, progress)
            return self._image(file, min_score)
        except UserError as error:
            return problem(str(error).replace(str(file), file.name))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return problem(
                f"There is not enough memory for '{file.name}'. Try a smaller file, or start the "
                "page with --opts TEST.PROTOCOL=slide."
            )

    def render(
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
        overlay = view("", (image, opaque.pop("overlay", image)), known)
        others = [
            view(_title(key), (picture,), regions.get(key)) for key, picture in opaque.items()
        ]
        if known is not None and known.confidence is not None:
            shade = np.rint(255 * known.confidence).astype(np.uint8)
            colors = cv2.cvtColor(cv2.applyColorMap(shade, cv2.COLORMAP_CIVIDIS), cv2.COLOR_BGR2RGB)
            others.insert(0, view("Confidence", (colors,), known, legend=False))
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
            prior_classes=unknown_classes(regions),
            downloads=downloads(prediction, stem),
            notes=notes,
        )
        return Answer(html, prediction if prediction.has_scores else None, name)

    def _image(self, file: Path, min_score: float) -> Answer:
        self._check_stored_size(file)
        start = time.perf_counter()
        prediction = self.predictor.in_detail(file)
        seconds = f"{time.perf_counter() - start:.2f} s"
        return self.render(prediction, file.name, min_score=min_score, facts=(seconds,))

    def _video(self, file: Path, min_score: float, progress: Progress) -> Answer:
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
                progress(count, total)
            files = sorted(Path(folder).iterdir())
            files.sort(key=lambda path: path.stem != "overlay")
            videos = [(_title(path.stem), file_uri(path)) for path in files]
            notes = [frames.missing.replace(str(file), file.name)] if frames.missing else []
            if frames.num_frames > count == limit:
                notes.append(
                    f"The first {limit} of {frames.num_frames} frames are shown (--max-frames)."
                )
        assert first is not None  # a video without frames raises an error
        answer = self.render(
            first,
            file.name,
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
        return upright_size(file)[:2]


def problem(sentence: str) -> Answer:
    """Render an error message."""
    return Answer(_environment.get_template("problem.html.j2").render(sentence=sentence))


def _title(kind: str) -> str:
    """The title for a name such as "prior2"; stages are counted from 1."""
    stage = stage_of_prior(kind)
    return kind.capitalize() if stage is None else f"Semantic prior of stage {stage + 1}"


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


def _for_video(prediction: ImagePrediction, min_score: float) -> dict[str, np.ndarray]:
    pictures = prediction.pictures(min_score=min_score)
    return {name: shrunk(picture, VIDEO_SIDE) for name, picture in pictures.items()}
