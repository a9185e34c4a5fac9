"""Datasets that lie in two folders: pairing, CamVid, and what the user is told."""

import itertools
from pathlib import Path
from typing import Any

import pytest

import semask  # noqa: F401  (makes Detectron2 importable)

# isort: split
from detectron2.data import DatasetCatalog, MetadataCatalog

from semask.data.datasets import load_sem_seg_pairs, register_sem_seg
from semask.data.datasets.camvid import CLASSES_AND_COLORS, register_camvid
from semask.data.reading import check_label_values, read_image, read_label
from semask.errors import DataError

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def make_files(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def pairs(folder: Path, *arguments: Any, **keywords: Any) -> list[dict[str, Any]]:
    return load_sem_seg_pairs(str(folder / "img"), str(folder / "lab"), *arguments, **keywords)


# ---- pairing ----


def test_pairs_are_sorted_and_complete(tmp_path: Path) -> None:
    make_files(tmp_path, "img/b.jpg", "img/a.jpg", "img/c/a.jpg", "img/notes.txt", "img/._a.jpg")
    make_files(tmp_path, "lab/c/a.png", "lab/a.png", "lab/b.png", "lab/.DS_Store")
    assert pairs(tmp_path) == [
        {
            "file_name": str(tmp_path / "img" / f"{name}.jpg"),
            "sem_seg_file_name": str(tmp_path / "lab" / f"{name}.png"),
        }
        for name in ("a", "b", "c/a")
    ]


def test_suffixes_of_cityscapes(tmp_path: Path) -> None:
    make_files(tmp_path, "img/ulm/ulm_0_leftImg8bit.png", "img/ulm/ulm_1_leftImg8bit.png")
    make_files(tmp_path, "lab/ulm/ulm_0_gtFine_labelIds.png", "lab/ulm/ulm_1_gtFine_labelIds.png")
    make_files(tmp_path, "lab/ulm/ulm_0_gtFine_color.png", "lab/ulm/ulm_0_gtFine_polygons.json")
    found = pairs(tmp_path, "_leftImg8bit.png", "_gtFine_labelIds.png", label_map="cityscapes")
    assert [Path(d["file_name"]).name for d in found] == [
        "ulm_0_leftImg8bit.png",
        "ulm_1_leftImg8bit.png",
    ]
    assert {d["label_map"] for d in found} == {"cityscapes"}


def test_several_suffixes_in_any_case(tmp_path: Path) -> None:
    make_files(tmp_path, "img/a.JPG", "img/b.jpeg", "img/c.png", "lab/a.png", "lab/b.PNG")
    make_files(tmp_path, "lab/c.png")
    found = pairs(tmp_path, (".jpg", ".jpeg", ".png"))
    assert [Path(d["file_name"]).name for d in found] == ["a.JPG", "b.jpeg", "c.png"]


@pytest.mark.parametrize("missing", ["img", "lab"])
def test_missing_folder(tmp_path: Path, missing: str) -> None:
    make_files(tmp_path, "img/a.jpg", "lab/a.png")
    (tmp_path / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=f"no folder '.*/{missing}'") as info:
        pairs(tmp_path, hint="Look in the attic.")
    assert str(info.value).endswith("Look in the attic.")


@pytest.mark.parametrize("empty", ["img", "lab"])
def test_empty_folder(tmp_path: Path, empty: str) -> None:
    make_files(tmp_path, "img/a.jpg", "lab/a.png", f"{empty}/b.txt")
    for path in (*(tmp_path / empty).glob("a.*"),):
        path.unlink()
    with pytest.raises(DataError, match=rf"/{empty}' has no (images|label maps) \(\*\.(jpg|png)\)"):
        pairs(tmp_path)


def test_files_without_counterpart(tmp_path: Path) -> None:
    make_files(tmp_path, *(f"img/{i}.jpg" for i in range(9)), "lab/8.png", "lab/x.png")
    with pytest.raises(DataError) as info:
        pairs(tmp_path)
    text = str(info.value)
    assert "8 (0, 1, 2, 3, 4 and 3 more) in" in text
    assert "without a label map" in text
    assert "1 (x) in" in text
    assert "without an image" in text


def test_ambiguous_names(tmp_path: Path) -> None:
    make_files(tmp_path, "img/a.jpg", "img/a.png", "lab/a.png")
    with pytest.raises(DataError, match="suffix"):
        pairs(tmp_path, (".jpg", ".png"))


# ---- registering ----


@pytest.fixture
def name() -> Any:
    name = "test_camvid_own_dataset"
    yield name
    for catalog in (DatasetCatalog, MetadataCatalog):
        if name in catalog:
            catalog.remove(name)


def test_registering_loads_nothing_and_may_be_repeated(name: str) -> None:
    calls = itertools.count()
    for _ in range(2):
        register_sem_seg(
            name, lambda: [{"call": next(calls)}], ["a", "b"], [(1, 2, 3), (4, 5, 6)], extra="x"
        )
    assert DatasetCatalog.get(name) == [{"call": 0}]
    metadata = MetadataCatalog.get(name)
    assert metadata.stuff_classes == ["a", "b"]
    assert metadata.stuff_colors == [[1, 2, 3], [4, 5, 6]]
    assert (metadata.ignore_label, metadata.evaluator_type, metadata.extra) == (255, "sem_seg", "x")


def test_a_name_stands_for_one_dataset(name: str) -> None:
    register_sem_seg(name, list, ["a"], [(1, 2, 3)], image_root="here")
    with pytest.raises(ValueError, match="stuff_classes"):
        register_sem_seg(name, list, ["b"], [(1, 2, 3)], image_root="here")
    with pytest.raises(ValueError, match="image_root"):
        register_sem_seg(name, list, ["a"], [(1, 2, 3)], image_root="there")


def test_a_colour_for_each_class(name: str) -> None:
    with pytest.raises(ValueError, match=r"2 .*1 "):
        register_sem_seg(name, list, ["a", "b"], [(1, 2, 3)])
    assert name not in DatasetCatalog


def test_registering_camvid_again_is_harmless() -> None:
    register_camvid()
    assert MetadataCatalog.get("camvid_sem_seg_val").stuff_classes == list(CLASSES_AND_COLORS)


# ---- CamVid ----


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_camvid_metadata(split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_files(tmp_path, f"camvid/images/{split}/a.jpg", f"camvid/annotations/{split}/a.png")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert len(DatasetCatalog.get(f"camvid_sem_seg_{split}")) == 1
    metadata = MetadataCatalog.get(f"camvid_sem_seg_{split}")
    assert " ".join(metadata.stuff_classes) == (
        "sky building pole road pavement tree sign_symbol fence car pedestrian bicyclist"
    )
    assert len({tuple(color) for color in metadata.stuff_colors}) == 11
    assert metadata.ignore_label == 255
    assert metadata.evaluator_type == "sem_seg"
    assert metadata.image_root == str(tmp_path / "camvid" / "images" / split)
    assert metadata.sem_seg_root == str(tmp_path / "camvid" / "annotations" / split)


@pytest.mark.parametrize("value", ["/no/such/place", None])
def test_missing_camvid(value: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if value is None:
        monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    else:
        monkeypatch.setenv("DETECTRON2_DATASETS", value)
    with pytest.raises(DataError) as info:
        DatasetCatalog.get("camvid_sem_seg_train")
    text = str(info.value)
    assert "DETECTRON2_DATASETS is " + ("not set" if value is None else f"'{value}'") in text
    assert f"looked for in '{value or tmp_path / 'datasets'}'" in text
    assert "camvid/images/{train,val,test}/NAME.jpg" in text
    assert "camvid/annotations/{train,val,test}/NAME.png" in text


@pytest.mark.skipif(
    not (SHARED_DATA / "camvid").is_dir(), reason="needs the CamVid photographs (../shared/data)"
)
@pytest.mark.parametrize(("split", "frames"), [("train", 367), ("val", 101), ("test", 233)])
def test_camvid(split: str, frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(SHARED_DATA))
    dicts = DatasetCatalog.get(f"camvid_sem_seg_{split}")
    assert len(dicts) == frames
    for d in dicts[::50]:
        assert Path(d["file_name"]).stem == Path(d["sem_seg_file_name"]).stem
        label = read_label(d["sem_seg_file_name"])
        assert read_image(d["file_name"]).shape == (360, 480, 3)
        assert label.shape == (360, 480)
        check_label_values(label, 11, 255, d["sem_seg_file_name"])
