"""`semask import`: labels of other tools, as their programs write them and as people bring them."""

import base64
import csv
import io
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
import tifffile
from PIL import Image

import label_sources
from semask.cli import main
from semask.data.datasets.coco_folder import load_coco_folder
from semask.data.importers import FORMATS, Options, Result, convert_labels
from semask.data.importers.formats.masks import voc_color
from semask.data.importers.palette import rgb
from semask.data.reading import read_image, read_label
from semask.errors import ConfigError, DataError

RED, GREEN, BLUE = (200, 30, 30), (30, 200, 30), (30, 30, 200)

KINDS = list(label_sources.IMAGE_FOLDERS)


def label_maps(result: Result) -> dict[str, np.ndarray]:
    """The label maps that were written, by the stems of their names."""
    return {path.stem: read_label(path) for path in (result.folder / "annotations").rglob("*.png")}


def notes(result: Result) -> str:
    """The list of what was left out or changed."""
    return (result.folder / "import_notes.csv").read_text()


# ---- every format, as its own program writes it


def test_every_format_has_a_sample() -> None:
    titles = {name.replace("coco-", "").replace("-", "_") for name in FORMATS}
    assert titles == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_label_maps(tmp_path: Path, kind: str) -> None:
    root = label_sources.source(tmp_path, kind)
    result = convert_labels(root, tmp_path / "out", Options(layout="folder"))
    assert result.images == {"train": 8, "val": 2}
    assert "left out" not in notes(result)
    classes = ["background", "path", "bed"]
    if kind == "panoptic":  # Pixels of no segment do not count.
        classes = classes[1:]
    assert sorted(result.classes) == sorted(classes)
    values = np.array(
        [
            result.classes.index(name) if name in result.classes else 255
            for name in ("background", "path", "bed")
        ],
        np.uint8,
    )
    exact = kind in ("masks", "panoptic")
    maps = label_maps(result)
    for name, expected in label_sources.truth().items():
        # Programs differ in the pixels that a polygon's edge has.
        assert (maps[name] != values[expected]).mean() <= (0 if exact else 0.03), name
        (image,) = (result.folder / "images").rglob(f"{name}.jpg")
        assert image.read_bytes() == (label_sources.FIXTURES / "images" / image.name).read_bytes()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "masks"])
def test_instances(tmp_path: Path, kind: str) -> None:
    root = label_sources.source(tmp_path, kind)
    result = convert_labels(root, tmp_path / "out", Options(layout="coco", val=0.3))
    counts = {name: (images, instances) for name, images, instances in result.counts}
    assert counts == {"path": (10, 10), "bed": (10, 15)}
    folder = result.folder
    truth = label_sources.truth()
    for part in ("train", "val"):
        path = folder / "annotations" / f"instances_{part}.json"
        records = load_coco_folder(str(path), str(folder / "images" / part))
        for record in records:
            assert read_image(record["file_name"]).shape == (72, 96, 3)
            beds = [a for a in record["annotations"] if result.classes[a["category_id"]] == "bed"]
            painted = np.zeros((72, 96), bool)
            for annotation in beds:
                segmentation = annotation["segmentation"]
                if isinstance(segmentation, list):
                    segmentation = mask_util.merge(mask_util.frPyObjects(segmentation, 72, 96))
                painted |= mask_util.decode(segmentation).astype(bool)
            expected = truth[Path(record["file_name"]).stem] == 2
            assert (painted != expected).mean() < 0.02


def test_label_maps_have_no_instances(tmp_path: Path) -> None:
    root = label_sources.source(tmp_path, "masks")
    with pytest.raises(ConfigError, match="--to folder"):
        convert_labels(root, tmp_path / "out", Options(layout="coco"))
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["masks"]


def test_the_part_of_each_image_is_kept_or_chosen_by_name(tmp_path: Path) -> None:
    chosen = []
    for name in ("a", "b"):
        root = label_sources.source(tmp_path / name, "labelme")
        result = convert_labels(root, tmp_path / name / "out", Options(seed=3, val=0.4))
        rows = list(csv.reader((result.folder / "split.csv").open()))[1:]
        chosen.append({Path(row[1]).name: row[0] for row in rows})
        assert all(Path(row[2]).is_file() and Path(row[3]).is_file() for row in rows)
    assert chosen[0] == chosen[1]
    assert sorted(chosen[0].values()) == ["train"] * 6 + ["val"] * 4
    root = label_sources.source(tmp_path / "c", "masks")
    sets = root / "ImageSets" / "Segmentation"
    names = (sets / "default.txt").read_text().split()
    (sets / "train.txt").write_text("\n".join(names[:7]))
    (sets / "val.txt").write_text("\n".join(names[7:]))
    result = convert_labels(root, tmp_path / "c" / "out")
    assert sorted(path.stem for path in (result.folder / "images" / "val").iterdir()) == names[7:]


# ---- other layouts of the same formats


def roboflow(tmp_path: Path) -> Path:
    """COCO as Roboflow exports it: files beside the images, a parent that is a category."""
    root = tmp_path / "roboflow"
    given = label_sources.source(tmp_path, "coco")
    content = json.loads((given / "annotations" / "instances_default.json").read_text())
    for part, numbers in (("train", range(1, 7)), ("valid", range(7, 11))):
        folder = root / part
        folder.mkdir(parents=True)
        images = [entry for entry in content["images"] if entry["id"] in numbers]
        for entry in images:
            (given / "images" / entry["file_name"]).rename(folder / entry["file_name"])
        categories = [{"id": 0, "name": "garden", "supercategory": "none"}] + [
            {**entry, "supercategory": "garden"} for entry in content["categories"]
        ]
        annotations = [a for a in content["annotations"] if a["image_id"] in numbers]
        parts = {"images": images, "categories": categories, "annotations": annotations}
        (folder / "_annotations.coco.json").write_text(json.dumps(parts))
    return root


def roboflow_yolo(tmp_path: Path) -> Path:
    """YOLO as Roboflow exports it: train/images and train/labels, and ../train in data.yaml."""
    root = label_sources.source(tmp_path, "yolo")
    for part, numbers in (("train", "012345"), ("valid", "6789")):
        for kind, suffix in (("images", "jpg"), ("labels", "txt")):
            (root / part / kind).mkdir(parents=True)
            for number in numbers:
                name = f"garden_{number}.{suffix}"
                (root / kind / name).rename(root / part / kind / name)
    text = "train: ../train/images\nval: ../valid/images\nnc: 2\nnames: ['path', 'bed']\n"
    (root / "data.yaml").write_text(text)
    return root


def labelme_with_pixels(tmp_path: Path) -> Path:
    """LabelMe's files alone, with the images inside, one made of other shapes."""
    root = label_sources.source(tmp_path, "labelme")
    for path in root.glob("*.json"):
        content = json.loads(path.read_text())
        image = root / content["imagePath"]
        content["imageData"] = base64.b64encode(image.read_bytes()).decode()
        image.unlink()
        path.write_text(json.dumps(content))
    return root


def label_studio_min(tmp_path: Path) -> Path:
    """Label Studio's JSON_MIN."""
    root = label_sources.source(tmp_path, "label_studio")
    path = root / "project-1.json"
    tasks = []
    for task in json.loads(path.read_text()):
        values = [
            {**result["value"], "original_width": 96, "original_height": 72}
            for result in task["annotations"][0]["result"]
        ]
        tasks.append({"image": task["data"]["image"], "id": task["id"], "tag": values})
    path.write_text(json.dumps(tasks))
    return root


@pytest.mark.parametrize("make", [roboflow, roboflow_yolo, labelme_with_pixels, label_studio_min])
def test_other_layouts(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    result = convert_labels(make(tmp_path), tmp_path / "out", Options(layout="folder"))
    assert sorted(result.classes) == ["background", "bed", "path"]
    assert sum(result.images.values()) == 10
    if "roboflow" in make.__name__:
        assert result.images == {"train": 6, "val": 4}
    order = np.array([result.classes.index(name) for name in ("background", "path", "bed")])
    maps = label_maps(result)
    for name, expected in label_sources.truth().items():
        assert (maps[name] != order[expected]).mean() <= 0.03, name


# ---- kinds of shapes, and of palettes

SQUARE = np.zeros((40, 40), bool)
SQUARE[10:30, 10:30] = True
DISC = np.hypot(*(np.mgrid[:40, :40] + 0.5 - 20)) < 10
RING = SQUARE.copy()
RING[15:25, 15:25] = False


def cvat_shape(root: Path, shape: str) -> None:
    image = f'<image id="0" name="a.png" width="40" height="40">{shape}</image>'
    other = image.replace("a.png", "b.png")
    (root / "annotations.xml").write_text(f"<annotations>{image}{other}</annotations>")


def labelme_shape(root: Path, shape: dict[str, Any]) -> None:
    for name in ("a", "b"):
        content = {"shapes": [{"label": "car", **shape}], "imagePath": f"{name}.png"}
        (root / f"{name}.json").write_text(json.dumps(content))


def label_studio_shape(root: Path, kind: str, value: dict[str, Any]) -> None:
    sizes = {"original_width": 40, "original_height": 40}
    result = {"type": kind, "value": {**value, kind: ["car"]}, **sizes}
    tasks = [
        {"id": 1, "data": {"image": f"s3://b/{name}.png"}, "annotations": [{"result": [result]}]}
        for name in ("a", "b")
    ]
    (root / "export.json").write_text(json.dumps(tasks))


def supervisely_shape(root: Path, shape: dict[str, Any]) -> None:
    (root / "meta.json").write_text(json.dumps({"classes": [{"title": "car"}]}))
    for name in ("a", "b"):
        for kind in ("ann", "img"):
            (root / "ds" / kind).mkdir(parents=True, exist_ok=True)
        (root / f"{name}.png").rename(root / "ds" / "img" / f"{name}.png")
        content = {"size": {"height": 40, "width": 40}, "objects": [{"classTitle": "car", **shape}]}
        (root / "ds" / "ann" / f"{name}.png.json").write_text(json.dumps(content))


def png(mask: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(file, "PNG")
    return file.getvalue()


TURNED = '<box label="car" xtl="10" ytl="10" xbr="30" ybr="30" rotation="90.0"/>'
ELLIPSE = '<ellipse label="car" cx="20" cy="20" rx="10" ry="10"/>'
RUNS = ", ".join(["0, 20"] + ["0, 20"] * 4)  # the first five rows, whole
MASK = f'<mask label="car" rle="{RUNS}" left="10" top="10" width="20" height="5"/>'
CORNERS = [[10, 10], [30, 10], [30, 30], [10, 30]]
HOLE = [[15, 15], [25, 15], [25, 25], [15, 25]]


@pytest.mark.parametrize(
    ("write", "shape", "expected"),
    [
        (cvat_shape, (TURNED,), SQUARE),
        (cvat_shape, (ELLIPSE,), DISC),
        (cvat_shape, (MASK,), SQUARE & (np.arange(40)[:, None] < 15)),
        (labelme_shape, ({"shape_type": "rectangle", "points": [[30, 10], [10, 30]]},), SQUARE),
        (labelme_shape, ({"shape_type": "circle", "points": [[20, 20], [30, 20]]},), DISC),
        (
            labelme_shape,
            (
                {
                    "shape_type": "mask",
                    "points": [[10, 10], [29, 29]],
                    "mask": base64.b64encode(png(RING[10:30, 10:30])).decode(),
                },
            ),
            RING,
        ),
        (
            label_studio_shape,
            ("rectanglelabels", {"x": 75, "y": 25, "width": 50, "height": 50, "rotation": 90}),
            SQUARE,
        ),
        (
            label_studio_shape,
            ("ellipselabels", {"x": 50, "y": 50, "radiusX": 25, "radiusY": 25}),
            DISC,
        ),
        (
            supervisely_shape,
            ({"geometryType": "polygon", "points": {"exterior": CORNERS, "interior": [HOLE]}},),
            RING,
        ),
        (
            supervisely_shape,
            ({"geometryType": "rectangle", "points": {"exterior": [[10, 10], [29, 29]]}},),
            SQUARE,
        ),
    ],
)
def test_kinds_of_shapes(
    tmp_path: Path, write: Callable[..., None], shape: tuple[Any, ...], expected: np.ndarray
) -> None:
    root = tmp_path / "in"
    root.mkdir()
    for name in ("a", "b"):
        Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(root / f"{name}.png")
    write(root, *shape)
    found = label_maps(convert_labels(root, tmp_path / "out"))["a"] == 1
    assert (found != expected).mean() < 0.02
    result = convert_labels(root, tmp_path / "coco", Options(layout="coco"))
    assert result.counts == [("car", 2, 2)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labelmap.txt", "# label:color_rgb:parts:actions\nroad:200,30,30::\ntree:30,200,30::\n"),
        ("class_dict.csv", "name,r,g,b\nroad, 200, 30, 30\ntree, 30, 200, 30\n"),
        ("label_colors.txt", "200 30 30\troad\n30 200 30\ttree\n"),
        ("palette.json", '{"road": [200, 30, 30], "tree": "#1ec81e"}'),
        (
            "classes.json",
            '[{"name": "road", "color": [200, 30, 30]}, {"name": "tree", "color": [30, 200, 30]}]',
        ),
    ],
)
def test_palette_files(tmp_path: Path, name: str, text: str) -> None:
    root = write_pairs(tmp_path / "in", {"a": halves(RED, GREEN), "b": halves(GREEN, RED)})
    (root / name).write_text(text)
    result = convert_labels(root, tmp_path / "out")
    assert result.classes == ["road", "tree"]
    assert np.array_equal(label_maps(result)["a"], halves(0, 1))
    colors = json.loads((result.folder / "classes.json").read_text())["classes"]
    assert [entry["color"] for entry in colors] == [[200, 30, 30], [30, 200, 30]]


@pytest.mark.parametrize("names", ["", "__ignore__\n_background_\ncat\ndog\n"])
def test_pascal_voc(tmp_path: Path, names: str) -> None:
    """Palette images of the twenty classes; with class_names.txt, as LabelMe converts to them."""
    root = tmp_path / "in"
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationObject"):
        (root / folder).mkdir(parents=True)
    palette = [channel for i in range(256) for channel in rgb(voc_color(i))]
    for name in ("a", "b"):
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(root / "JPEGImages" / f"{name}.jpg")
        labels = Image.fromarray(halves(0, 1, 2, 255))
        labels.putpalette(palette)
        labels.save(root / "SegmentationClass" / f"{name}.png")
        labels.save(root / "SegmentationObject" / f"{name}.png")
    if names:
        (root / "class_names.txt").write_text(names)
    result = convert_labels(root, tmp_path / "out")
    expected = ["background", "cat", "dog"] if names else ["background", "aeroplane", "bicycle"]
    assert [name.strip("_") for name in result.classes[:3]] == expected
    assert len(result.classes) == (3 if names else 21)
    assert np.array_equal(label_maps(result)["a"], halves(0, 1, 2, 255))


# ---- what people bring


def write_pairs(
    folder: Path, maps: dict[str, np.ndarray], suffix: str = ".png", **options: Any
) -> Path:
    """images/NAME.png of noise, and masks/NAME of the given pixels."""
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for name, labels in maps.items():
        pixels = rng.integers(0, 256, (*labels.shape[:2], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{name}.png")
        Image.fromarray(labels).save(folder / "masks" / f"{name}{suffix}", **options)
    return folder


def halves(*values: Any, side: int = 32) -> np.ndarray:
    """Columns of equal width, one for each value."""
    columns = np.repeat(np.arange(len(values)), side // len(values))
    return np.array(values, np.uint8)[np.tile(columns, (side, 1))]


def write_yolo(folder: Path, texts: dict[str, str], names: str = "[car, tree]") -> Path:
    """Images of 40 x 20 pixels and their label files; None has no file."""
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    (folder / "data.yaml").write_text(f"names: {names}\n")
    for name, text in texts.items():
        Image.fromarray(np.full((20, 40, 3), 90, np.uint8)).save(folder / "images" / f"{name}.png")
        (folder / "labels" / f"{name}.txt").write_text(text)
    return folder


LEFT = "0 0 0 0.5 0 0.5 1 0 1\n"  # the left half of the image is a car


def test_masks_of_0_and_255(tmp_path: Path) -> None:
    root = write_pairs(tmp_path / "in", {"a": halves(0, 255), "b": halves(255, 0)})
    result = convert_labels(root, tmp_path / "out")
    assert result.classes == ["background", "object"]
    assert np.array_equal(label_maps(result)["a"], halves(0, 1))
    assert {name: pixels for name, _, pixels in result.counts}["object"] == 1024


def test_values_without_names_are_listed_to_be_named_once(tmp_path: Path) -> None:
    root = write_pairs(tmp_path / "in", {"a": halves(0, 128, 255, 255), "b": halves(0, 0, 0, 128)})
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"3 values without names: 0, 128, 255.*palette\.csv"):
        convert_labels(root, out)
    assert [path.name for path in out.iterdir()] == ["palette.csv"]
    palette = out / "palette.csv"
    lines = palette.read_text().splitlines()
    assert lines[1:] == ["0,0,0,,1024,2", "128,128,128,,512,2", "255,255,255,,512,1"]
    with pytest.raises(DataError, match=r"palette\.csv' has no name for 0, 128, 255"):
        convert_labels(root, out, Options(palette=palette))
    for value, name in (("0,0,0", "road"), ("128,128,128", "edge"), ("255,255,255", "ignore")):
        palette.write_text(palette.read_text().replace(f"{value},,", f"{value},{name},"))
    result = convert_labels(root, out, Options(palette=palette))
    assert result.classes == ["road", "edge"]
    assert np.array_equal(label_maps(result)["a"], halves(0, 1, 255, 255))
    assert palette.exists()
    named = convert_labels(root, tmp_path / "o2", Options(classes=("road", "edge", "car")))
    assert np.array_equal(label_maps(named)["a"], halves(0, 1, 2, 2))


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_colours_with_noise_or_soft_edges(tmp_path: Path, suffix: str) -> None:
    sharp = halves(RED, GREEN, BLUE, RED, side=64)
    soft = sharp
    if suffix == ".png":  # enlarged with a soft filter
        small = Image.fromarray(halves(RED, GREEN, BLUE, RED))
        rng = np.random.default_rng(0)
        soft = np.array(small.resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
        soft = (soft + rng.integers(-6, 7, soft.shape)).clip(0, 255).astype(np.uint8)
    options = {"quality": 70} if suffix == ".jpg" else {}
    root = write_pairs(tmp_path / "in", {"a": soft, "b": soft[::-1].copy()}, suffix, **options)
    palette = tmp_path / "palette.txt"
    palette.write_text("200 30 30 road\n30 200 30 tree\n30 30 200 lake\n")
    result = convert_labels(root, tmp_path / "out", Options(palette=palette))
    assert result.classes == ["road", "tree", "lake"]
    # An exact edge cannot be had back, but no edge has a class that is on neither of its sides.
    expected = halves(0, 1, 2, 0, side=64)
    assert (label_maps(result)["a"] != expected).mean() <= 0.05
    assert "compression noise" in notes(result)
    with pytest.raises(DataError, match="3 values without names"):
        convert_labels(root, tmp_path / "unnamed")


@pytest.mark.parametrize("folder", ["masks", "out_pngs"])
def test_the_folder_of_images_is_named(tmp_path: Path, folder: str) -> None:
    """What is below PATH is label maps then, whatever the folder is called."""
    root = write_pairs(tmp_path / "in", {"a": halves(RED, GREEN), "b": halves(GREEN, RED)})
    maps = (root / "masks").rename(root / folder)
    palette = tmp_path / "palette.txt"
    palette.write_text("200 30 30 road\n30 200 30 tree\n")
    options = Options(images=root / "images", palette=palette)
    result = convert_labels(maps, tmp_path / "out", options)
    np.testing.assert_array_equal(label_maps(result)["a"], halves(0, 1))


def test_a_colour_without_a_name_is_refused(tmp_path: Path) -> None:
    root = write_pairs(tmp_path / "in", {"a": halves(RED, GREEN), "b": halves(RED, BLUE)})
    (root / "labelmap.txt").write_text(
        "# label:color_rgb:parts:actions\nroad:200,30,30::\ntree:30,200,30::\n"
    )
    with pytest.raises(DataError, match=r"1 colour that .* not name: \(30, 30, 200\) \(512 pixels"):
        convert_labels(root, tmp_path / "out")


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
    with pytest.raises(
        DataError, match=r"b\.txt', line 2: the class is 7, but the names are 0\.\.1"
    ):
        convert_labels(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    root = label_sources.source(tmp_path, "coco")
    path = root / "annotations" / "instances_default.json"
    path.write_text(path.read_text().replace('"category_id": 2', '"category_id": 9', 1))
    with pytest.raises(DataError, match=r"instances_default\.json': annotation .* category id 9"):
        convert_labels(root, tmp_path / "out")


@pytest.mark.parametrize(
    ("orientation", "labelled"),
    # After a half turn the size is the same: what is labelled is taken for upright.
    [(3, "upright"), (6, "upright"), (6, "stored"), (8, "upright"), (8, "stored")],
)
def test_rotated_images(tmp_path: Path, orientation: int, labelled: str) -> None:
    """Labels of the upright image, or of the pixels as they are stored: the size tells."""
    root = tmp_path / "in"
    (root / "images").mkdir(parents=True)
    stored = np.zeros((20, 40, 3), np.uint8)
    stored[:8, :10] = 255  # a white car in the stored image's corner
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a", "b"):
        Image.fromarray(stored).save(root / "images" / f"{name}.png", exif=exif)
    upright = read_image(root / "images" / "a.png")
    shown = upright if labelled == "upright" else stored
    ys, xs = np.nonzero(shown[:, :, 0])
    box = [int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1]
    x, y, w, h = box
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    content = {
        "images": [
            {"id": i, "file_name": f"{n}.png", "width": shown.shape[1], "height": shown.shape[0]}
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
    with pytest.raises(DataError, match=r"a\.jpg' and '.*a\.png' have the same name"):
        convert_labels(root, tmp_path / "out")
    root = write_yolo(tmp_path / "yolo", {"a": LEFT, "b": LEFT})
    (root / "images" / "a.bmp").write_bytes((root / "images" / "a.png").read_bytes())
    with pytest.raises(DataError, match=r"a\.bmp' and '.*a\.png' have the same name"):
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
    with pytest.raises(ConfigError, match="out' exists and is not empty"):
        convert_labels(root, out)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


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


# ---- from a folder of labels to a trained model


@pytest.mark.parametrize("kind", ["yolo", "labelme", "cvat", "masks", "coco"])
def test_from_labels_to_a_report_with_the_printed_commands(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    label_sources.source(tmp_path, kind)
    monkeypatch.chdir(tmp_path)
    assert main.main(["import", kind, "--output", "garden"]) == 0
    printed = capsys.readouterr().out
    assert "10 images (8 train, 2 val)" in printed
    assert "No problems." in printed
    look, train, _ = (
        shlex.split(line)[1:] for line in printed.splitlines() if line.startswith("  semask ")
    )
    assert printed.splitlines()[-1].startswith("  semask train ")
    assert main.main(look) == 0
    assert list(Path("garden").glob("samples*.png"))
    small = ["SOLVER.MAX_ITER=2", "SOLVER.IMS_PER_BATCH=2", "TEST.EVAL_PERIOD=0"]
    small += ["MODEL.DEVICE=cpu", "DATALOADER.NUM_WORKERS=0", "SOLVER.WARMUP_ITERS=0"]
    small += ["MODEL.SWIN.EMBED_DIM=8", "OUTPUT_DIR=run"]
    small += ["INPUT.MIN_SIZE_TRAIN=(64,)"] if kind == "coco" else ["INPUT.CROP.SIZE=[64, 64]"]
    assert main.main([*train, *small]) == 0
    assert Path("run/model_final.pth").is_file()
    (report,) = Path("run/inference").glob("*/report.html")
    assert "bed" in report.read_text()
