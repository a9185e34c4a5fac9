"""The prediction for each frame of a video, drawn into videos."""

import itertools
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from semask.inference.prediction import ImagePrediction
from semask.inference.video import VideoReader, VideoWriter, writing_video

Predict = Callable[[np.ndarray], ImagePrediction]
# Draws a prediction's pictures, by name.
Draw = Callable[[ImagePrediction], Mapping[str, np.ndarray]]


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
