"""Videos, frame by frame: no more than one frame is held, however long the video."""

import contextlib
import logging
import math
import os
import tempfile
from collections.abc import Iterator
from types import TracebackType

import cv2
import numpy as np

from semask.errors import DataError

logger = logging.getLogger(__name__)

VIDEO_EXTENSIONS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
# What can be written, with the codec that OpenCV's own builds have for it.
CODECS = {".mp4": "mp4v", ".avi": "MJPG"}
# Of videos that do not say how fast they are.
DEFAULT_RATE = 25.0


class VideoError(ValueError):
    """A video that cannot be written; the message says why and what to do."""


class VideoReader:
    """The frames of a video file; a context manager, to be iterated over once.

    Attributes:
        frame_rate: frames per second.
        num_frames: as the file announces it; 0 where it does not.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """
        Args:
            path: a local file.

        Raises:
            DataError: there is no such file, or OpenCV cannot decode it.
        """
        self.path = os.fspath(path)
        if not os.path.isfile(self.path):
            raise DataError(f"There is no video '{self.path}'.")
        self._capture = cv2.VideoCapture(self.path)
        if not self._capture.isOpened():
            raise DataError(
                f"Cannot open video '{self.path}': it is damaged, or OpenCV has no decoder for it. "
                "Convert it first, for example with 'ffmpeg -i FILE out.mp4'."
            )
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self.frame_rate = rate if math.isfinite(rate) and rate > 0 else DEFAULT_RATE
        self.num_frames = max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))

    def __iter__(self) -> Iterator[np.ndarray]:
        """(H, W, 3) uint8 RGB frames, upright.

        Raises:
            DataError: the first frame cannot be decoded.
        """
        count = 0
        while True:
            found, frame = self._capture.read()
            if not found:
                break
            count += 1
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        if not count:
            raise DataError(f"Video '{self.path}' has no frame that can be decoded.")
        if count < self.num_frames:
            logger.warning(
                "Video '%s' announces %d frames, but only %d can be decoded.",
                *(self.path, self.num_frames, count),
            )

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._capture.release()


class VideoWriter:
    """Takes frames one by one; made by `writing_video`."""

    def __init__(self, path: str, frame_rate: float) -> None:
        self._path = path
        self._frame_rate = frame_rate
        self._codec = CODECS[os.path.splitext(path)[1]]
        self._writer: cv2.VideoWriter | None = None
        self._shape: tuple[int, ...] = ()
        self.num_frames = 0

    def write(self, frame: np.ndarray) -> None:
        """Append a frame.

        Args:
            frame: (H, W, 3) uint8, RGB, all of one size. An odd height or width, which the codecs
                do not have, is made even by repeating the last row or column.

        Raises:
            VideoError: OpenCV has no such encoder, or the size has changed.
        """
        if self._writer is None:
            self._shape = frame.shape
            self._writer = self._opened(frame.shape[0], frame.shape[1])
        elif frame.shape != self._shape:
            raise VideoError(
                f"Frame {self.num_frames} is {frame.shape[1]}x{frame.shape[0]} pixels, the ones "
                f"before it are {self._shape[1]}x{self._shape[0]}."
            )
        bottom, right = frame.shape[0] % 2, frame.shape[1] % 2
        frame = cv2.copyMakeBorder(frame, 0, bottom, 0, right, cv2.BORDER_REPLICATE)
        self._writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        self.num_frames += 1

    def _opened(self, height: int, width: int) -> cv2.VideoWriter:
        code = cv2.VideoWriter.fourcc(*self._codec)
        size = (width + width % 2, height + height % 2)
        writer = cv2.VideoWriter(self._path, code, self._frame_rate, size)
        if not writer.isOpened():
            others = ", ".join(suffix for suffix, codec in CODECS.items() if codec != self._codec)
            raise VideoError(
                f"OpenCV cannot write {self._codec} video of {size[0]}x{size[1]} pixels here: this "
                f"build has no such encoder, or the folder cannot be written. Try {others}."
            )
        return writer

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.release()


@contextlib.contextmanager
def writing_video(path: str | os.PathLike[str], frame_rate: float) -> Iterator[VideoWriter]:
    """Write a video file, which is complete or not there. Missing folders are made.

    Args:
        path: ends in ".mp4" (MPEG-4) or ".avi" (Motion JPEG).
        frame_rate: frames per second.

    Raises:
        VideoError: the suffix is another, the encoder is missing, or frames have been lost.
    """
    target = os.path.abspath(path)
    suffix = os.path.splitext(target)[1]
    if suffix not in CODECS:
        raise VideoError(f"Cannot write video '{target}': use {' or '.join(CODECS)}.")
    os.makedirs(os.path.dirname(target), exist_ok=True)
    # OpenCV takes the container from the suffix, so the temporary file needs the same.
    with tempfile.TemporaryDirectory(prefix=".video-", dir=os.path.dirname(target)) as folder:
        temporary = os.path.join(folder, f"video{suffix}")
        writer = VideoWriter(temporary, frame_rate)
        try:
            yield writer
        finally:
            writer.close()
        if writer.num_frames:
            _check_complete(temporary, target, writer.num_frames)
            os.replace(temporary, target)


def _check_complete(path: str, target: str, written: int) -> None:
    """OpenCV does not say when a frame could not be written, as on a full disk."""
    capture = cv2.VideoCapture(path)
    found = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
    capture.release()
    if found != written:
        raise VideoError(
            f"Video '{target}' came out with {found} of {written} frames and has been removed. "
            "Is the disk full?"
        )
