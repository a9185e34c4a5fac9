"""The predictor equals the evaluation, and reports errors of its inputs."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from PIL import Image, ImageOps

import semask
import tiny
from semask import Prediction, Predictor
from semask.data.mappers.semantic import build_semantic_mapper
from semask.engine import Trainer
from semask.errors import CheckpointError, ConfigError, DataError
from semask.inference.model_outputs import for_evaluators
from semask.inference.predictor import PREDICTORS, TaskPredictor
from semask.utils.palette import class_colors
from tiny_model import build_tiny_model, checkpoint, config, photograph

MULTI_SCALE = ["TEST.PROTOCOL", "multi_scale", "TEST.MULTI_SCALE_FACTORS", "[0.5, 1.25]"]
SLIDE = ["TEST.PROTOCOL", "slide", "TEST.SLIDE_CROP", "[16, 24]", "TEST.SLIDE_STRIDE", "[9, 12]"]


@pytest.fixture
def weights(tmp_path: Path) -> str:
    return checkpoint(tmp_path)


@pytest.fixture
def predictor(tmp_path: Path, weights: str) -> Predictor:
    return Predictor(tmp_path / "config.yaml", weights, device="cpu")


class Collected(DatasetEvaluator):
    """The labels and scores of each image, as the evaluator of a run sees them."""

    def reset(self) -> None:
        self.labels: dict[str, torch.Tensor] = {}
        self.scores: dict[str, torch.Tensor] = {}

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        for entry, output in zip(inputs, outputs, strict=True):
            self.labels[entry["file_name"]] = output["scores"].labels()
            self.scores[entry["file_name"]] = output["sem_seg"]


@pytest.mark.parametrize("overrides", [[], MULTI_SCALE, SLIDE], ids=["whole", "multi", "slide"])
def test_it_equals_the_evaluation(tmp_path: Path, weights: str, overrides: list[str]) -> None:
    file = str(tmp_path / "config.yaml")
    cfg = semask.load_config(file, overrides)
    collected = Collected()
    with tiny.datasets(tmp_path):
        loader = Trainer.build_test_loader(cfg, "tiny_val")
        inference_on_dataset(for_evaluators(build_tiny_model(cfg)), loader, collected)
        assert len(collected.scores) == len(DatasetCatalog.get("tiny_val"))
        predictor = Predictor(file, weights, device="cpu", overrides=overrides)
        predictions = {name: predictor(name, probabilities=True) for name in collected.scores}
    for name, scores in collected.scores.items():
        prediction = predictions[name]
        assert np.array_equal(prediction.labels, collected.labels[name].numpy())
        assert np.array_equal(prediction.labels, scores.argmax(dim=0).numpy())
        expected = scores if overrides is MULTI_SCALE else scores.softmax(dim=0)
        assert prediction.probabilities is not None
        np.testing.assert_allclose(prediction.probabilities, expected.numpy(), rtol=0, atol=1e-6)


def test_array_path_and_pillow_image_are_the_same(tmp_path: Path, predictor: Predictor) -> None:
    pixels = photograph(23, 37)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    expected = predictor(pixels)
    assert expected.labels.shape == (23, 37)
    assert expected.labels.dtype == np.uint8
    assert len(np.unique(expected.labels)) > 1
    for image in (path, str(path), Image.open(path), Image.fromarray(pixels)):
        found = predictor(image)
        assert np.array_equal(found.labels, expected.labels)
        assert np.array_equal(found.image, pixels)


def test_pillow_images_are_upright_and_of_any_mode(tmp_path: Path, predictor: Predictor) -> None:
    pixels = photograph(23, 37)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    path = tmp_path / "turned.png"
    Image.fromarray(pixels).save(path, exif=exif)
    with Image.open(path) as image:
        turned = predictor(image)
        assert turned.labels.shape == (37, 23)
        assert np.array_equal(turned.image, np.array(ImageOps.exif_transpose(image)))
    assert np.array_equal(turned.labels, predictor(path).labels)
    grey = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257)
    assert np.array_equal(predictor(grey).image, np.repeat(pixels[:, :, :1], 3, axis=2))


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (3, 2)])
def test_the_smallest_images(predictor: Predictor, size: tuple[int, int]) -> None:
    assert predictor(photograph(*size)).labels.shape == size


def test_priors_of_each_stage(predictor: Predictor) -> None:
    pixels = photograph(30, 40)
    plain, prediction = predictor(pixels), predictor(pixels, priors=True)
    assert plain.prior is None
    assert plain.priors is None
    assert plain.prior_pictures() == {}
    assert np.array_equal(plain.labels, prediction.labels)
    assert prediction.priors is not None
    assert {k: v.shape for k, v in prediction.priors.items()} == {
        "prior2": (3, 8, 10),
        "prior3": (3, 4, 5),
    }
    assert prediction.prior is not None
    assert prediction.prior.shape == (30, 40)
    picture = prediction.prior_pictures()["prior3"]
    assert picture.shape == (30, 40, 3)
    corner = prediction.priors["prior3"][:, -1, -1].argmax()
    assert np.array_equal(picture[-1, -1], prediction.colors[corner])


def test_overlay_mixes_image_and_class_colours(predictor: Predictor) -> None:
    prediction = predictor(photograph(20, 24))
    assert np.array_equal(prediction.overlay(0.0), prediction.image)
    assert np.array_equal(prediction.overlay(1.0), prediction.colored)
    assert np.array_equal(prediction.colored[3, 5], prediction.colors[prediction.labels[3, 5]])
    mixed = 0.25 * prediction.colored + 0.75 * prediction.image
    assert np.abs(prediction.overlay(0.25) - mixed).max() <= 0.5
    with pytest.raises(ValueError, match="alpha"):
        prediction.overlay(1.5)


def test_more_classes_than_a_byte_holds() -> None:
    labels = np.array([[0, 299]], dtype=np.uint16)
    names = tuple(str(index) for index in range(300))
    prediction = Prediction(photograph(1, 2), labels, names, class_colors(300))
    assert np.array_equal(prediction.overlay(1.0), class_colors(300)[labels])


# ---- classes


def test_class_names_and_colours_are_those_of_the_dataset(tmp_path: Path, weights: str) -> None:
    colors = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    tiny.register("tiny_val", [], stuff_colors=colors)
    try:
        predictor = Predictor(tmp_path / "config.yaml", weights, device="cpu")
        assert predictor(photograph(8, 8)).class_names == tiny.CLASSES
        assert predictor.colors.tolist() == colors
        other = ["DATASETS.TEST", "('camvid_sem_seg_val',)", "DATASETS.TRAIN", "()"]
        predictor = Predictor(tmp_path / "config.yaml", weights, device="cpu", overrides=other)
        assert predictor.class_names == ("class 0", "class 1", "class 2")  # CamVid has 11
    finally:
        tiny.unregister("tiny_val")


# ---- where config and weights come from


def test_config_may_be_a_name_or_a_node(tmp_path: Path, weights: str) -> None:
    cfg = config(tmp_path)
    cfg.freeze()
    predictor = Predictor(cfg, weights, overrides=["INPUT.SCALE", "[32, 32]"])
    assert list(predictor.cfg.INPUT.SCALE) == [32, 32]
    assert list(cfg.INPUT.SCALE) == [tiny.SIDE, tiny.SIDE]
    with pytest.raises(ConfigError, match="ade20k/semask_swin_tiny_fpn"):
        Predictor("ade20k/semask_swin_tinny_fpn", weights)
    with pytest.raises(CheckpointError, match="model"):
        Predictor("scenes/semask_scenes", weights, device="cpu")  # of another model
    with pytest.raises(ConfigError, match=r"Did you mean 'TEST\.PROTOCOL'"):
        Predictor(cfg, weights, overrides=["TEST.PROTOCOLL", "slide"])


def test_the_predictor_and_its_mapper_are_those_of_the_task(
    tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the predictor of a task is a subclass of ``Predictor``."""
    built: list[str] = []

    class Own(Predictor):
        def set_up(self) -> None:
            built.append("predictor")
            super().set_up()

    def small_mapper(cfg: CfgNode) -> Any:
        built.append("mapper")
        cfg = cfg.clone()
        cfg.defrost()
        cfg.INPUT.SCALE = [16, 16]
        return build_semantic_mapper(cfg, is_train=False)

    stock = Predictor(tmp_path / "config.yaml", weights, device="cpu")
    monkeypatch.setitem(PREDICTORS, "semantic", TaskPredictor(Own, small_mapper))
    own = Predictor(tmp_path / "config.yaml", weights, device="cpu")
    assert type(own) is Own
    assert built == ["mapper", "predictor"]
    priors = [each(photograph(40, 40), priors=True).priors for each in (stock, own)]
    sizes = [each["prior2"].shape[1:] for each in priors if each]
    assert sizes == [(10, 10), (4, 4)]


def test_weights_have_to_be_a_complete_model(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    with pytest.raises(CheckpointError, match="needs weights"):
        Predictor(cfg, "")
    with pytest.raises(CheckpointError, match="nowhere"):
        Predictor(cfg, tmp_path / "nowhere.pth")
    from semask.modeling import SeMaskSwin

    # As Swin's authors publish a classifier: enough to start a training from.
    swin = SeMaskSwin(
        **{"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4},
        **{"semantic_attention": ("none", "none"), "semantic_blocks": (1, 1)},
        **{"out_features": ("res2", "res3"), "activation_checkpoint": (False, False)},
    )
    published = {
        name.removeprefix("encoder.")
        .removeprefix("stem.")
        .replace("stages.1.downsample", "layers.0.downsample")
        .replace("stages.", "layers."): value
        for name, value in swin.state_dict().items()
        if "output_norms" not in name
    }
    torch.save({"model": published}, tmp_path / "swin.pth")
    with pytest.raises(CheckpointError, match="complete model"):
        Predictor(cfg, tmp_path / "swin.pth")


def test_a_device_that_is_not_there_is_refused(tmp_path: Path, weights: str) -> None:
    with pytest.raises(ConfigError, match=r"MODEL\.DEVICE"):
        Predictor(tmp_path / "config.yaml", weights, device="cuda:77")


def test_protocols_of_other_architectures_are_refused(tmp_path: Path, weights: str) -> None:
    cfg = config(tmp_path)
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    predictor = Predictor(cfg, weights)
    assert predictor(photograph(24, 24)).labels.shape == (24, 24)
    with pytest.raises(ConfigError, match="no semantic priors"):
        predictor(photograph(24, 24), priors=True)
    with pytest.raises(ConfigError, match="'SeMaskSegmentor'"):
        Predictor(cfg, weights, overrides=SLIDE)


# ---- images that cannot be used


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_arrays_that_are_no_images_are_refused(predictor: Predictor, image: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"\(H, W, 3\) uint8"):
        predictor(image)


def test_a_truncated_file_is_refused(tmp_path: Path, predictor: Predictor) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(photograph(64, 64)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    for image in (path, Image.open(path)):
        with pytest.raises(DataError, match=r"a\.png"):
            predictor(image)


def test_folder_is_predicted_in_order_and_what_is_unreadable_is_reported(
    tmp_path: Path, predictor: Predictor, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for name in ("b.png", "a.JPG", "sub/c.png"):
        Image.fromarray(photograph(16, 20)).save(folder / name)
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image either")
    with caplog.at_level(logging.WARNING, "semask"):
        found = dict(predictor.predict_folder(folder, priors=True))
    assert list(found) == [folder / "a.JPG", folder / "b.png", folder / "sub/c.png"]
    assert all(prediction.priors for prediction in found.values())
    assert np.array_equal(found[folder / "b.png"].labels, predictor(folder / "b.png").labels)
    messages = [record.message for record in caplog.records]
    assert len(messages) == 2
    assert "broken.png" in messages[0]
    assert "1 of the 4 images" in messages[1]


def test_an_empty_or_missing_folder_is_refused(tmp_path: Path, predictor: Predictor) -> None:
    (tmp_path / "empty").mkdir()
    for name, message in (("empty", "no image"), ("nowhere", "no folder")):
        with pytest.raises(DataError, match=message):
            next(predictor.predict_folder(tmp_path / name))
