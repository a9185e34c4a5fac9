"""ImageNet Swin in the forms of several libraries: the same weights give the same features."""

from collections.abc import Mapping
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from semask.checkpoint import SeMaskCheckpointer
from semask.checkpoint.convert import convert_state_dict
from semask.errors import CheckpointError
from semask.modeling import SeMaskSwin

DIM, DEPTHS, HEADS, WINDOW = 8, (1, 2, 1, 2), (1, 2, 2, 4), 2
SIDE = 128  # every stage has several windows, which all forms shift alike


class Model(nn.Module):
    """What a checkpoint of a backbone is loaded into."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = SeMaskSwin(
            embed_dim=DIM,
            depths=DEPTHS,
            num_heads=HEADS,
            window_size=WINDOW,
            semantic_attention=("none",) * 4,
        )


def random(module: nn.Module) -> nn.Module:
    """With values of every parameter that act."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module.eval()


def loaded(state: Mapping[str, Tensor], tmp_path: Any) -> SeMaskSwin:
    path = tmp_path / "weights.pth"
    torch.save({"model": dict(state)}, path)
    model = Model().eval()
    SeMaskCheckpointer(model).load(str(path))
    return model.backbone


def last_map(backbone: SeMaskSwin, image: Tensor) -> Tensor:
    """(B, H, W, C), normalised as a classifier does it."""
    x = backbone.encoder.stem(image)
    for stage in backbone.encoder.stages:
        x = stage(x)
    return x


def peer(library: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A Swin of a library, an image, and its last map behind the final normalisation."""
    image = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    if library == "timm":
        model = random(
            timm.models.SwinTransformer(
                img_size=SIDE, embed_dim=DIM, depths=DEPTHS, num_heads=HEADS, window_size=WINDOW
            )
        )
        return model, image, model.forward_features(image)
    if library == "torchvision":
        model = random(
            torchvision.models.SwinTransformer(
                [4, 4], DIM, list(DEPTHS), list(HEADS), [WINDOW, WINDOW]
            )
        )
        return model, image, model.norm(model.features(image))
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(
        image_size=SIDE,
        embed_dim=DIM,
        depths=list(DEPTHS),
        num_heads=list(HEADS),
        window_size=WINDOW,
    )
    model = random(transformers.SwinForImageClassification(config))
    tokens = model.swin(image).last_hidden_state
    return model, image, tokens.unflatten(1, (SIDE // 32, SIDE // 32))


@torch.no_grad()
@pytest.mark.parametrize("library", ["timm", "torchvision", "transformers"])
def test_a_library_gives_the_same(library: str, tmp_path: Any) -> None:
    model, image, expected = peer(library)
    state = model.state_dict()
    norm = "swin.layernorm" if library == "transformers" else "norm"
    x = last_map(loaded(state, tmp_path), image)
    found = nn.functional.layer_norm(
        x, x.shape[-1:], state[f"{norm}.weight"], state[f"{norm}.bias"], 1e-5
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def authors() -> dict[str, Tensor]:
    """A Swin as its authors name it, which torchvision has under other names."""
    model, _, _ = peer("torchvision")
    found, _ = convert_state_dict(model.state_dict())
    names = {}
    for name, value in found.items():
        if not name.startswith("backbone."):
            names[name] = value
            continue
        name = name.removeprefix("backbone.encoder.").removeprefix("stem.")
        stage, _, rest = name.removeprefix("stages.").partition(".")
        if rest.startswith("downsample."):
            stage = str(int(stage) - 1)
        names[f"layers.{stage}.{rest}" if name.startswith("stages.") else name] = value
    return names


class UnfoldMerging(nn.Module):
    """Patch merging by an unfold (as OpenMMLab documents it), for channels first."""

    def __init__(self, norm: tuple[Tensor, Tensor], reduction: Tensor) -> None:
        super().__init__()
        self.norm, self.reduction = norm, reduction

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        x = nn.functional.unfold(x, 2, stride=2).transpose(1, 2)
        x = nn.functional.layer_norm(x, x.shape[-1:], *self.norm) @ self.reduction.T
        return x.transpose(1, 2).unflatten(2, (height // 2, width // 2))


@torch.no_grad()
def test_openmmlab_merges_patches_by_an_unfold(tmp_path: Any) -> None:
    state = {}
    for name, value in authors().items():
        for old, new in (
            ("patch_embed.proj.", "patch_embed.projection."),
            ("layers.", "stages."),
            (".attn.", ".attn.w_msa."),
            (".mlp.fc1.", ".ffn.layers.0.0."),
            (".mlp.fc2.", ".ffn.layers.1."),
            ("head.", "head.fc."),
        ):
            name = name.replace(old, new)
        name = name.replace("norm.", "norm3.") if name.startswith("norm.") else name
        state[name if name.startswith("head.") else f"backbone.{name}"] = torch.randn_like(value)
    assert "backbone.stages.0.downsample.reduction.weight" in state
    backbone: Any = loaded(state, tmp_path)
    for stage in range(3):
        start, width = f"backbone.stages.{stage}.downsample.", DIM * 2**stage
        x = torch.randn(2, width, 6, 10)
        merging = UnfoldMerging(
            (state[start + "norm.weight"], state[start + "norm.bias"]),
            state[start + "reduction.weight"],
        )
        own = backbone.encoder.stages[stage + 1].downsample(x.permute(0, 2, 3, 1))
        torch.testing.assert_close(own.permute(0, 3, 1, 2), merging(x), rtol=1e-4, atol=1e-4)
    name = "backbone.stages.3.blocks.1.ffn.layers.1.weight"
    assert torch.equal(backbone.encoder.stages[3].blocks[1].mlp.fc2.weight, state[name])


@pytest.mark.parametrize(
    ("prefix", "beside"),
    [
        ("model.", ()),
        ("encoder.", ("encoder.mask_token", "decoder.0.weight")),
        (
            "encoder.",
            ("encoder_k.layers.0.blocks.0.norm1.weight", "projector.linear1.weight", "queue"),
        ),
    ],
    ids=["lightning", "simmim", "moby"],
)
def test_frameworks_put_a_prefix_in_front(
    prefix: str, beside: tuple[str, ...], tmp_path: Any
) -> None:
    state = authors()
    wrapped = {prefix + name: value for name, value in state.items()}
    wrapped |= {name: torch.zeros(3) for name in beside}
    expected, found = loaded(state, tmp_path).state_dict(), loaded(wrapped, tmp_path).state_dict()
    learnt = {name for name in expected if ".output_norms." not in f".{name}"}
    for name in learnt:
        assert torch.equal(found[name], expected[name])


def test_what_is_missing_or_left_over_is_refused(tmp_path: Any) -> None:
    state = peer("timm")[0].state_dict()
    without = {name: v for name, v in state.items() if name != "layers.2.downsample.norm.bias"}
    with pytest.raises(CheckpointError, match=r"stages\.2\.downsample\.norm\.bias"):
        loaded(without, tmp_path)
    with pytest.raises(CheckpointError, match="ema_rate"):
        loaded({**state, "ema_rate": torch.zeros(1)}, tmp_path)


def test_swin_v2_is_named(tmp_path: Any) -> None:
    state = timm.create_model("swinv2_tiny_window8_256").state_dict()
    with pytest.raises(CheckpointError, match="Swin V2"):
        loaded(state, tmp_path)
