"""`semask import`: label maps in colours and greys, and files that name them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from brought_labels import BLUE, GREEN, RED, halves, label_maps, notes, write_pairs
from semask.data.importers import Options, convert_labels
from semask.data.importers.formats.masks import voc_color
from semask.data.importers.palette import rgb
from semask.errors import DataError


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


def test_file_names_that_are_not_utf_8(tmp_path: Path) -> None:
    maps = {"caf\udce9": halves(RED, GREEN), "b": halves(GREEN, RED)}
    root = write_pairs(tmp_path / "in", maps)
    (root / "palette.json").write_text('{"road": "#c81e1e", "tree": "#1ec81e"}')
    result = convert_labels(root, tmp_path / "out")
    assert set(label_maps(result)) == {"caf\udce9", "b"}
    texts = [path.read_text(encoding="utf-8") for path in result.folder.glob("*.csv")]
    assert any(r"caf\udce9.png" in text for text in texts)


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
    with pytest.raises(DataError, match=r"palette\.csv'.* 0, 128, 255"):
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
