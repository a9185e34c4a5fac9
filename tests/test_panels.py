"""The picture of image, ground truth, prediction and semantic prior."""

import semask  # noqa: F401, isort: skip  (first: it makes Detectron2 importable)

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image, ImageDraw
from torch import nn

from semask.errors import ConfigError, DataError
from semask.report.panels import render_panels
from semask.utils.palette import class_colors
from semask.visualize import drawing
from semask.visualize.drawing import Panel, compose_panels, save_picture

Inputs = list[dict[str, Any]]
Outputs = list[dict[str, torch.Tensor]]

NAME = "panels_test"
COLORS = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200]], dtype=np.uint8)
HEIGHT, WIDTH = 40, 50
SCALE = 8  # both fit exactly: 40 * 8 = 320, 50 * 8 = 400
TOP = drawing.MARGIN + drawing.TITLE_SIZE + drawing.GAP
LEGEND = drawing.SWATCH + drawing.GAP + drawing.MARGIN  # in one line
CLASSES: dict[str, Any] = {"colors": COLORS, "class_names": ["a", "b", "c"]}


def label_map() -> np.ndarray:
    """Class 0 left, class 2 right, the lower half ignored."""
    label = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    label[:, WIDTH // 2 :] = 2
    label[HEIGHT // 2 :] = 255
    return label


class Model(nn.Module):
    """Predicts class 1 everywhere; a semantic prior of class 2."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Dropout()
        self.seen: list[str] = []
        self.modes: list[bool] = []

    def scores(self, index: int) -> torch.Tensor:
        return nn.functional.one_hot(torch.full((HEIGHT, WIDTH), index), 3).permute(2, 0, 1)

    def forward(self, batched_inputs: Inputs) -> Outputs:
        assert not torch.is_grad_enabled()
        self.seen += [inputs["file_name"] for inputs in batched_inputs]
        self.modes += [self.training, self.frozen.training]
        return [{"sem_seg": self.scores(1)} for _ in batched_inputs]


class ModelWithPrior(Model):
    def inference(self, batched_inputs: Inputs, return_priors: bool = False) -> Outputs:
        assert return_priors
        return [{**output, "prior": self.scores(2)} for output in self(batched_inputs)]


class ModelWithOtherInference(Model):
    def inference(self, batched_inputs: Inputs, detected_instances: Any = None) -> Outputs:
        raise AssertionError("not the inference that is meant")


class FailingModel(Model):
    def forward(self, batched_inputs: Inputs) -> Outputs:
        raise RuntimeError("out of memory")


@pytest.fixture
def dataset(tmp_path: Path) -> Iterator[list[dict[str, Any]]]:
    """Seven images."""
    folder = tmp_path / "data"
    folder.mkdir()
    records = []
    for index in range(7):
        image, label = folder / f"{index}.jpg", folder / f"{index}.png"
        Image.new("RGB", (WIDTH, HEIGHT), (250, 120, 10)).save(image, quality=95)
        Image.fromarray(label_map()).save(label)
        records.append({"file_name": str(image), "sem_seg_file_name": str(label)})
    DatasetCatalog.register(NAME, lambda: records)
    MetadataCatalog.get(NAME).set(
        stuff_classes=["red", "green", "blue"], stuff_colors=COLORS.tolist(), ignore_label=255
    )
    yield records
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def column(picture: np.ndarray, index: int, width: int = WIDTH * SCALE) -> np.ndarray:
    left = drawing.MARGIN + index * (width + drawing.GAP)
    return picture[TOP : TOP + HEIGHT * SCALE, left : left + width]


def test_size_and_colours_of_a_row() -> None:
    image = np.full((HEIGHT, WIDTH, 3), 77, dtype=np.uint8)
    prediction = np.full((HEIGHT, WIDTH), 1)
    prior = np.array([[0, 1]])  # any size is stretched
    panel = Panel(image, label_map(), prediction, prior)
    row = compose_panels([panel], **CLASSES, ignore_label=255)
    assert row.dtype == np.uint8
    assert row.shape == (
        TOP + HEIGHT * SCALE + drawing.MARGIN + LEGEND,
        2 * drawing.MARGIN + 4 * WIDTH * SCALE + 3 * drawing.GAP,
        3,
    )
    assert (column(row, 0) == 77).all()
    truth = column(row, 1)
    half_height, half_width = HEIGHT * SCALE // 2, WIDTH * SCALE // 2
    assert (truth[:half_height, :half_width] == COLORS[0]).all()
    assert (truth[:half_height, half_width:] == COLORS[2]).all()
    hatched = truth[half_height:]
    assert {tuple(pixel) for pixel in np.unique(hatched.reshape(-1, 3), axis=0).tolist()} == set(
        drawing.HATCH
    )
    assert (column(row, 2) == COLORS[1]).all()
    assert (column(row, 3)[:, :half_width] == COLORS[0]).all()
    assert (column(row, 3)[:, half_width:] == COLORS[1]).all()
    assert (row[: drawing.MARGIN // 2] == 255).all()
    assert (row[:, : drawing.MARGIN] == 255).all()
    titles = row[drawing.MARGIN : TOP]
    assert titles.min() < 100, "titles are written"


def test_ignored_is_a_matter_of_the_label_alone() -> None:
    label = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    panel = Panel(np.zeros((HEIGHT, WIDTH, 3), np.uint8), label, label)
    row = compose_panels([panel], **CLASSES, ignore_label=0)
    assert not (column(row, 1) == COLORS[0]).all(axis=-1).any()
    assert (column(row, 2) == COLORS[0]).all()


def test_large_images_shrink_and_rows_share_columns() -> None:
    def panel(height: int, width: int) -> Panel:
        label = np.zeros((height, width), dtype=np.uint8)
        return Panel(np.zeros((height, width, 3), dtype=np.uint8), label, label, caption="a name")

    wide = compose_panels([panel(512, 1024)], **CLASSES, ignore_label=255)
    assert wide.shape[1] == 2 * drawing.MARGIN + 3 * drawing.MAP_BOX[0] + 2 * drawing.GAP
    assert (column(wide, 1, drawing.MAP_BOX[0])[:200] == COLORS[0]).all()
    both = compose_panels([panel(512, 1024), panel(64, 32)], **CLASSES, ignore_label=255)
    assert both.shape[1] == wide.shape[1]
    shown = {tuple(pixel) for pixel in wide[-LEGEND:].reshape(-1, 3)}
    assert {tuple(color) for color in COLORS} <= shown


def test_legend_of_many_classes_lists_the_visible_ones() -> None:
    label = np.full((8, 8), 70)
    panel = Panel(np.zeros((8, 8, 3), np.uint8), label, np.full((8, 8), 3), np.full((2, 2), 149))

    def listed(number: int) -> set[int]:
        """The classes whose colours are below the maps."""
        colors = np.array([(index + 1, 255 - index, 99) for index in range(number)], np.uint8)
        names = [str(index) for index in range(number)]
        picture = compose_panels([panel], colors=colors, ignore_label=255, class_names=names)
        (rows,) = (picture[:, drawing.MARGIN] == 0).all(axis=-1).nonzero()  # the black image
        top = rows.max() + 1
        shown = {tuple(pixel) for pixel in picture[top:].reshape(-1, 3).tolist()}
        return {index for index in range(number) if tuple(colors[index].tolist()) in shown}

    assert listed(150) == {3, 70, 149}
    panel = Panel(panel.image, np.full((8, 8), 1), np.full((8, 8), 3))
    assert listed(8) == set(range(8))


def test_evenly_spaced_images_with_prior(dataset: list[dict[str, Any]]) -> None:
    model = ModelWithPrior()
    picture = render_panels(model, NAME, dict, 3)
    assert model.seen == [dataset[index]["file_name"] for index in (0, 3, 6)]
    assert picture.shape[1] == 2 * drawing.MARGIN + 4 * WIDTH * SCALE + 3 * drawing.GAP
    assert np.abs(column(picture, 0).astype(int) - (250, 120, 10)).max() < 8
    assert (column(picture, 2) == COLORS[1]).all()
    assert (column(picture, 3) == COLORS[2]).all()
    more = render_panels(ModelWithPrior(), NAME, dict, 100)
    row_height = HEIGHT * SCALE + drawing.TEXT_SIZE + 6 + drawing.GAP
    assert more.shape[0] - picture.shape[0] == 4 * row_height


@pytest.mark.parametrize("kind", [Model, ModelWithOtherInference])
def test_stock_model_has_no_prior_column(dataset: list[dict[str, Any]], kind: type[Model]) -> None:
    picture = render_panels(kind(), NAME, dict, 2)
    assert picture.shape[1] == 2 * drawing.MARGIN + 3 * WIDTH * SCALE + 2 * drawing.GAP


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_every_module_is_in_its_mode_again(
    dataset: list[dict[str, Any]], training: bool, fails: bool
) -> None:
    model = FailingModel() if fails else Model()
    model.train(training)
    model.frozen.eval()
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            render_panels(model, NAME, dict, 1)
    else:
        render_panels(model, NAME, dict, 1)
        assert model.modes == [False, False]
    assert model.training == training
    assert not model.frozen.training


def test_mapper_gets_a_copy(dataset: list[dict[str, Any]]) -> None:
    def mapper(record: dict[str, Any]) -> dict[str, Any]:
        record["image"] = torch.zeros(3, HEIGHT, WIDTH)
        return record

    render_panels(Model(), NAME, mapper, 1)
    assert "image" not in dataset[0]


def test_written_file_is_the_picture(dataset: list[dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "new" / "panels.png"
    save_picture(render_panels(ModelWithPrior(), NAME, dict, 2), str(path))
    assert [file.name for file in path.parent.iterdir()] == ["panels.png"]
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert np.array_equal(np.array(picture), render_panels(ModelWithPrior(), NAME, dict, 2))


def test_nothing_half_written(
    dataset: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out" / "panels.png"
    with pytest.raises(RuntimeError, match="out of memory"):
        save_picture(render_panels(FailingModel(), NAME, dict, 2), str(path))
    assert not path.exists()

    save_picture(render_panels(Model(), NAME, dict, 1), str(path))
    before = path.read_bytes()

    def full_disk(_image: Image.Image, file: BinaryIO, format: str) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_picture(render_panels(ModelWithPrior(), NAME, dict, 1), str(path))
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["panels.png"]


def test_bad_requests(dataset: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="num_images"):
        render_panels(Model(), NAME, dict, 0)
    del dataset[0]["sem_seg_file_name"]
    with pytest.raises(DataError, match=r"0\.jpg'"):
        render_panels(Model(), NAME, dict, 1)
    dataset.clear()
    with pytest.raises(DataError, match="no images"):
        render_panels(Model(), NAME, dict, 1)
    with pytest.raises(ConfigError, match="stuff_classes"):
        render_panels(Model(), "panels_test_without_metadata", dict, 1)


def test_colours_of_the_metadata() -> None:
    assert np.array_equal(class_colors(3, COLORS.tolist()), COLORS)
    with pytest.raises(ValueError, match="4 RGB triples"):
        class_colors(4, COLORS.tolist())
    with pytest.raises(ValueError, match=r"0\.\.255"):
        class_colors(1, [[0, 0, 256]])


def test_own_colours_are_fixed_and_far_apart() -> None:
    colors = class_colors(171)
    assert len(np.unique(colors, axis=0)) == 171
    assert np.array_equal(class_colors(8), colors[:8])
    few = class_colors(12).astype(int)
    distance = np.linalg.norm(few[:, None] - few[None], axis=-1) + 1e3 * np.eye(12)
    assert distance.min() > 40


def test_font_has_umlauts_and_accents() -> None:
    def written(text: str) -> bytes:
        canvas = Image.new("RGB", (40, 30))
        drawing.write_text(ImageDraw.Draw(canvas), (5, 5), text, 16, (255, 255, 255))
        return canvas.tobytes()

    letters = "äöüÄÖÜßéèçñåøłžčőşğŒЖΩ–…"
    assert len({written(letter) for letter in (*letters, "\ufffe")}) == len(letters) + 1
