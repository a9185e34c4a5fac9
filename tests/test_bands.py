"""Images of any number of channels and of any range of values, from the file to the prediction."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
import torch
from detectron2.modeling import build_model
from PIL import Image

from semask import InstancePredictor, Predictor, load_config
from semask.checkpoint import SeMaskCheckpointer
from semask.checkpoint.convert import adapt_weight
from semask.cli import main
from semask.data.bands import RGB, ImageReader, read_values, upright_size
from semask.data.mappers.semantic import build_semantic_mapper
from semask.data.reading import read_image
from semask.engine.launch.checks import check_run
from semask.errors import ConfigError, DataError
from semask.ops.apply import apply_fast_paths, select_fast_paths

VALUES = np.random.default_rng(0).integers(0, 4096, (24, 40, 5)).astype(np.uint16)


def save_npy(path: Path) -> Path:
    np.save(path.with_suffix(".npy"), VALUES)
    return path.with_suffix(".npy")


def save_npy_channels_first(path: Path) -> Path:
    np.save(path.with_suffix(".npy"), VALUES.transpose(2, 0, 1))
    return path.with_suffix(".npy")


def save_tiff(path: Path, **options: Any) -> Path:
    options.setdefault("planarconfig", "contig")
    values = VALUES if options["planarconfig"] == "contig" else VALUES.transpose(2, 0, 1)
    tifffile.imwrite(path.with_suffix(".tif"), values, photometric="minisblack", **options)
    return path.with_suffix(".tif")


def save_tiff_in_planes(path: Path) -> Path:
    return save_tiff(path, planarconfig="separate")


def save_tiff_compressed(path: Path) -> Path:
    return save_tiff(path, compression="zlib", predictor=True, tile=(16, 16))


SAVERS = [save_npy, save_npy_channels_first, save_tiff, save_tiff_in_planes, save_tiff_compressed]


@pytest.mark.parametrize("save", SAVERS)
def test_bands_of_16_bits(tmp_path: Path, save: Callable[[Path], Path]) -> None:
    path = save(tmp_path / "a")
    full = ImageReader(5).read(path)
    assert full.dtype == np.float32
    np.testing.assert_allclose(full, VALUES / 257, rtol=1e-6)
    twelve = ImageReader(5, (0, 4095))
    np.testing.assert_allclose(twelve.read(path), VALUES * (255 / 4095), rtol=1e-5)
    clipped = ImageReader(5, (1000, 2000)).read(path)
    assert (clipped.min(), clipped.max()) == (0, 255)
    assert twelve.mode(path) == "5 bands of uint16"
    picture = ImageReader(5, (0, 4095), (4, 2, 0)).read_picture(path)
    assert np.array_equal(picture, np.rint(VALUES[:, :, [4, 2, 0]] * (255 / 4095)))
    with pytest.raises(DataError, match=r"a\..* 6 channels are needed: MODEL\.PIXEL_MEAN"):
        ImageReader(6).read(path)


@pytest.mark.parametrize("library", ["tifffile", "OpenCV"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_rotated_bands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, planar: str
) -> None:
    """The orientation of a TIFF is applied, as to photographs; its size is the upright one."""
    stored = np.arange(24 * 16 * 4, dtype=np.uint8).reshape(24, 16, 4)
    values = stored if planar == "contig" else stored.transpose(2, 0, 1)
    options: dict[str, Any] = {"photometric": "rgb", "extrasamples": ["unspecified"]}
    tag = [(274, "H", 1, 6, True)]
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, values, planarconfig=planar, extratags=tag, **options)
    if library == "OpenCV":
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name == "tifffile" else find(name)
        )
    assert np.array_equal(read_values(path, 4), np.rot90(stored, -1))
    assert upright_size(path) == (24, 16, 4)


def test_photographs_are_read_as_before(tmp_path: Path) -> None:
    """RGB without a range: the very values of ``read_image``, and pictures of them unchanged."""
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(
        tmp_path / "a.jpg", exif=exif
    )
    Image.fromarray(rng.integers(0, 65536, (20, 30)).astype(np.uint16)).save(tmp_path / "b.png")
    cv2.imwrite(str(tmp_path / "c.png"), rng.integers(0, 65536, (20, 30, 3)).astype(np.uint16))
    for path in tmp_path.iterdir():
        image = RGB.read(path)
        assert image.dtype == np.uint8
        assert np.array_equal(image, read_image(path))
        assert RGB.picture(image) is image
    np.save(tmp_path / "d.npy", image)
    assert np.array_equal(RGB.read(tmp_path / "d.npy"), image)


def test_the_lower_byte_of_photographs_is_used_with_a_range(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (20, 30, 3)).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "a.png"), values[:, :, ::-1])  # OpenCV has BGR
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb")
    expected = values * (255 / 4095)
    for name in ("a.png", "a.tif"):
        image = ImageReader(3, (0, 4095)).read(tmp_path / name)
        np.testing.assert_allclose(image, expected, rtol=1e-5)
    Image.fromarray(values[:, :, 0]).save(tmp_path / "grey.png")
    image = ImageReader(3, (0, 4095)).read(tmp_path / "grey.png")
    np.testing.assert_allclose(image, np.repeat(expected[:, :, :1], 3, axis=2), rtol=1e-5)


def test_grey_is_one_channel(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (20, 30), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(grey).save(tmp_path / "grey.png", exif=exif)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / "rgb.png")
    reader = ImageReader(1)
    assert np.array_equal(reader.read(tmp_path / "grey.png")[:, :, 0], np.rot90(grey, -1))
    np.testing.assert_allclose(reader.read(tmp_path / "deep.png")[:, :, 0], grey, rtol=1e-6)
    expected = np.asarray(Image.open(tmp_path / "rgb.png").convert("L"))
    assert np.array_equal(reader.read(tmp_path / "rgb.png")[:, :, 0], expected)
    picture = reader.read_picture(tmp_path / "rgb.png")
    assert np.array_equal(picture, np.repeat(expected[:, :, None], 3, axis=2))


@pytest.mark.parametrize("suffix", [".npy", ".tif"])
def test_values_without_a_known_range(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    values = np.linspace(-1, 1, 2 * 3 * 4).reshape(2, 3, 4).astype(np.float32)
    values[0, 0, 0] = np.nan
    if suffix == ".npy":
        np.save(path, values)
    else:
        tifffile.imwrite(path, values, photometric="minisblack", planarconfig="contig")
    with pytest.raises(DataError, match=r"a\..* float32 values.*INPUT\.VALUE_RANGE"):
        ImageReader(4).read(path)
    image = ImageReader(4, (-1, 1)).read(path)
    assert image[0, 0, 0] == 0
    assert image[-1, -1, -1] == 255


def test_damaged_files(tmp_path: Path) -> None:
    for name in ("a.npy", "a.tif"):
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(DataError, match=f"Cannot read image '.*{name}'"):
            read_values(tmp_path / name, 5)
    np.save(tmp_path / "b.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"b\.npy"):
        read_values(tmp_path / "b.npy", 5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["INPUT.VALUE_RANGE", "[4095, 0]"], "INPUT.VALUE_RANGE"),
        (["INPUT.VALUE_RANGE", "[1]"], "INPUT.VALUE_RANGE"),
        (["INPUT.PICTURE_BANDS", "[0, 1, 3]"], "INPUT.PICTURE_BANDS"),
        (["INPUT.PICTURE_BANDS", "[0, 1]"], "INPUT.PICTURE_BANDS"),
        (["MODEL.PIXEL_MEAN", "[0, 0]"], "MODEL.PIXEL_STD"),
        (["MODEL.PIXEL_MEAN", "[]"], "MODEL.PIXEL_MEAN"),
    ],
)
def test_keys_that_cannot_be_used(overrides: list[str], message: str) -> None:
    cfg = load_config("scenes/semask_scenes", [*overrides, "MODEL.DEVICE", "cpu"])
    refuse: Any = check_run if "PIXEL" in message else build_semantic_mapper
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        refuse(cfg) if refuse is check_run else refuse(cfg, True)


# ---- pre-trained weights


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 6, 13])
def test_weights_of_rgb_follow_the_rule_of_timm(channels: int) -> None:
    manipulate = pytest.importorskip("timm.models._manipulate")
    weight = torch.randn(8, 3, 4, 4)
    expected = manipulate.adapt_input_conv(channels, weight.clone())
    torch.testing.assert_close(adapt_weight(weight, channels), expected)


def small_model(*overrides: Any) -> torch.nn.Module:
    keys = ["MODEL.SWIN.EMBED_DIM", 8, "MODEL.SWIN.NUM_HEADS", [1, 1, 2, 2], "MODEL.DEVICE", "cpu"]
    cfg = load_config("scenes/semask_scenes", [str(key) for key in (*keys, *overrides)])
    return apply_fast_paths(build_model(cfg), select_fast_paths(cfg))


def test_a_pretrained_backbone_starts_models_of_other_channels(tmp_path: Path) -> None:
    rgb = small_model()
    stem = "backbone.encoder.stem.patch_embed.proj.weight"
    names = [name for name in rgb.state_dict() if name.endswith("patch_embed.proj.weight")]
    assert len(names) == 1
    stem = names[0]
    backbone = {
        name: value
        for name, value in rgb.state_dict().items()
        if name.startswith("backbone.encoder.")
    }
    torch.save({"model": backbone}, tmp_path / "swin.pth")
    for channels in (1, 5):
        numbers = [100.0] * channels
        model = small_model("MODEL.PIXEL_MEAN", numbers, "MODEL.PIXEL_STD", numbers)
        SeMaskCheckpointer(model).load(str(tmp_path / "swin.pth"))
        found = model.state_dict()
        assert torch.equal(found[stem], adapt_weight(backbone[stem], channels))
        others = [name for name in backbone if name != stem]
        assert all(torch.equal(found[name], backbone[name]) for name in others)


# ---- whole runs


def write_folder(folder: Path, channels: int, suffix: str) -> None:
    """The own-folder layout: in the right half, the last channel is bright."""
    rng = np.random.default_rng(0)
    for part, number in (("train", 4), ("val", 2)):
        for kind in ("images", "annotations"):
            (folder / kind / part).mkdir(parents=True)
        for index in range(number):
            values = rng.integers(0, 2000, (40, 48, channels)).astype(np.uint16)
            values[:, 24:, -1] += 2000
            labels = np.zeros((40, 48), np.uint8)
            labels[:, 24:] = 1
            path = folder / "images" / part / f"{index}{suffix}"
            if suffix == ".npy":
                np.save(path, values)
            elif suffix == ".tif":
                tifffile.imwrite(path, values, photometric="minisblack", planarconfig="contig")
            else:
                Image.fromarray(values[:, :, 0]).save(path)
            Image.fromarray(labels).save(folder / "annotations" / part / f"{index}.png")


@pytest.mark.parametrize(
    ("channels", "suffix", "config"),
    [
        (5, ".tif", "own_dataset/semask_small_example"),
        (4, ".npy", "own_dataset/semask_small_example"),
        (1, ".png", "own_dataset/semask_small_example"),
        (6, ".npy", "mask"),
    ],
)
def test_training_and_predicting(
    tmp_path: Path,
    channels: int,
    suffix: str,
    config: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "data", channels, suffix)
    keys = {
        "DATASETS.FOLDER_ROOT": "data",
        "DATASETS.FOLDER_CLASSES": ["left", "right"],
        "MODEL.PIXEL_MEAN": [100.0] * channels,
        "MODEL.PIXEL_STD": [60.0] * channels,
        "INPUT.VALUE_RANGE": [0, 4095],
        "MODEL.DEVICE": "cpu",
        "MODEL.SWIN.EMBED_DIM": 8,
        "SOLVER.MAX_ITER": 2,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.WARMUP_ITERS": 0,
        "TEST.EVAL_PERIOD": 0,
        "DATALOADER.NUM_WORKERS": 0,
        "OUTPUT_DIR": "run",
    }
    if channels >= 3:
        keys["INPUT.PICTURE_BANDS"] = [2, 1, channels - 1]
    if config == "mask":  # another pipeline: Pillow's resizing, padding to squares
        config = "own_dataset/semask_small_example"
        keys |= {
            "INPUT.DATASET_MAPPER_NAME": "mask_former_semantic",
            "INPUT.MIN_SIZE_TRAIN": "(40,)",
            "INPUT.MIN_SIZE_TEST": 40,
            "INPUT.SIZE_DIVISIBILITY": 64,
        }
    keys["INPUT.CROP.SIZE"] = [32, 64]
    pairs = [f"{key}={value}" for key, value in keys.items()]
    assert main.main(["check", "--config", config, *pairs, "--picture", "look.png"]) == 0
    printed = capsys.readouterr().out
    assert "No problems." in printed
    assert f"{channels} band" in printed
    assert main.main(["train", config, *pairs]) == 0
    assert list(Path("run/inference").glob("*/report.html"))
    assert Path("run/panels.png").is_file()
    predictor = Predictor("run/config.yaml", "run/model_final.pth")
    file = Path(f"data/images/val/0{suffix}")
    prediction = predictor(file)
    assert prediction.image.shape == (40, 48, 3)
    assert prediction.labels.shape == (40, 48)
    again = predictor(read_values(file, channels))
    assert np.array_equal(again.labels, prediction.labels)
    assert np.array_equal(again.image, prediction.image)
    (first, *_) = [p for path, p in predictor.predict_folder(file.parent) if path.stem == "0"]
    assert np.array_equal(first.labels, prediction.labels)
    with pytest.raises(DataError, match=r"MODEL\.PIXEL_MEAN"):
        predictor(np.zeros((40, 48, channels + 1), np.uint16))


def test_instances_in_images_of_bands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tiny_instances

    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        folder = tmp_path / "data" / "images" / part
        folder.mkdir(parents=True)
        annotations = [[tiny_instances.box_annotation(10, 12, 20, 16)] for _ in range(2)]
        tiny_instances.write_dataset(tmp_path / part, annotations)
        content = (tmp_path / part / "instances.json").read_text()
        names = sorted(path.name for path in (tmp_path / part).rglob("*.png"))
        for name in names:
            values = rng.integers(0, 256, (tiny_instances.SIDE, tiny_instances.SIDE, 4))
            np.save(folder / name.replace(".png", ".npy"), values.astype(np.uint8))
        target = tmp_path / "data" / "annotations" / f"instances_{part}.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(content.replace(".png", ".npy"))
    keys = {
        **tiny_instances.SMALL_MODEL,
        "DATASETS.FOLDER_ROOT": "data",
        "MODEL.PIXEL_MEAN": [100.0] * 4,
        "MODEL.PIXEL_STD": [60.0] * 4,
        "INPUT.MIN_SIZE_TRAIN": "(64,)",
        "SOLVER.MAX_ITER": 1,
        "SOLVER.WARMUP_ITERS": 0,
        "TEST.EVAL_PERIOD": 0,
        "OUTPUT_DIR": "run",
    }
    pairs = [f"{key}={value}" for key, value in keys.items()]
    config = "own_dataset/semask_coco_small_example"
    assert main.main(["check", "--config", config, *pairs, "--picture", "look.png"]) == 0
    assert main.main(["train", config, *pairs]) == 0
    predictor = InstancePredictor("run/config.yaml", "run/model_final.pth")
    (file, *_) = sorted((tmp_path / "data" / "images" / "val").iterdir())
    assert predictor(file).image.shape == (64, 64, 3)


def test_networks_of_timm() -> None:
    pytest.importorskip("timm")
    cfg = load_config(
        "scenes/semask_scenes",
        ["MODEL.BACKBONE.NAME", "SeMaskTimm", "MODEL.TIMM.NAME", "resnet18", "MODEL.DEVICE", "cpu"]
        + ["MODEL.PIXEL_MEAN", "[9.0, 9.0, 9.0, 9.0]", "MODEL.PIXEL_STD", "[1.0, 1.0, 1.0, 1.0]"],
    )
    model = build_model(cfg).eval()
    with torch.no_grad():
        (output,) = model([{"image": torch.zeros(4, 40, 50), "height": 40, "width": 50}])
    assert output["sem_seg"].shape[1:] == (40, 50)
