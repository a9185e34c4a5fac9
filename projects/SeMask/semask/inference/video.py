"""Videos, frame by frame: memory does not grow with the length of the video."""

import contextlib
import itertools
import logging
import os
import re
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import cast

import av
import numpy as np
from av.error import FFmpegError, InvalidDataError
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from semask.errors import DataError, UserError
from semask.inference.prediction import ImagePrediction
from semask.utils.files import replacing

logger = logging.getLogger(__name__)

VIDEO_EXTENSIONS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
# The encoders of each format that is written, the preferred one first. H.264 in MP4 plays in every
# browser; PyAV's wheels have libx264, builds without GPL code may have libopenh264.
ENCODERS = {".mp4": ("libx264", "libopenh264"), ".avi": ("mjpeg",)}
PIXEL_FORMATS = {".mp4": "yuv420p", ".avi": "yuvj420p"}
ENCODER_OPTIONS = {
    "libx264": {"crf": "18", "preset": "fast"},
    "libopenh264": {"b": "8M"},
    "mjpeg": {"qmin": "2", "qmax": "2"},
}
# For videos that do not state their frame rate.
DEFAULT_RATE = 25.0
BT709 = 1  # the code of these primaries, transfer function and matrix in H.264

Predict = Callable[[np.ndarray], ImagePrediction]
# Draws a prediction's pictures, by name.
Draw = Callable[[ImagePrediction], Mapping[str, np.ndarray]]


class VideoError(UserError):
    """A video that cannot be written; the message says why and what to do."""


class VideoReader:
    """The frames of a video file; a context manager, to be iterated over once.

    Attributes:
        frame_rate: frames per second.
        num_frames: as stated by the file, else estimated from the duration; 0 if unknown.
        size: (width, height) of its frames as stored.
        missing: a warning about stated frames that cannot be decoded, or ""; set after the last
            frame.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """
        Args:
            path: a local file.

        Raises:
            DataError: there is no such file, or it cannot be decoded.
        """
        self.path = os.fspath(path)
        if not os.path.isfile(self.path):
            raise DataError(f"There is no video '{self.path}'.")
        try:
            self._container = av.open(self.path)
        except (FFmpegError, OSError) as error:
            raise DataError(
                f"Cannot open video '{self.path}': it is damaged, truncated, or of an unknown "
                f"format ({error.strerror or error}). Copy it again, or convert it, for example "
                "with 'ffmpeg -i FILE out.mp4'."
            ) from error
        if not self._container.streams.video:
            self._container.close()
            raise DataError(f"'{self.path}' has no video stream.")
        self._stream = self._container.streams.video[0]
        self.size = (self._stream.width, self._stream.height)
        self.missing = ""
        self.frame_rate = float(self._stream.average_rate or DEFAULT_RATE)
        self._seconds = _track_duration(self._stream)
        # Matroska does not count frames; its duration is that of the longest track.
        seconds = self._seconds or (self._container.duration or 0) / av.time_base
        self.num_frames = self._stream.frames or round(seconds * self.frame_rate)

    def __iter__(self) -> Iterator[np.ndarray]:
        """(H, W, 3) uint8 RGB frames, upright.

        Raises:
            DataError: no frame can be decoded.
        """
        count, last = 0, 0.0
        for frame in self._frames():
            count += 1
            last = frame.time or 0.0
            # RGB has no colour matrix, but older PyAV applies the video's own only if a target is
            # named.
            pixels = frame.reformat(format="rgb24", dst_colorspace="ITU601").to_ndarray()
            # The file says by how many degrees to turn it counterclockwise.
            yield np.rot90(pixels, round(frame.rotation / 90))
        if not count:
            raise DataError(f"Video '{self.path}' has no frame that can be decoded.")
        stated = self._stream.frames
        if count < stated:
            self._warn(f"states {stated} frames, but only {count} can be decoded")
        elif not stated and last + max(0.5, 2 / self.frame_rate) < self._seconds:
            self._warn(f"states {self._seconds:.1f} s, but only {last:.1f} s can be decoded")

    def _warn(self, what: str) -> None:
        self.missing = f"Video '{self.path}' {what}: it is damaged or truncated."
        logger.warning("%s", self.missing)

    def _frames(self) -> Iterator[VideoFrame]:
        """The frames that can be decoded."""
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
            except FFmpegError:  # no later packet can be found
                return
            if packet is None:
                return
            with contextlib.suppress(InvalidDataError):  # the next packet may be intact
                yield from packet.decode()

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._container.close()


def _track_duration(stream: VideoStream) -> float:
    """Seconds of this track in Matroska, from the tag that most programs write; 0 = unknown."""
    match = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    return 0.0 if match is None else 3600 * int(match[1]) + 60 * int(match[2]) + float(match[3])


class VideoWriter:
    """Writes frames one by one; created by `writing_video`."""

    def __init__(self, path: str, suffix: str, frame_rate: float) -> None:
        """
        Args:
            path: the file that is written.
            suffix: its format, ".mp4" or ".avi".
            frame_rate: frames per second.

        Raises:
            VideoError: PyAV has no encoder for the format.
        """
        self._pixel_format = PIXEL_FORMATS[suffix]
        encoder = next((name for name in ENCODERS[suffix] if name in av.codecs_available), None)
        if encoder is None:
            others = ", ".join(other for other in ENCODERS if other != suffix)
            raise VideoError(
                f"PyAV cannot write {suffix} video here: it was built without the encoders "
                f"{' and '.join(ENCODERS[suffix])}. Try {others}."
            )
        # With the index in front, playing starts before the whole file is there.
        options = {"movflags": "+faststart"} if suffix == ".mp4" else {}
        self._container = av.open(path, "w", format=suffix[1:], options=options)
        rate = Fraction(frame_rate).limit_denominator(1001)  # 29.97 is 30000/1001
        self._stream = cast(
            VideoStream,
            self._container.add_stream(encoder, rate=rate, options=ENCODER_OPTIONS[encoder]),
        )
        self._stream.pix_fmt = self._pixel_format
        self._shape: tuple[int, ...] = ()
        self.num_frames = 0

    def write(self, frame: np.ndarray) -> None:
        """Append a frame.

        Args:
            frame: (H, W, 3) uint8, RGB, all of one size. The pixel formats need an even height and
                width: an odd one is extended by repeating the last row or column.

        Raises:
            VideoError: the size has changed.
            OSError: the file cannot be written.
        """
        if not self._shape:
            self._shape = frame.shape
            self._open_stream(*frame.shape[:2])
        elif frame.shape != self._shape:
            raise VideoError(
                f"Frame {self.num_frames} is {frame.shape[1]}x{frame.shape[0]} pixels, but the "
                f"frames before it are {self._shape[1]}x{self._shape[0]}."
            )
        even = np.pad(frame, [(0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)], "edge")
        picture = VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
        if self._pixel_format == "yuv420p":
            picture = picture.reformat(format=self._pixel_format, dst_colorspace="ITU709")
        self._container.mux(self._stream.encode(picture))
        self.num_frames += 1

    def _open_stream(self, height: int, width: int) -> None:
        self._stream.height = height + height % 2
        self._stream.width = width + width % 2
        if self._pixel_format == "yuv420p":
            # Without these tags, players guess the colours from the size.
            context = self._stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = BT709
            context.color_range = 1  # 16..235

    def finish(self) -> None:
        """Write the frames that the encoder still holds, and the index.

        Raises:
            VideoError: there is no frame.
            OSError: the file cannot be written.
        """
        if not self.num_frames:
            raise VideoError("A video needs at least one frame.")
        self._container.mux(self._stream.encode(None))
        self._container.close()

    def abandon(self) -> None:
        """Close the unfinished file."""
        with contextlib.suppress(FFmpegError, OSError):
            self._container.close()


@contextlib.contextmanager
def writing_video(path: str | os.PathLike[str], frame_rate: float) -> Iterator[VideoWriter]:
    """Write a video file atomically. Missing folders are created.

    Args:
        path: ends in ".mp4" (H.264) or ".avi" (Motion JPEG).
        frame_rate: frames per second.

    Raises:
        VideoError: the suffix is not supported, the encoder is missing, or there is no frame.
        OSError: the file cannot be written.
    """
    target = os.path.abspath(path)
    suffix = os.path.splitext(target)[1]
    if suffix not in ENCODERS:
        raise VideoError(f"Cannot write video '{target}': use {' or '.join(ENCODERS)}.")
    with replacing(target) as file:
        writer = VideoWriter(file.name, suffix, frame_rate)
        try:
            yield writer
            writer.finish()
        except BaseException:
            writer.abandon()
            raise


def predict_frames(
    predict: Predict,
    frames: VideoReader,
    draw: Draw,
    path_of: Callable[[str], Path],
    *,
    limit: int | None = None,
) -> Generator[ImagePrediction, None, None]:
    """Predict a video frame by frame.

    The videos are complete after the last frame. If the generator is closed earlier, or an error
    occurs, none is written.

    Args:
        predict: from an (H, W, 3) uint8 RGB array to its prediction.
        frames: of the video.
        draw: draws the pictures of a frame.
        path_of: the video, ".mp4" or ".avi", that the pictures of a name go into.
        limit: maximum number of frames; None = all.

    Yields:
        The prediction of each frame.

    Raises:
        DataError: no frame can be decoded.
        VideoError, OSError: a video cannot be written.
    """
    writers: dict[str, VideoWriter] = {}
    with ExitStack() as stack:
        for frame in itertools.islice(frames, limit):
            prediction = predict(frame)
            for name, picture in draw(prediction).items():
                if name not in writers:
                    writing = writing_video(path_of(name), frames.frame_rate)
                    writers[name] = stack.enter_context(writing)
                writers[name].write(picture)
            yield prediction
