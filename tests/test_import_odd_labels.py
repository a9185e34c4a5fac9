"""`semask import`: labels with gaps, contradictions and surprises, as people bring them."""

import csv
import json
import os
import re
import stat
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
import tifffile
from PIL import Image

import label_sources
from brought_labels import LEFT, halves, label_maps, notes, write_pairs, write_yolo
from semask import load_config
from semask.cli import main
from semask.data.importers import Options, Region, convert_labels
from semask.data.importers.classes import ClassTable
from semask.data.importers.raster import paint
from semask.data.reading import read_image
from semask.errors import ConfigError, DataError


def test_polygons_out_of_the_image(tmp_path: Path) -> None:
    beyond = "1 0.75 -0.5 1.5 -0.5 1.5 1.5 0.75 1.5\n"
    outside = "1 1.2 0.1 1.5 0.1 1.5 0.9\n"
    root = write_yolo(tmp_path / "in", {"a": LEFT + beyond + outside, "b": LEFT})
    result = convert_labels(root, tmp_path / "out")
    expected = np.zeros((20, 40), np.uint8)
    expected[:, :20], expected[:, 30:] = 1, 2
    assert (label_maps(result)["a"] != expected).mean() < 0.03
    assert "beyond the image's edge" in notes(result)
    assert re.search(r"left out,.*'tree': outside the image", notes(result))
    instances = convert_labels(root, tmp_path / "coco", Options(layout="coco"))
    assert [row[2] for row in instances.counts] == [2, 1]
    for path in (instances.folder / "annotations").iterdir():
        for annotation in json.loads(path.read_text())["annotations"]:
            points = np.array(annotation["segmentation"]).reshape(-1, 2)
            assert points.min() >= 0
            assert (points <= [40, 20]).all()


def test_two_spellings_of_one_class(tmp_path: Path) -> None:
    root = label_sources.source(tmp_path, "labelme")
    for index, name in enumerate(("Path", "path ", "PATH")):
        path = root / f"garden_{index}.json"
        path.write_text(path.read_text().replace('"label": "path"', f'"label": "{name}"'))
    result = convert_labels(root, tmp_path / "out")
    assert len(result.classes) == 3
    assert "which is spelt alike" in notes(result)
    assert {name.lower(): images for name, images, _ in result.counts}["path"] == 10


def test_many_regions_of_a_large_image_take_little_memory() -> None:
    """Regions are painted in an order known only when all are drawn."""
    outline = np.array([0, 0, 30, 0, 30, 30, 0, 30], np.float64)
    regions = [Region("car", [outline + shift]) for shift in range(100)]
    table = ClassTable(["car"], [None], {"car": 0}, [0])
    paint(regions[:2], table, 1000, 1000)
    tracemalloc.start()
    labels, _ = paint(regions, table, 1000, 1000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (labels == 0).sum() > 30 * 30
    assert peak < 20e6  # an image is 1 MB, and a mask as well


def test_long_lists_of_images(tmp_path: Path) -> None:
    """YOLO's train.txt: finding the split of an image does not take longer in a longer list."""
    root = write_yolo(tmp_path / "in", {"a": LEFT, "b": LEFT, "c": LEFT})
    others = "".join(f"./images/other_{number}.png\n" for number in range(6000))
    (root / "train.txt").write_text(f"{others}./images/a.png\n/gone/images/b.png\n")
    (root / "val.txt").write_text("./images/c.png\n")
    names = "names: [car, tree]\ntrain: train.txt\nval: val.txt\n"
    (root / "data.yaml").write_text(names)
    start = time.process_time()
    result = convert_labels(root, tmp_path / "out")
    assert time.process_time() - start < 3
    assert result.images == {"train": 2, "val": 1}


@pytest.mark.parametrize("name", ["2024", "None", "a b"])
def test_the_printed_keys_name_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Also a folder whose name looks like a number."""
    monkeypatch.chdir(tmp_path)
    result = convert_labels(write_yolo(tmp_path / "in", {"a": LEFT, "b": LEFT}), name)
    cfg = load_config("own_dataset/semask_small_example", result.config_keys())
    assert name == cfg.DATASETS.FOLDER_ROOT


ODD_VALUES: dict[str, dict[str, Callable[[Any], Any]]] = {
    "coco": {
        "size": lambda content: content["images"][0].update(width="wide"),
        "id": lambda content: content["images"][0].update(id=[1]),
        "category_id": lambda content: content["annotations"][0].update(category_id={}),
        "no object": lambda content: content["annotations"].insert(0, 3),
    },
    "panoptic": {
        "id": lambda content: content["images"][0].update(id=[1]),
        "no segments": lambda content: content["annotations"][0].update(segments_info=None),
        "segment": lambda content: content["annotations"][0]["segments_info"].insert(0, "x"),
        "segment's id": lambda content: content["annotations"][0]["segments_info"][0].pop("id"),
        "no name": lambda content: content["annotations"][0].pop("file_name"),
    },
    "labelme": {
        "size": lambda content: content.update(imageWidth="wide"),
        "shape": lambda content: content["shapes"].insert(0, 3),
    },
    "supervisely": {
        "size": lambda content: content["size"].update(width="wide"),
        "no size": lambda content: content.update(size=3),
        "objects": lambda content: content.update(objects=3),
    },
    "label_studio": {
        "size": lambda content: [
            result.update(original_width="wide")
            for result in content[0]["annotations"][0]["result"]
        ],
        "no value": lambda content: content[0]["annotations"][0]["result"][0].pop("value"),
    },
}


@pytest.mark.parametrize(("kind", "value"), [(k, v) for k in ODD_VALUES for v in ODD_VALUES[k]])
def test_values_of_another_type_are_named(tmp_path: Path, kind: str, value: str) -> None:
    """Refused, or left out where a file is of one image; both with the name of the file."""
    root = label_sources.source(tmp_path, kind)
    files = sorted(root.rglob("*.json"), key=lambda path: (path.parent.name != "ann", path))
    path = next(path for path in files if path.name != "meta.json")
    content = json.loads(path.read_text())
    ODD_VALUES[kind][value](content)
    path.write_text(json.dumps(content))
    try:
        text = notes(convert_labels(root, tmp_path / "out"))
    except DataError as error:
        text = str(error)
    assert path.name in text


def test_a_size_in_cvats_xml_that_is_no_number(tmp_path: Path) -> None:
    root = label_sources.source(tmp_path, "cvat")
    path = next(root.rglob("*.xml"))
    path.write_text(re.sub(r'width="\d+"', 'width="wide"', path.read_text(), count=1))
    with pytest.raises(DataError, match=rf"{path.name}', image .*'wide'"):
        convert_labels(root, tmp_path / "out")


def test_overlapping_polygons(tmp_path: Path) -> None:
    """Without an order in the file, the smaller one lies on top."""
    inner = "1 0.1 0.2 0.4 0.2 0.4 0.8 0.1 0.8\n"
    root = write_yolo(tmp_path / "in", {"a": LEFT + inner, "b": inner + LEFT})
    result = convert_labels(root, tmp_path / "out")
    maps = label_maps(result)
    assert np.array_equal(maps["a"], maps["b"])
    assert maps["a"][10, 10] == 2
    assert maps["a"][1, 1] == 1
    assert "the smaller one lies on top" in notes(result)


def test_empty_files(tmp_path: Path) -> None:
    """Of YOLO, an image without objects; of others, and of images, nothing that can be used."""
    root = write_yolo(tmp_path / "in", {"a": LEFT, "b": "", "c": LEFT, "d": LEFT})
    (root / "images" / "d.png").write_bytes(b"")
    (root / "labels" / "c.txt").unlink()
    result = convert_labels(root, tmp_path / "out")
    maps = label_maps(result)
    assert sorted(maps) == ["a", "b", "c"]
    assert not maps["b"].any()
    assert not maps["c"].any()
    assert re.search(r"left out,.*d\.png", notes(result))
    assert re.search(r"note,.*c\.png,.no label file", notes(result))
    root = label_sources.source(tmp_path, "labelme")
    (root / "garden_3.json").write_text("")
    (root / "garden_4.json").write_text("{")
    result = convert_labels(root, tmp_path / "labelme_out")
    assert sum(result.images.values()) == 8
    assert re.search(r"left out,.*garden_3\.json,.*is empty", notes(result))
    assert re.search(r"left out,.*garden_4\.json,.*not valid JSON", notes(result))


@pytest.mark.parametrize("kind", ["coco", "labelme", "cvat", "masks", "label_studio"])
def test_images_without_labels_and_labels_without_images(tmp_path: Path, kind: str) -> None:
    root = label_sources.source(tmp_path, kind)
    folder = root / label_sources.IMAGE_FOLDERS[kind]
    (folder / "garden_2.jpg").rename(folder / "other.jpg")
    result = convert_labels(root, tmp_path / "out")
    assert sum(result.images.values()) == 9
    listed = list(csv.reader((result.folder / "import_notes.csv").open()))
    left_out = [row[1] for row in listed if row[0] == "left out"]
    assert any("garden_2" in file for file in left_out)
    assert any(file.endswith("other.jpg") for file in left_out)


def test_unknown_class_ids(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "in", {"a": LEFT, "b": LEFT + LEFT.replace("0", "7", 1)})
    with pytest.raises(DataError, match=r"b\.txt', line 2: .* 7.* 0\.\.1"):
        convert_labels(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    root = label_sources.source(tmp_path, "coco")
    path = root / "annotations" / "instances_default.json"
    path.write_text(path.read_text().replace('"category_id": 2', '"category_id": 9', 1))
    with pytest.raises(DataError, match=r"instances_default\.json': annotation .* category id 9"):
        convert_labels(root, tmp_path / "out")


@pytest.mark.parametrize("suffix", [".png", ".jfif", ".avif"])
@pytest.mark.parametrize(
    ("orientation", "labelled"),
    # After a half turn the size is the same: what is labelled is taken for upright.
    [(3, "upright"), (6, "upright"), (6, "stored"), (8, "upright"), (8, "stored")],
)
def test_rotated_images(tmp_path: Path, suffix: str, orientation: int, labelled: str) -> None:
    """Labels of the upright image, or of the pixels as they are stored: the size tells.

    Folders do not have the second format, so that it is copied as .jpg, nor the third, which is
    converted.
    """
    root = tmp_path / "in"
    (root / "images").mkdir(parents=True)
    stored = np.zeros((32, 64, 3), np.uint8)
    stored[:8, :16] = 255  # a white car in the stored image's corner
    for name in ("a", "b"):
        exif = Image.Exif()
        exif[0x0112] = orientation  # saving AVIF removes it
        path = root / "images" / f"{name}{suffix}"
        Image.fromarray(stored).save(path, exif=exif, quality=100, subsampling="4:4:4")
    upright = np.where(read_image(root / "images" / f"a{suffix}") > 127, np.uint8(255), 0)
    shown = upright if labelled == "upright" else stored
    ys, xs = np.nonzero(shown[:, :, 0])
    box = [int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1]
    x, y, w, h = box
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    content = {
        "images": [
            {
                "id": i,
                "file_name": f"{n}{suffix}",
                "width": shown.shape[1],
                "height": shown.shape[0],
            }
            for i, n in enumerate("ab")
        ],
        "categories": [{"id": 1, "name": "car"}],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": box, "segmentation": [polygon]}
            for i in range(2)
        ],
    }
    (root / "instances.json").write_text(json.dumps(content))
    result = convert_labels(root, tmp_path / "out", Options(layout="folder"))
    assert np.array_equal(label_maps(result)["a"], upright[:, :, 0] // 255)
    written_image = next((result.folder / "images").rglob("a.*"))
    assert np.array_equal(read_image(written_image) > 127, upright > 127)
    result = convert_labels(root, tmp_path / "coco")
    written = json.loads((result.folder / "annotations" / "instances_train.json").read_text())
    assert (written["images"][0]["height"], written["images"][0]["width"]) == upright.shape[:2]
    segmentation = written["annotations"][0]["segmentation"]
    if isinstance(segmentation, list):
        segmentation = mask_util.merge(mask_util.frPyObjects(segmentation, *upright.shape[:2]))
    assert np.array_equal(mask_util.decode(segmentation), upright[:, :, 0] // 255)


def test_labels_of_another_size(tmp_path: Path) -> None:
    maps = {"a": halves(0, 1), "b": halves(1, 0), "c": halves(0, 1)}
    root = write_pairs(tmp_path / "in", maps)
    Image.fromarray(halves(0, 1, side=16)).save(root / "masks" / "c.png")
    result = convert_labels(root, tmp_path / "out")
    assert sorted(label_maps(result)) == ["a", "b"]
    assert "for an image of 16x16 pixels (width x height), but the file has 32x32" in notes(result)


def test_two_files_of_one_stem(tmp_path: Path) -> None:
    """Where the labels name files both are kept; where they name stems alone, that is refused."""
    root = write_pairs(tmp_path / "in", {"a": halves(0, 1), "b": halves(1, 0)})
    (root / "images" / "a.jpg").write_bytes((root / "images" / "a.png").read_bytes())
    with pytest.raises(DataError, match=r"a\.jpg' and '.*a\.png'"):
        convert_labels(root, tmp_path / "out")
    root = write_yolo(tmp_path / "yolo", {"a": LEFT, "b": LEFT})
    (root / "images" / "a.bmp").write_bytes((root / "images" / "a.png").read_bytes())
    with pytest.raises(DataError, match=r"a\.bmp' and '.*a\.png'"):
        convert_labels(root, tmp_path / "out")
    root = label_sources.source(tmp_path, "cvat")
    image = root / "images" / "garden_1.jpg"
    Image.open(image).save(image.with_name("garden_0.png"))
    xml = root / "default.xml"
    xml.write_text(xml.read_text().replace('"garden_1.jpg"', '"garden_0.png"'))
    result = convert_labels(root, tmp_path / "out")
    assert {"garden_0_jpg", "garden_0_png"} <= set(label_maps(result))
    assert "named 'garden_0_png' in the output" in notes(result)


def test_an_output_that_is_not_empty(tmp_path: Path) -> None:
    root = label_sources.source(tmp_path, "cvat")
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="out'"):
        convert_labels(root, out)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("kind", ["folder", "link", "link to nothing"])
def test_an_output_that_is_there(tmp_path: Path, kind: str) -> None:
    """A folder, which may be a mount point or a link: the names of the colours stay in it."""
    root = write_pairs(tmp_path / "in", {"a": halves(0, 60, 120), "b": halves(0, 60, 120)})
    out = tmp_path / "out"
    if kind == "link to nothing":
        out.symlink_to(tmp_path / "disk")
        assert convert_labels(root, out, Options(classes=("sky", "lake", "path"))).images.total()
        assert (tmp_path / "disk" / "classes.json").is_file()
        return
    folder = tmp_path / "disk" if kind == "link" else out
    folder.mkdir()
    inode = folder.stat().st_ino
    if kind == "link":
        out.symlink_to(folder, target_is_directory=True)
    palette = out / "palette.csv"
    palette.write_text("0 0 0 sky\n60 60 60 lake\n120 120 120 path\n")
    result = convert_labels(root, out, Options(palette=palette))
    assert result.images.total() == 2
    assert out.is_symlink() == (kind == "link")
    assert folder.stat().st_ino == inode
    expected = ["annotations", "classes.json", "images", "import_notes.csv", "palette.csv"]
    assert sorted(os.listdir(out)) == [*expected, "split.csv"]
    assert "lake" in palette.read_text()
    assert stat.S_IMODE((out / "images").stat().st_mode) == stat.S_IMODE(root.stat().st_mode)


def test_what_killed_imports_leave(tmp_path: Path) -> None:
    """Hidden folders in the output or beside it do not hinder the next import, and are removed."""
    root = label_sources.source(tmp_path, "cvat")
    out, new = tmp_path / "out", tmp_path / "new"
    leftovers = [out / ".out.ab12_xyz.partial", tmp_path / ".new.ab12_xyz.partial"]
    for folder in leftovers:
        (folder / "data").mkdir(parents=True)
    for target in (out, new):
        assert convert_labels(root, target).images.total()
    assert not any(folder.exists() for folder in leftovers)


def test_two_imports_to_one_output(tmp_path: Path) -> None:
    """The first to finish takes the place; the other is refused, and changes nothing."""
    root = label_sources.source(tmp_path, "cvat")
    out = tmp_path / "out"

    def during(images: Any, total: int) -> Iterator[Any]:
        for index, image in enumerate(images):
            if index == 1:
                convert_labels(root, out)
            yield image

    with pytest.raises(ConfigError, match="out'"):
        convert_labels(root, out, progress=during)
    assert (out / "classes.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["out", root.name])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root.mkdir(), "labels of no known format; it has no files"),
        (lambda root: write_yolo(root, {"a": LEFT}), "1 image with labels"),
        (
            lambda root: write_yolo(root, {"a": LEFT, "b": "car 1 2\n"}),
            "1 of 2 images cannot be used.*b.txt', line 1",
        ),
        (lambda root: write_yolo(root, {"a": LEFT}, names="{1: car, 2: tree}"), r"data\.yaml"),
    ],
)
def test_refused(tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    make(tmp_path / "in")
    with pytest.raises(DataError, match=message):
        convert_labels(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_two_formats_in_one_folder(tmp_path: Path) -> None:
    root = label_sources.source(tmp_path, "cvat")
    (root / "data.yaml").write_text("names: [path, bed]\n")
    with pytest.raises(DataError, match=r"several formats: .*--format cvat or --format yolo"):
        convert_labels(root, tmp_path / "out")
    assert convert_labels(root, tmp_path / "out", Options(format="cvat")).format


def test_classes_that_mark_what_does_not_count(tmp_path: Path) -> None:
    root = label_sources.source(tmp_path, "labelme")
    for path in root.glob("*.json"):
        path.write_text(path.read_text().replace('"label": "path"', '"label": "__ignore__"'))
    result = convert_labels(root, tmp_path / "out")
    assert result.classes == ["background", "bed"]
    assert {name: images for name, images, _ in result.counts}["(ignored)"] == 10
    ignored = convert_labels(root, tmp_path / "o2", Options(unlabelled="ignore"))
    assert ignored.classes == ["bed"]
    assert set(np.unique(label_maps(ignored)["garden_0"])) == {0, 255}


@pytest.mark.parametrize("suffix", [".npy", ".tif"])
def test_images_with_bands(tmp_path: Path, suffix: str) -> None:
    """The keys of their channels are measured, and printed with the others."""
    root = write_pairs(tmp_path / "in", {name: halves(0, 255) for name in "abc"})
    rng = np.random.default_rng(0)
    for path in list((root / "images").iterdir()):
        path.unlink()
        values = rng.integers(0, 4096, (32, 32, 5)).astype(np.uint16)
        if suffix == ".npy":
            np.save(path.with_suffix(".npy"), values)
        else:
            tifffile.imwrite(
                path.with_suffix(".tif"), values, photometric="minisblack", planarconfig="contig"
            )
    result = convert_labels(root, tmp_path / "out")
    keys = dict(key.split("=") for key in result.band_keys)
    assert keys["INPUT.VALUE_RANGE"] == "[0,4095]"
    assert np.allclose(json.loads(keys["MODEL.PIXEL_MEAN"]), [127.5] * 5, atol=3)
    assert np.allclose(json.loads(keys["MODEL.PIXEL_STD"]), [73.6] * 5, atol=3)
    arguments = ["--config", "own_dataset/semask_small_example", *result.config_keys()]
    assert main.main(["check", *arguments]) == 0
