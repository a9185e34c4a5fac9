"""Reading images and label maps: every usual kind of file, and every broken one."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFile

from semask.data import reading
from semask.data.reading import (
    check_label_values,
    check_same_size,
    read_image,
    read_label,
    register_label_map,
)
from semask.errors import DataError


@pytest.fixture(autouse=True)
def no_leftover_label_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LABEL_MAPS", dict(reading.LABEL_MAPS))


def noise(*shape: int, high: int = 256, dtype: type = np.uint8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, shape).astype(dtype)


def save(path: Path, pixels: np.ndarray, mode: str | None = None, **options: Any) -> Path:
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def grey_png(path: Path, bits: int, values: list[int]) -> Path:
    """A one-row grey PNG of less than 8 bits a pixel, which Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    packed = 0
    for value in values:
        packed = packed << bits | value
    row = b"\0" + packed.to_bytes(len(values) * bits // 8, "big")
    header = struct.pack(">IIBBBBB", len(values), 1, bits, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(row))
        + chunk(b"IEND", b"")
    )
    return path


# ---- images ----


def test_rgb_image_is_read_as_it_is(tmp_path: Path) -> None:
    pixels = noise(5, 7, 3)
    image = read_image(save(tmp_path / "a.png", pixels))
    assert image.dtype == np.uint8
    assert image.flags.writeable
    assert np.array_equal(image, pixels)


def test_grey_image_has_three_equal_channels(tmp_path: Path) -> None:
    pixels = noise(5, 7)
    assert np.array_equal(read_image(save(tmp_path / "a.png", pixels)), np.dstack([pixels] * 3))


def test_bilevel_image_is_black_and_white(tmp_path: Path) -> None:
    pixels = noise(5, 8, high=2).astype(bool)
    image = read_image(save(tmp_path / "a.png", pixels))
    assert np.array_equal(image, np.dstack([np.where(pixels, 255, 0)] * 3))


@pytest.mark.parametrize("transparency", [None, bytes([0, 128, 255])])
def test_palette_image_gives_the_palettes_colours(
    tmp_path: Path, transparency: bytes | None
) -> None:
    indices, colours = noise(5, 7, high=3), noise(3, 3, seed=1)
    picture = Image.fromarray(indices).convert("P")
    picture.putdata(indices.ravel().tolist())
    picture.putpalette(colours.ravel().tolist())
    options: dict[str, Any] = {} if transparency is None else {"transparency": transparency}
    picture.save(tmp_path / "a.png", **options)
    assert np.array_equal(read_image(tmp_path / "a.png"), colours[indices])


def test_transparency_is_dropped(tmp_path: Path) -> None:
    pixels = noise(5, 7, 4)
    assert np.array_equal(read_image(save(tmp_path / "a.png", pixels)), pixels[:, :, :3])
    assert np.array_equal(
        read_image(save(tmp_path / "b.png", pixels[:, :, :2])), np.dstack([pixels[:, :, 0]] * 3)
    )


@pytest.mark.parametrize("suffix", ["tif", "jpg"])
def test_cmyk_image(tmp_path: Path, suffix: str) -> None:
    inks = np.full((16, 16, 4), (200, 30, 90, 60), np.uint8)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(inks, "CMYK").save(path)
    expected = (255 - inks[0, 0, :3].astype(int)) * (255 - 60) / 255
    image = read_image(path)
    assert image.shape == (16, 16, 3)
    assert np.abs(image - expected).max() <= (1 if suffix == "tif" else 4)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_images_keep_their_upper_bits(tmp_path: Path, suffix: str) -> None:
    grey, colour = (noise(*shape, high=65536, dtype=np.uint16) for shape in [(5, 7), (5, 7, 3)])
    cv2.imwrite(str(tmp_path / f"grey.{suffix}"), grey)
    cv2.imwrite(str(tmp_path / f"colour.{suffix}"), colour[:, :, ::-1])
    assert np.array_equal(read_image(tmp_path / f"grey.{suffix}"), np.dstack([grey >> 8] * 3))
    assert np.array_equal(read_image(tmp_path / f"colour.{suffix}"), colour >> 8)


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [
        ("png", np.uint8),
        ("jpg", np.uint8),
        ("tif", np.uint8),
        ("png", np.uint16),
        ("tif", np.uint16),
    ],
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(
    tmp_path: Path, suffix: str, dtype: type, orientation: int
) -> None:
    stored = np.repeat(np.repeat(noise(2, 3, high=250), 16, 0), 16, 1)
    # What the EXIF standard says about the stored rows and columns.
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.T,
        6: stored.T[:, ::-1],
        7: stored.T[::-1, ::-1],
        8: stored.T[::-1],
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    pixels: np.ndarray = stored.astype(dtype) * (257 if dtype == np.uint16 else 1)
    image = read_image(save(tmp_path / f"a.{suffix}", pixels, exif=exif))
    assert image.shape == (*upright.shape, 3)
    assert np.abs(image[:, :, 0].astype(int) - upright).max() <= (2 if suffix == "jpg" else 0)


def test_unreadable_exif_does_not_cost_the_image(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pixels = noise(5, 7, 3)
    path = save(tmp_path / "a.png", pixels, exif=b"Exif\0\0rubbish!")
    assert np.array_equal(read_image(path), pixels)
    assert str(path) in caplog.text


def test_32_bit_images_are_refused(tmp_path: Path) -> None:
    for dtype in (np.int32, np.float32):
        path = save(tmp_path / "a.tif", noise(5, 7, dtype=dtype))
        with pytest.raises(DataError, match=r"a\.tif.*32-bit.*8 or 16 bits"):
            read_image(path)


# ---- broken files ----


@pytest.mark.parametrize("read", [read_image, read_label])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.3, 0.95])
@pytest.mark.parametrize("told_to_fill", [False, True])
def test_truncated_file_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read: Callable[..., np.ndarray],
    suffix: str,
    keep: float,
    told_to_fill: bool,
) -> None:
    path = save(tmp_path / f"a.{suffix}", noise(64, 64))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", told_to_fill)
    with pytest.raises(DataError, match=rf"a\.{suffix}': .+ damaged, incomplete.* again"):
        read(path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is told_to_fill


@pytest.mark.parametrize("read", [read_image, read_label])
def test_missing_and_wrong_files(tmp_path: Path, read: Callable[..., np.ndarray]) -> None:
    with pytest.raises(DataError, match=r"none\.png'"):
        read(tmp_path / "none.png")
    (tmp_path / "notes.png").write_text("not an image")
    with pytest.raises(DataError, match=r"notes\.png'.* unknown format"):
        read(tmp_path / "notes.png")
    with pytest.raises(DataError, match=tmp_path.name):
        read(tmp_path)


# ---- label maps ----


def test_grey_label(tmp_path: Path) -> None:
    values = noise(5, 7)
    label = read_label(str(save(tmp_path / "a.png", values)))
    assert label.dtype == np.uint8
    assert label.flags.writeable
    assert np.array_equal(label, values)


@pytest.mark.parametrize("classes", [2, 4, 16, 256])
def test_palette_label_gives_indices(tmp_path: Path, classes: int) -> None:
    indices = noise(6, 8, high=classes)
    picture = Image.fromarray(indices).convert("P")
    picture.putdata(indices.ravel().tolist())
    picture.putpalette(noise(classes, 3, seed=1).ravel().tolist())
    picture.save(tmp_path / "a.png")
    assert np.array_equal(read_label(tmp_path / "a.png"), indices)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_labels_of_few_bits_are_not_stretched(tmp_path: Path, bits: int) -> None:
    values = [index % 2**bits for index in range(16)]
    assert read_label(grey_png(tmp_path / "a.png", bits, values)).tolist() == [values]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_label_that_fits(tmp_path: Path, suffix: str) -> None:
    values = noise(5, 7, dtype=np.uint16)
    label = read_label(save(tmp_path / f"a.{suffix}", values))
    assert label.dtype == np.uint8
    assert np.array_equal(label, values)


def test_16_bit_label_that_does_not_fit(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", np.array([[3, 300]], np.uint16))
    with pytest.raises(DataError, match=r"a\.png.*from 3 to 300.*0\.\.255"):
        read_label(path)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_label_with_several_channels_is_refused(tmp_path: Path, channels: int) -> None:
    path = save(tmp_path / "a.png", noise(5, 7, channels))
    with pytest.raises(DataError, match=rf"a\.png' has {channels} channels.* one.* indices"):
        read_label(path)


def test_float_label_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tif", noise(5, 7).astype(np.float32))
    with pytest.raises(DataError, match=r"a\.tif' has float32 values"):
        read_label(path)


def test_label_map_by_name(tmp_path: Path) -> None:
    register_label_map("one_based", [255, *range(150)])
    raw = noise(5, 7, high=151)
    label = read_label(save(tmp_path / "a.png", raw), "one_based")
    assert label.dtype == np.uint8
    assert np.array_equal(label, np.where(raw == 0, 255, raw.astype(int) - 1))


def test_label_map_is_the_same_for_every_type_of_file(tmp_path: Path) -> None:
    table = {value: 255 - value for value in range(0, 256, 2)}
    register_label_map("even", table)
    raw = noise(5, 7, high=128) * 2
    narrow, wide = save(tmp_path / "a.png", raw), save(tmp_path / "b.png", raw.astype(np.uint16))
    assert np.array_equal(read_label(narrow, "even"), 255 - raw)
    assert np.array_equal(read_label(wide, "even"), 255 - raw)
    raw[2, 3] = 9
    for path in (save(tmp_path / "c.png", raw), save(tmp_path / "d.png", raw.astype(np.uint16))):
        with pytest.raises(DataError, match=rf"{path.name}.*'even': 9 \(1 pixel\)"):
            read_label(path, "even")


def test_label_map_of_16_bit_values(tmp_path: Path) -> None:
    table = np.full(2000, 255)
    table[[7, 1999]] = 0, 1
    register_label_map("wide", table)
    path = save(tmp_path / "a.png", np.array([[7, 8, 1999]], np.uint16))
    assert read_label(path, "wide").tolist() == [[0, 255, 1]]


def test_label_map_of_a_bilevel_file(tmp_path: Path) -> None:
    register_label_map("swap", [1, 0])
    path = save(tmp_path / "a.png", np.array([[False, True]]))
    assert read_label(path, "swap").tolist() == [[1, 0]]


def test_label_map_refusals(tmp_path: Path) -> None:
    register_label_map("tiny", [255, 0])
    register_label_map("tiny", np.array([255, 0]))
    path = save(tmp_path / "a.png", np.array([[0, 1, 2]], np.uint8))
    with pytest.raises(DataError, match=r"a\.png.* from 0 to 2.*'tiny' is for 0\.\.1"):
        read_label(path, "tiny")
    with pytest.raises(DataError, match=r"a\.png.*'tyni'.*registered are: .*tiny"):
        read_label(path, "tyni")
    with pytest.raises(ValueError, match="'tiny'"):
        register_label_map("tiny", [255, 1])
    tables: list[Any] = [[0, 256], [-1], [], [[0]], [0.5]]
    for table in tables:
        with pytest.raises(ValueError, match="'bad'"):
            register_label_map("bad", table)


def test_a_changed_table_does_not_change_the_registered_one(tmp_path: Path) -> None:
    table = np.array([5, 6], np.uint8)
    register_label_map("own", table)
    table[:] = 0
    path = save(tmp_path / "a.png", np.array([[0, 1]], np.uint8))
    assert read_label(path, "own").tolist() == [[5, 6]]


# ---- checks ----


def test_check_label_values() -> None:
    check_label_values(np.array([[0, 10, 255]], np.uint8), 11, 255, "a.png")
    label = np.array([[0, 10, 11, 11, 254, 255]], np.uint8)
    with pytest.raises(
        DataError, match=r"a\.png.*11 \(2 pixels\), 254 \(1 pixel\).*0\.\.10 and 255"
    ):
        check_label_values(label, 11, 255, "a.png")
    with pytest.raises(DataError, match=r"a\.png.*255 \(1 pixel\)"):
        check_label_values(label, 255, 0, "a.png")
    with pytest.raises(DataError, match=r"and 190 more"):
        check_label_values(np.arange(256, dtype=np.uint8)[None], 55, 255, "a.png")


def test_check_same_size() -> None:
    image = np.zeros((4, 6, 3), np.uint8)
    check_same_size(image, np.zeros((4, 6), np.uint8), "a.jpg", "a.png")
    with pytest.raises(DataError, match=r"a\.jpg' is 6x4 .*a\.png' is 4x6"):
        check_same_size(image, np.zeros((6, 4), np.uint8), "a.jpg", "a.png")


def test_real_samples_are_read_as_opencv_reads_them(shared: Path) -> None:
    samples = shared / "data" / "samples"
    images = sorted(samples.rglob("*.jpg"))[:6]
    labels = sorted(samples.rglob("annotations/**/*.png"))[:6]
    assert images
    assert labels
    for path in images:
        expected = np.asarray(cv2.imread(str(path)))[:, :, ::-1]
        difference = read_image(path).astype(int) - expected
        assert np.abs(difference).mean() < 1  # the JPEG decoders round differently
    for path in labels:
        expected = np.asarray(cv2.imread(str(path), cv2.IMREAD_UNCHANGED))
        assert np.array_equal(read_label(path), expected)
