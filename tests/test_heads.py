"""The protocol of segmentation heads, and the component that supervises priors."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semask.errors import ConfigError
from semask.inference.export import ImageToLogits
from semask.modeling import PriorSupervision, SegmentationHead, SeMaskSegmentor, semantic_scores
from semask.modeling.meta_arch.protocol import SlidingWindow, WholeImage
from semask.ops.apply import apply_fast_paths

STRIDES = {"prior2": 4, "prior3": 8, "prior5": 32}


def priors(height: int, width: int, classes: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        name: torch.randn(2, classes, -(-height // s), -(-width // s), dtype=torch.float64)
        for name, s in STRIDES.items()
    }


def supervision(**arguments: Any) -> PriorSupervision:
    return PriorSupervision(**{"strides": STRIDES, "num_classes": 3, "weight": 0.4, **arguments})


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(64, 96), (37, 50)])
def test_priors_are_doubled_summed_and_compared(align_corners: bool, size: tuple[int, int]) -> None:
    def grown(maps: Tensor, height: int, width: int) -> Tensor:
        return F.interpolate(maps, (height, width), mode="bilinear", align_corners=align_corners)

    maps = priors(*size)
    rows, columns = maps["prior2"].shape[-2:]
    total = maps["prior2"]
    for name, doublings in (("prior3", 1), ("prior5", 3)):
        one = maps[name]
        for _ in range(doublings):
            one = grown(one, 2 * one.shape[-2], 2 * one.shape[-1])
        total = total + grown(one, rows, columns)
    labels = torch.randint(3, (2, *size))
    labels[0, :5] = 255
    expected = 0.4 * F.cross_entropy(grown(total, *size), labels, ignore_index=255)
    component = supervision(align_corners=align_corners, reduction="valid")
    torch.testing.assert_close(component.decode(maps, size), total)
    torch.testing.assert_close(component(maps, labels), expected)


@pytest.mark.parametrize("reduction", ["all", "valid"])
def test_without_a_valid_pixel_the_loss_is_0_and_part_of_the_graph(reduction: str) -> None:
    maps = {name: value.requires_grad_() for name, value in priors(32, 32).items()}
    loss = supervision(reduction=reduction)(maps, torch.full((2, 32, 32), 255))
    assert loss == 0
    loss.backward()
    assert all(value.grad is not None and not value.grad.any() for value in maps.values())


def test_it_has_no_parameters() -> None:
    assert supervision().state_dict() == {}


def test_a_missing_prior_is_named() -> None:
    with pytest.raises(ValueError, match="no prior5"):
        supervision().decode({k: v for k, v in priors(32, 32).items() if k != "prior5"}, (32, 32))


def test_a_backbone_without_these_priors_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"MODEL\.SEMASK\.NUM_CLASSES"):
        supervision().check_backbone(nn.Identity())


# ---- two kinds of predictions


def test_class_scores_of_mask_classification() -> None:
    torch.manual_seed(0)
    logits, masks = torch.randn(2, 5, 4), torch.randn(2, 5, 3, 4)
    scores = semantic_scores({"pred_logits": logits, "pred_masks": masks}, (12, 16))
    assert scores.shape == (2, 3, 12, 16)
    large = F.interpolate(masks, (12, 16), mode="bilinear").sigmoid()
    expected = torch.zeros(2, 3, 12, 16)
    for image in range(2):
        for query in range(5):
            share = logits[image, query].softmax(0)[:3]
            expected[image] += share[:, None, None] * large[image, query]
    torch.testing.assert_close(scores, expected)


class Backbone(nn.Module):
    size_divisibility = 0

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"res2": F.avg_pool2d(image, 4)}


class MaskHead(SegmentationHead):
    """Two queries, one for each class."""

    num_classes = 2
    score_kind = "scores"

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def predict(self, features: Any) -> dict[str, Tensor]:
        masks = self.scale * features["res2"][:, :2]
        logits = torch.tensor([[4.0, 0.0, 1.0], [0.0, 3.0, 0.5]])
        return {"pred_logits": logits[None].expand(len(masks), -1, -1), "pred_masks": masks}

    def losses(self, features: Any, targets: Any) -> dict[str, Tensor]:
        assert targets["sem_seg"].shape == (1, 32, 40)
        return {"loss_masks": self.predict(features)["pred_masks"].square().mean()}


def test_a_segmentor_takes_a_head_of_either_kind() -> None:
    model = SeMaskSegmentor(
        backbone=Backbone(),
        sem_seg_head=MaskHead(),
        pixel_mean=(0.0, 0.0, 0.0),
        pixel_std=(255.0, 255.0, 255.0),
    )
    inputs = [{"image": 255 * torch.rand(3, 32, 40), "sem_seg": torch.zeros(32, 40).long()}]
    assert model.score_kind == "scores"
    assert set(model.train()(inputs)) == {"loss_masks"}
    with torch.no_grad():
        (output,) = model.eval()(inputs)
        prediction = model.sem_seg_head(model.backbone(inputs[0]["image"][None] / 255))
        expected = semantic_scores(prediction, (32, 40))[0]
    torch.testing.assert_close(output["sem_seg"], expected)


def test_labels_are_needed_in_training() -> None:
    with pytest.raises(ValueError, match="labels"):
        MaskHead().train()({"res2": torch.zeros(1, 3, 8, 10)})


class DivisibleBackbone(Backbone):
    """As Detectron2's FPN: sizes that are no multiples of 32 are an error."""

    size_divisibility = 32

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        assert image.shape[-2] % 32 == image.shape[-1] % 32 == 0
        return super().forward(image)


class LogitHead(nn.Module):
    """One of Detectron2's."""

    def layers(self, features: Any) -> Tensor:
        return features["res2"]


@pytest.mark.parametrize("head", [LogitHead, MaskHead])
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("protocol", ["whole", "slide"])
def test_images_are_padded_as_the_backbone_asks(head: Any, fast: bool, protocol: str) -> None:
    """Of any size in evaluation; the padding is no part of the scores."""
    protocols = {"whole": WholeImage(), "slide": SlidingWindow(crop=(40, 60), stride=(20, 20))}
    model = SeMaskSegmentor(
        backbone=DivisibleBackbone(),
        sem_seg_head=head(),
        pixel_mean=(10.0, 20.0, 30.0),
        pixel_std=(50.0, 60.0, 70.0),
        protocol=protocols[protocol],
    ).eval()
    if fast:
        apply_fast_paths(model, ["streamed"])
    image = 255 * torch.rand(3, 37, 50)
    with torch.no_grad():
        (output,) = model([{"image": image, "height": 37, "width": 50}])
        normalized = (image[None] - model.pixel_mean) / model.pixel_std
        features = model.backbone(F.pad(normalized, (0, 14, 0, 27)))
        prediction = model.sem_seg_head.predict(features) if head is MaskHead else None
        prediction = prediction or {"logits": features["res2"]}
        expected = semantic_scores(prediction, (64, 64))[0, :, :37, :50]
    assert output["sem_seg"].shape == expected.shape
    if protocol == "whole":
        torch.testing.assert_close(output["sem_seg"], expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        exported = ImageToLogits(model)(image[None])
    torch.testing.assert_close(exported[0], expected, rtol=1e-4, atol=1e-5)
