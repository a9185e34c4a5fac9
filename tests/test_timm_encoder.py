"""Networks of timm with SeMask: equal features, equal names, and messages for unsupported ones."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from semask.errors import CheckpointError, ConfigError
from semask.modeling import SeMaskTimm, TimmEncoder

# Channels first, channels last, and a stem of several modules.
NETWORKS = ("test_convnext", "test_mambaout", "test_resnet", "mit_b0")


def build(name: str, **settings: Any) -> SeMaskTimm:
    torch.manual_seed(0)
    return SeMaskTimm(name=name, **{"semantic_classes": 4, **settings})


@pytest.mark.parametrize("name", NETWORKS)
def test_state_has_the_names_of_timm(name: str) -> None:
    encoder = TimmEncoder(name)
    names = {key.removeprefix("network.") for key in encoder.state_dict()}
    whole = timm.create_model(name).state_dict()
    assert names == whole.keys() - encoder.left_out
    assert encoder.left_out <= whole.keys()
    assert all(key.startswith(("head.", "norm.", "fc.")) for key in encoder.left_out)


@pytest.mark.parametrize("name", NETWORKS)
def test_stages_are_left_out_behind_the_last_feature(name: str) -> None:
    backbone = build(name, out_features=("res2", "res3"))
    outputs = backbone.train()(torch.randn(2, 3, 64, 64))
    assert outputs.keys() == {"res2", "res3", "prior2", "prior3"}
    torch.stack([value.sum() for value in outputs.values()]).sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_activation_checkpointing_and_frozen_stages(name: str) -> None:
    image = torch.randn(2, 3, 40, 70)

    def gradients(**settings: Any) -> dict[str, Any]:
        backbone = build(name, semantic_dropout=0.0, **settings).train()
        torch.stack([value.square().mean() for value in backbone(image).values()]).sum().backward()
        return {name: parameter.grad for name, parameter in backbone.named_parameters()}

    plain = gradients()
    torch.testing.assert_close(gradients(activation_checkpoint=[True] * 4), plain)
    frozen = gradients(freeze_at=2)
    missing = {name for name, value in frozen.items() if value is None}
    backbone = build(name, freeze_at=2)
    assert missing == {n for n, p in backbone.named_parameters() if not p.requires_grad}
    assert {id(p) for p in backbone.encoder.stages[0].parameters()} == {
        id(p)
        for n, p in backbone.named_parameters()
        if n in missing and p in set(backbone.encoder.stages[0].parameters())
    }
    assert not any(p.requires_grad for p in backbone.encoder.stem.parameters())
    assert all(p.requires_grad for p in backbone.encoder.stages[1].parameters())


@pytest.mark.parametrize("name", [*NETWORKS, "pvt_v2_b0"])
def test_images_smaller_than_what_the_first_stage_shrinks(name: str) -> None:
    backbone = build(name).eval()
    for height, width in ((28, 20), (64, 5), (1, 1)):
        with torch.no_grad():
            outputs = backbone(torch.randn(1, 3, height, width), return_priors=True)
        for level in range(2, 6):
            size = (-(-height // 2**level), -(-width // 2**level))
            for kind in ("res", "prior"):
                assert outputs[f"{kind}{level}"].shape[2:] == size
                assert outputs[f"{kind}{level}"].isfinite().all()


def test_drop_path() -> None:
    def dropped(rate: float) -> bool:
        backbone = build("test_convnext", drop_path_rate=rate, semantic_attention=["none"] * 4)
        image = torch.randn(1, 3, 32, 32)
        outputs = [backbone.train()(image)["res5"] for _ in range(4)]
        return not all(torch.equal(outputs[0], output) for output in outputs)

    assert dropped(0.8)
    assert not dropped(0.0)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("hiera_tiny_224", "in one piece"),
        ("mvitv2_tiny", "in one piece"),
        ("twins_svt_small", "in one piece"),
        ("levit_128s", "in one piece"),
        ("vit_tiny_patch16_224", "in one piece"),
        ("xception41", "inside its modules"),
        ("efficientvit_m0", "strides"),
        ("gcvit_xxtiny", "any size"),
        ("selecsls42", "more than one map"),
        ("swinv2_cr_tiny_224", "any size"),
        ("swin_tiny_patch4_window7_224", "SeMaskSwin"),
        ("convnext_tinny", "convnext_tiny"),
        ("", "NAME"),
    ],
)
def test_refused_networks(name: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part) as caught:
        build(name)
    assert "MODEL.TIMM.NAME" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"drop_path_rate": 1.0}, "MODEL.TIMM.DROP_PATH_RATE"),
        ({"name": "dla34", "drop_path_rate": 0.1}, "MODEL.TIMM.DROP_PATH_RATE"),
        ({"activation_checkpoint": (True,)}, "MODEL.TIMM.ACTIVATION_CHECKPOINT"),
        ({"semantic_norm": "both"}, "MODEL.SEMASK.NORM"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        build(**{"name": "test_convnext", **settings})


def test_pretrained_weights_that_cannot_be_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"MODEL\.TIMM\.PRETRAINED"):
        TimmEncoder("mit_b0", pretrained=True)


def test_pretrained_weights_come_through_timm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    published = timm.create_model("test_convnext")
    save_file(published.state_dict(), tmp_path / "weights.safetensors")
    create = timm.create_model

    def with_file(name: str, **options: Any) -> Any:
        overlay = {"file": str(tmp_path / "weights.safetensors")}
        return create(name, pretrained_cfg_overlay=overlay, **options)

    monkeypatch.setattr(timm, "create_model", with_file)
    encoder = TimmEncoder("test_convnext", pretrained=True)
    expected = published.state_dict()
    for name, value in encoder.network.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
