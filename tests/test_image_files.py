"""The image files that are opened, and the messages about those that are refused."""

import ast
import errno
import re
import struct
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager
from PIL import Image, ImageFile, TiffImagePlugin

from semask.data import image_files, reading
from semask.data.checks.semantic import image_mode
from semask.data.image_files import MAX_PIXELS, opened_image
from semask.data.reading import read_image
from semask.errors import ConfigError, DataError, UnreadableError
from semask.evaluation.instance_evaluators import StuffEvaluator


def write_tiff(
    path: Path, samples: np.ndarray, photometric: int = 1, extra: int | None = 0
) -> Path:
    """An uncompressed TIFF of (H, W, C) samples, of kinds that Pillow does not write."""
    height, width, channels = samples.shape
    data = samples.tobytes()
    kind = {"u": 1, "i": 2, "f": 3}[samples.dtype.kind]
    entries: list[tuple[int, list[int]]] = [
        (256, [width]),
        (257, [height]),
        (258, [8 * samples.dtype.itemsize] * channels),
        (259, [1]),
        (262, [photometric]),
        (273, [8]),
        (277, [channels]),
        (278, [height]),
        (279, [len(data)]),
        (339, [kind] * channels),
    ]
    if extra is not None:
        base = 3 if photometric == 2 else 1
        entries.insert(-1, (338, [extra] * (channels - base)))
    body, arrays = b"", b""
    start = 8 + len(data) + len(data) % 2
    after = start + 2 + 12 * len(entries) + 4
    for tag, values in entries:
        packed = struct.pack(f"<{len(values)}I", *values)
        inline = packed if len(values) == 1 else struct.pack("<I", after + len(arrays))
        arrays += packed if len(values) > 1 else b""
        body += struct.pack("<HHI", tag, 4, len(values)) + inline
    directory = struct.pack("<H", len(entries)) + body + struct.pack("<I", 0) + arrays
    header = b"II*\0" + struct.pack("<I", start)
    path.write_bytes(header + data + b"\0" * (len(data) % 2) + directory)
    return path


def samples(channels: int, dtype: Any = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 250, (5, 7, channels)).astype(dtype)


@pytest.mark.parametrize(
    ("pixels", "photometric", "words"),
    [
        (samples(6), 1, "6 channels of 8-bit unsigned integers"),
        (samples(2, np.uint16), 1, "2 channels of 16-bit unsigned integers"),
        (samples(3, np.float32), 2, "3 channels of 32-bit floating-point numbers"),
        (samples(3, np.uint32), 2, "3 channels of 32-bit unsigned integers"),
    ],
)
def test_a_sound_tiff_of_another_kind_is_named_and_not_called_damaged(
    tmp_path: Path, pixels: np.ndarray, photometric: int, words: str
) -> None:
    path = write_tiff(tmp_path / "a.tif", pixels, photometric)
    with pytest.raises(DataError, match=words) as caught:
        read_image(path)
    assert not isinstance(caught.value, UnreadableError)
    assert "damaged" not in str(caught.value)


@pytest.mark.parametrize("extra", [None, 0, 1, 2])
def test_a_fourth_channel_that_is_no_transparency_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: int | None
) -> None:
    told: list[str] = []  # in a run, the first one alone
    monkeypatch.setattr(reading, "log_first_n", lambda level, text, name: told.append(text))
    pixels = samples(4)
    path = write_tiff(tmp_path / "a.tif", pixels, 2, extra)
    if extra != 1:  # whose colours are multiplied by the transparency
        assert np.array_equal(read_image(path), pixels[:, :, :3])
    read_image(path)
    assert any("a.tif" in text for text in told) is (not extra)
    assert ("unused channel" in image_mode(str(path))) is (not extra)


@pytest.mark.parametrize("suffix", ["tif", "gif", "png", "webp"])
def test_several_pages_are_refused(tmp_path: Path, suffix: str) -> None:
    pages = [Image.fromarray(samples(3)[..., 0] // 4 + 60 * index) for index in range(3)]
    path = tmp_path / f"a.{suffix}"
    pages[0].save(path, save_all=True, append_images=pages[1:])
    with pytest.raises(DataError, match=r"a\..* has 3 pages"):
        read_image(path)


def test_smaller_copies_in_a_tiff_are_no_pages(tmp_path: Path) -> None:
    picture = Image.fromarray(samples(3))
    with TiffImagePlugin.AppendingTiffWriter(tmp_path / "a.tif", new=True) as file:
        picture.save(file, "TIFF")
        file.newFrame()
        picture.resize((3, 2)).save(file, "TIFF", tiffinfo={254: 1})
    assert np.array_equal(read_image(tmp_path / "a.tif"), np.asarray(picture))


def test_other_files_with_an_images_name(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")
    with pytest.raises(UnreadableError, match=r"a\.png' .*PostScript"):
        read_image(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_bytes(b"\0\0\0\x24ftypheic" + bytes(50))
    with pytest.raises(UnreadableError, match=r"b\.jpg' is a HEIC"):
        read_image(tmp_path / "b.jpg")


def test_postscript_is_never_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("started"))
    Image.fromarray(samples(3)).save(tmp_path / "a.eps")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.eps").read_bytes())
    with pytest.raises(UnreadableError):
        read_image(tmp_path / "a.png")
    with pytest.raises(UnreadableError):
        image_mode(str(tmp_path / "a.png"))


@pytest.mark.parametrize("error", [RuntimeError, AttributeError, AssertionError])
def test_whatever_a_decoder_raises_is_the_files_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(self: ImageFile.ImageFile) -> None:
        raise error("inside the decoder")

    Image.fromarray(samples(3)).save(tmp_path / "a.png")
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(UnreadableError, match=r"a\.png"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), MemoryError),
        (OSError(errno.EMFILE, "Too many open files"), DataError),
        (OSError(errno.EACCES, "Permission denied"), UnreadableError),
        (OSError(errno.EIO, "Input/output error"), UnreadableError),
    ],
)
def test_a_failure_of_the_machine_is_not_called_damage(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    expected: type[Exception],
) -> None:
    """Sound images would be skipped (DATALOADER.MAX_UNREADABLE) where memory or files run out."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    Image.fromarray(samples(3)).save(tmp_path / "a.png")
    targets: list[tuple[Any, str]] = [(ImageFile.ImageFile, "load"), (PathManager, "open")]
    for target, name in targets:
        with monkeypatch.context() as patch:
            patch.setattr(target, name, fail)
            with pytest.raises(expected) as caught:
                read_image(tmp_path / "a.png")
        assert type(caught.value) is expected
        assert "damaged" not in str(caught.value)
        assert "a.png" in "".join([str(caught.value), *getattr(caught.value, "__notes__", ())])


def test_the_limit_of_large_images_can_be_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500_000)
    path = tmp_path / "a.png"
    Image.new("RGB", (1500, 1000)).save(path)
    with pytest.raises(DataError, match=rf"a\.png' has 2 megapixels.*{MAX_PIXELS}") as caught:
        read_image(path)
    assert not isinstance(caught.value, UnreadableError)
    monkeypatch.setenv(MAX_PIXELS, "2000000")
    assert read_image(path).shape == (1000, 1500, 3)
    monkeypatch.setenv(MAX_PIXELS, "many")
    with pytest.raises(ConfigError, match=MAX_PIXELS):
        read_image(path)


def test_threads_leave_pillows_flag_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    Image.fromarray(samples(3)).save(tmp_path / "a.png")
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with opened_image(tmp_path / "a.png", "image"):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(10)
    with opened_image(tmp_path / "a.png", "image"):
        leave.set()  # The first one leaves before the second.
        thread.join(10)
        assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_the_stuff_map_of_a_panoptic_evaluation_is_an_image(tmp_path: Path, catalogs: None) -> None:
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")
    record = {"file_name": "a.jpg", "sem_seg_file_name": str(tmp_path / "a.png")}
    DatasetCatalog.register("stuff", lambda: [record])
    MetadataCatalog.get("stuff").set(stuff_classes=["a", "b"], ignore_label=255)
    evaluator = StuffEvaluator("stuff", distributed=False)
    evaluator.reset()
    with pytest.raises(UnreadableError, match="PostScript"):
        evaluator.process([record], [{"sem_seg": torch.zeros(2, 8, 8)}])


def test_files_are_opened_in_one_place() -> None:
    """``Image.open`` with all of Pillow's formats is nowhere in the package."""
    package = Path(image_files.__file__).parents[1]
    for path in package.rglob("*.py"):
        for call in re.findall(r"Image\.open\([^)]*\)", path.read_text()):
            assert "formats=" in call, path


def test_text_is_read_and_written_with_an_encoding() -> None:
    """Not with that of the locale, which is another one on Windows."""
    package = Path(image_files.__file__).parents[1]
    for path in package.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            name = ast.unparse(call.func)
            modes = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
            is_text = name in ("open", "PathManager.open") and not any("b" in m for m in modes)
            if is_text or name.endswith((".read_text", ".write_text")):
                assert any(key.arg == "encoding" for key in call.keywords), (path, call.lineno)
