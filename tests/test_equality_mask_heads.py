"""The mask-classification models against the reference's numbers: arrays, losses, gradients."""

from typing import Any

import numpy as np
import pytest
import torch
from detectron2.structures import Instances
from torch import Tensor

from reference import weights
from reference_masks import (
    CASES,
    SIZES,
    build_head,
    check_array,
    load_arrays,
    load_meta,
    reference_backbone,
    reference_head,
    reference_image,
)
from semask.checkpoint import convert_state_dict
from semask.modeling import SeMaskSwin
from semask.modeling.heads.mask_classification import MaskClassificationHead

TRAINING = "train_128x128_b2.npz"


Reference = tuple[str, SeMaskSwin, MaskClassificationHead]


@pytest.fixture(scope="module", params=CASES)
def reference(request: pytest.FixtureRequest) -> Reference:
    """A case, its backbone and its head, which take seconds to build."""
    case = request.param
    return case, reference_backbone(case), reference_head(case)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("size", SIZES)
def test_features_predictions_and_priors_equal_reference(
    reference: Reference, size: str, dtype: torch.dtype
) -> None:
    case, backbone, head = reference
    backbone.to(dtype)
    head.to(dtype)
    file = f"eval_{size}.npz"
    image = reference_image(case, file).to(dtype)
    decoded: list[Any] = []
    handle = head.pixel_decoder.register_forward_hook(
        lambda module, args, output: decoded.append(output)
    )
    with torch.no_grad(), handle:
        features = backbone(image, return_priors=True)
        prediction = head(features, return_aux=True)
        assert head.prior_supervision is not None
        prior = head.prior_supervision.decode(features, (image.shape[-2], image.shape[-1]))
    for stage in range(4):
        check_array(case, file, f"feat{stage}", features[f"res{stage + 2}"])
        check_array(case, file, f"prior{stage}", features[f"prior{stage + 2}"])
    ((mask_features, multi_scale_features),) = decoded
    check_array(case, file, "mask_features", mask_features)
    height, width = map(int, size.split("x"))
    assert [tuple(each.shape) for each in multi_scale_features] == [
        (1, mask_features.shape[1], height // stride, width // stride) for stride in (32, 16, 8)
    ]
    prior = torch.nn.functional.interpolate(
        prior, size=image.shape[-2:], mode="bilinear", align_corners=True
    )
    check_array(case, file, "prior", prior)
    aux = prediction["aux_outputs"]
    check_array(case, file, "aux0.pred_masks", aux[0]["pred_masks"])
    if dtype != torch.float64 and load_meta(case)["head"]["type"] == "mask2former":
        return  # one bit of an attention mask may differ
    check_array(case, file, "pred_masks", prediction["pred_masks"])
    expected = load_arrays(case, file)
    logits = prediction["pred_logits"].numpy()
    mean, std, largest = expected["pred_logits.stats"]
    tolerance = 1e-6 * largest if dtype == torch.float64 else 1e-4
    np.testing.assert_allclose(logits, expected["pred_logits"], rtol=0, atol=tolerance)
    for got, want in zip(
        (logits.mean(), logits.std(), abs(logits).max()), (mean, std, largest), strict=True
    ):
        assert abs(got - want) <= tolerance
    for statistic in ("mean", "std"):
        got = [getattr(each["pred_logits"].numpy(), statistic)() for each in aux]
        want = expected[f"aux_pred_logits.{statistic}"]
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)


@pytest.fixture
def reference_points(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Random points that depend only on their number; records the requested shapes."""
    shapes: list[tuple[int, ...]] = []

    def rand(*shape: int, dtype: torch.dtype, device: Any) -> Tensor:
        shapes.append(shape)
        return torch.from_numpy(weights.shape_rand(shape)).to(device, dtype)

    monkeypatch.setattr(torch, "rand", rand)
    return shapes


def targets(case: str) -> dict[str, Any]:
    """The case's labels, and a mask for each class of an image."""
    meta = load_meta(case)
    spec = meta["files"][TRAINING]["labels"]
    labels = torch.from_numpy(
        weights.make_labels(
            spec["batch"], spec["height"], spec["width"], spec["num_classes"], seed=spec["seed"]
        )
    )
    labels = torch.where(labels == 255, labels, labels * 13 % meta["num_classes"])
    instances = []
    for label in labels:
        classes = label.unique()
        classes = classes[classes != 255]
        masks = label[None] == classes[:, None, None]
        size = (spec["height"], spec["width"])
        instances.append(Instances(size, gt_classes=classes, gt_masks=masks))
    return {"sem_seg": labels, "instances": instances}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_equal_reference(
    case: str, reference_points: list[tuple[int, ...]]
) -> None:
    expected = load_arrays(case, TRAINING)
    backbone = reference_backbone(case, drop_path_rate=0.0, dropout=0.0).double().train()
    head = reference_head(case, dropout=0.0).double().train()
    goal = targets(case)
    losses = head.losses(backbone(reference_image(case, TRAINING).double()), goal)
    total = torch.stack(list(losses.values())).sum()
    total.backward()

    for key, value in expected.items():
        if key.startswith("loss:loss_cate_"):
            assert value == 0  # a constant of the reference, which is no loss here
        elif key.startswith("loss:"):
            name = key.removeprefix("loss:").replace("loss_cate", "loss_prior")
            np.testing.assert_allclose(losses.pop(name).item(), value, rtol=1e-6, err_msg=key)
    assert not losses
    np.testing.assert_allclose(total.item(), expected["loss"], rtol=1e-6)

    names = {name: torch.tensor(i) for i, name in enumerate(load_meta(case)["state_dict"])}
    names = {name: i for name, i in names.items() if not name.endswith(weights.SKIP)}
    own_names = {int(number): name for name, number in convert_state_dict(names)[0].items()}
    gradients = {f"backbone.{k}": p.grad for k, p in backbone.named_parameters()}
    gradients |= {
        f"sem_seg_head.{k}": p.grad for k, p in head.named_parameters(remove_duplicate=False)
    }
    checked = 0
    for key, value in expected.items():
        kind, _, name = key.partition(":")
        if not kind.startswith("grad_"):
            continue
        gradient = gradients[own_names[int(names[name])]]
        norm = expected[f"grad_norm:{name}"]
        got = (gradient.norm() if kind == "grad_norm" else gradient.flatten()[:32]).numpy()
        np.testing.assert_allclose(got, value, rtol=1e-6, atol=1e-6 * float(norm), err_msg=key)
        checked += 1
    assert checked > 20

    if load_meta(case)["head"]["type"] == "mask2former":
        points = load_meta(case)["loss"]["points"]
        pairs = sum(len(each) for each in goal["instances"])
        rest = points - int(0.75 * points)
        once = [(1, points, 2)] * 2 + [(pairs, 3 * points, 2), (pairs, rest, 2)]
        assert reference_points == once * load_meta(case)["head"]["dec_layers_config"]
    else:
        assert reference_points == []


@pytest.mark.parametrize("case", CASES)
def test_published_number_of_parameters(case: str) -> None:
    with torch.device("meta"):
        head = build_head(case)
    parameters = load_meta(case)["parameters"]
    assert sum(p.numel() for p in head.parameters()) == parameters["head"]
    assert sum(p.numel() for p in head.predictor.parameters()) == parameters["predictor"]
