"""Every family of timm that docs/encoders.md calls working: features, gradients, identity."""

import warnings

import pytest
import timm
import torch
from torch import Tensor, nn

import encoder_table
from semask.modeling import SeMaskTimm, TimmEncoder
from semask.modeling.backbone.encoder import to_nhwc

SIDE = 64
NETWORKS = [*encoder_table.working(), "caformer_s18", "convnext_atto", "mambaout_femto"]


@pytest.fixture(autouse=True)
def quiet() -> None:
    warnings.simplefilter("ignore")


def test_the_table_is_up_to_date() -> None:
    found = encoder_table.DOCUMENT.read_text()
    version = f"of timm\n{timm.__version__};"
    if version not in found:
        pytest.skip("the table is of another release of timm")
    assert found == encoder_table.document()


@pytest.mark.parametrize("name", NETWORKS)
def test_family(name: str) -> None:
    torch.manual_seed(0)
    backbone = SeMaskTimm(name=name, semantic_classes=4, semantic_dropout=0.0)
    encoder = backbone.encoder
    image = torch.randn(2, 3, SIDE, SIDE)
    _features_are_those_of_timm(name, encoder, image)
    _nothing_changes_with_gamma_0(backbone, image[:, :, :41, :50])
    _everything_is_trained(backbone, image[:, :, :41, :50])


def _features_are_those_of_timm(name: str, encoder: TimmEncoder, image: Tensor) -> None:
    features = timm.create_model(name, features_only=True).eval()
    # The form with features calls "stages.0" "stages_0".
    state = {key.replace(".", "_"): value for key, value in encoder.network.state_dict().items()}
    for key, value in features.state_dict().items():
        value.copy_(state[key.replace(".", "_")])
    expected = dict(zip(features.feature_info.reduction(), features(image), strict=True))
    x = encoder.eval().stem(image)
    for stage, stride in zip(encoder.stages, encoder.strides, strict=True):
        x = stage(x)
        torch.testing.assert_close(x, expected[stride], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def _nothing_changes_with_gamma_0(backbone: SeMaskTimm, image: Tensor) -> None:
    outputs = backbone.eval()(image)
    x = backbone.encoder.stem(image)
    for stage, name in zip(backbone.encoder.stages, backbone.names, strict=True):
        x = stage(x)
        plain = backbone.output_norms[name](to_nhwc(x, backbone.encoder.layout))
        assert torch.equal(outputs[name], plain.permute(0, 3, 1, 2))


def _everything_is_trained(backbone: SeMaskTimm, image: Tensor) -> None:
    for name, parameter in backbone.named_parameters():
        if name.endswith(".gamma") and "semantic_layers" in name:
            nn.init.ones_(parameter)
    outputs = backbone.train()(image)
    height, width = image.shape[2:]
    for name, value in outputs.items():
        stride = 2 ** int(name[-1])
        assert value.shape[2:] == (-(-height // stride), -(-width // stride))
    torch.stack([value.square().mean() for value in outputs.values()]).sum().backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
