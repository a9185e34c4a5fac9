"""Reading and writing videos."""

import os
import resource
import struct
import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from semask.errors import DataError
from semask.inference.video import VideoError, VideoReader, writing_video
from tiny_model import photograph


def save_video(path: Path, frames: int, height: int = 20, width: int = 30) -> None:
    with writing_video(path, 12.5) as video:
        for index in range(frames):
            video.write(photograph(height, width, seed=index))


def test_a_video_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(error: BaseException) -> None:
        with writing_video(tmp_path / "out/a.mp4", 25) as video:
            video.write(photograph(20, 30))
            raise error

    for error in (KeyboardInterrupt(), VideoError()):
        with pytest.raises(type(error)):
            fail(error)
        assert os.listdir(tmp_path / "out") == []


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:
        with writing_video(tmp_path / "a.mp4", 25) as video:
            for index in range(100):
                video.write(photograph(64, 64, seed=index))

    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            fill()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["mp4", "avi"])
def test_odd_sizes_are_made_even(tmp_path: Path, format: str) -> None:
    with writing_video(tmp_path / f"a.{format}", 10) as video:
        video.write(np.full((7, 11, 3), (200, 30, 30), np.uint8))
    with VideoReader(tmp_path / f"a.{format}") as frames:
        (frame,) = frames
    assert frame.shape == (8, 12, 3)
    assert np.abs(frame.astype(int) - (200, 30, 30)).max() < 10


def test_browsers_play_it(tmp_path: Path) -> None:
    """H.264 of 4:2:0 pixels with its colours declared, and the index in front of the frames."""
    path = tmp_path / "a.mp4"
    with writing_video(path, 30000 / 1001) as video:
        for _ in range(5):
            video.write(np.full((20, 30, 3), (255, 0, 0), np.uint8))
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.format.name) == ("h264", "yuv420p")
        assert stream.average_rate == Fraction(30000, 1001)
        assert stream.codec_context.colorspace == 1  # BT.709
        frames = list(container.decode(stream))
    assert len(frames) == 5
    assert [float(frame.time) for frame in frames] == pytest.approx(
        [index * 1001 / 30000 for index in range(5)], abs=1e-4
    )
    luma = frames[0].to_ndarray()[:20]
    assert np.abs(luma - (16 + 219 * 0.2126)).max() < 3  # of red in BT.709
    content = path.read_bytes()
    assert 0 < content.index(b"moov") < content.index(b"mdat")


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_turned_videos_are_read_upright(tmp_path: Path, quarters: int) -> None:
    """As phones write them; OpenCV is the reference."""
    path = tmp_path / "a.mp4"
    corners = np.zeros((32, 48, 3), np.uint8)
    corners[:16, :16], corners[16:, :16], corners[:16, 32:] = 255, (255, 0, 0), (0, 0, 255)
    with writing_video(path, 25) as video:
        video.write(corners)
    content = bytearray(path.read_bytes())
    cosine, sine = [(1, 0), (0, 1), (-1, 0), (0, -1)][quarters]
    matrix = struct.pack(">4i", *(65536 * value for value in (cosine, sine, 0, -sine)))
    matrix += struct.pack(">i", 65536 * cosine)
    start = content.index(b"tkhd") + 4 + 40  # the display matrix in the track's header
    content[start : start + len(matrix)] = matrix
    path.write_bytes(content)
    with VideoReader(path) as frames:
        (frame,) = frames
    _, expected = cv2.VideoCapture(str(path)).read()
    assert (
        frame.shape == expected.shape == (corners.swapaxes(0, 1) if quarters % 2 else corners).shape
    )
    assert np.abs(frame.astype(int) - expected[..., ::-1]).mean() < 15


def test_frames_of_another_size_are_refused(tmp_path: Path) -> None:
    with writing_video(tmp_path / "a.avi", 10) as video:
        video.write(photograph(20, 30))
        with pytest.raises(VideoError, match="30x20"):
            video.write(photograph(22, 30))


def test_unknown_formats_and_missing_encoders_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(VideoError, match=r"\.mp4 or \.avi"), writing_video(tmp_path / "a.gif", 10):
        pass

    monkeypatch.setattr(av, "codecs_available", {"mjpeg"})
    with pytest.raises(VideoError, match=r"\.avi"), writing_video(tmp_path / "a.mp4", 10):
        pass
    monkeypatch.undo()
    with pytest.raises(VideoError, match="one frame"), writing_video(tmp_path / "a.mp4", 10):
        pass
    assert list(tmp_path.iterdir()) == []


def test_videos_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"a\.mp4"):
        VideoReader(tmp_path / "a.mp4")
    with pytest.raises(DataError, match="no video"):
        VideoReader(tmp_path / "b.mp4")


def test_cut_off_videos(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A video without its index cannot be read; otherwise it is read up to the cut."""
    path = tmp_path / "a.mp4"
    save_video(path, frames=60)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with VideoReader(path) as frames:
        assert frames.num_frames == 60
        assert 0 < len(list(frames)) < 60
    assert "states 60 frames" in caplog.text
    path.write_bytes(content[: content.index(b"mdat")])
    with pytest.raises(DataError, match=r"a\.mp4"), VideoReader(path) as frames:
        list(frames)
    path.write_bytes(content[:200])
    with pytest.raises(DataError, match=r"a\.mp4"):
        VideoReader(path)


def save_matroska(path: Path, frames: int, sound: float) -> None:
    """H.264 at 25 frames per second, and a track of silence of ``sound`` seconds."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25)
        audio = container.add_stream("pcm_s16le", rate=8000)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        for index in range(frames):
            picture = photograph(48, 64, seed=index)
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode(None))
        silence = np.zeros((1, int(8000 * sound)), np.int16)
        samples = av.AudioFrame.from_ndarray(silence, format="s16", layout="mono")
        samples.sample_rate = 8000
        container.mux(audio.encode(samples))


@pytest.mark.parametrize("tagged", [True, False])
def test_a_longer_audio_track_is_no_damage(tmp_path: Path, tagged: bool) -> None:
    path = tmp_path / "a.mkv"
    save_matroska(path, frames=25, sound=4)
    if not tagged:
        path.write_bytes(path.read_bytes().replace(b"DURATION", b"SOMENAME"))
    with VideoReader(path) as frames:
        assert frames.num_frames == (25 if tagged else 100)
        assert len(list(frames)) == 25
        assert frames.missing == ""


def test_a_cut_off_matroska_video(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    save_matroska(path, frames=50, sound=0.1)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with VideoReader(path) as frames:
        assert 0 < len(list(frames)) < 50
        assert "2.0 s" in frames.missing


def test_memory_does_not_grow_with_the_video(tmp_path: Path) -> None:
    """Neither reading nor writing keeps the frames."""
    peaks = []
    for count in (20, 100):
        tracemalloc.start()
        save_video(tmp_path / "a.avi", count, 120, 160)
        with VideoReader(tmp_path / "a.avi") as frames:
            assert sum(1 for _ in frames) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]
