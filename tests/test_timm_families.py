"""Every family of timm that docs/encoders.md calls working: features, gradients, identity."""

import re
import warnings

import pytest
import timm
import torch
from torch import Tensor, nn

import encoder_table
from semask.modeling import SeMaskTimm
from semask.modeling.backbone.contract import to_nhwc

SIDE = 64
NETWORKS = [
    *encoder_table.working(),
    "caformer_s18",
    "convnext_atto",
    "mambaout_femto",
    "tf_efficientnet_lite0",
]


@pytest.fixture(autouse=True)
def quiet() -> None:
    warnings.simplefilter("ignore")


def test_the_table_is_up_to_date() -> None:
    found = encoder_table.DOCUMENT.read_text()
    (version,) = re.findall(r"of timm\s+([\w.]+);", found)
    if version != timm.__version__:
        pytest.skip("the table is of another release of timm")
    # Those that work are built below.
    assert found == encoder_table.document(known=encoder_table.working())


@pytest.mark.parametrize("name", NETWORKS)
def test_family(name: str) -> None:
    torch.manual_seed(0)
    backbone = SeMaskTimm(name=name, semantic_classes=4, semantic_dropout=0.0)
    image = torch.randn(2, 3, SIDE, SIDE)
    _features_are_those_of_timm_with_gamma_0(name, backbone, image[:1])
    _everything_is_trained(backbone, image[:, :, :41, :50])


@torch.no_grad()
def _features_are_those_of_timm_with_gamma_0(
    name: str, backbone: SeMaskTimm, image: Tensor
) -> None:
    """Semantic layers pass on a stage's output bit by bit, and it equals timm's."""
    encoder = backbone.encoder
    features = timm.create_model(name, features_only=True).eval()
    # The form with features calls "stages.0" "stages_0".
    state = {key.replace(".", "_"): value for key, value in encoder.network.state_dict().items()}
    own = {key: state[key.replace(".", "_")] for key in features.state_dict()}
    features.load_state_dict(own)
    expected = dict(zip(features.feature_info.reduction(), features(image), strict=True))
    given: list[Tensor] = []
    handles = [
        stage.register_forward_hook(lambda module, args, output: given.extend((*args, output)))
        for stage in encoder.stages
    ]
    outputs = backbone.eval()(image, return_priors=True)
    for handle in handles:
        handle.remove()
    stages = list(zip(given[::2], given[1::2], strict=True))
    for index, (stride, output_name) in enumerate(
        zip(encoder.strides, backbone.names, strict=True)
    ):
        output = stages[index][1]
        torch.testing.assert_close(output, expected[stride], rtol=1e-5, atol=1e-5)
        if index + 1 < len(stages):
            assert torch.equal(stages[index + 1][0], output)
        plain = backbone.output_norms[output_name](to_nhwc(output, encoder.layout))
        assert torch.equal(outputs[output_name], plain.permute(0, 3, 1, 2))


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
