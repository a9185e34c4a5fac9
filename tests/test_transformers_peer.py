"""transformers' Mask2Former and MaskFormer: the same weights give the same queries here.

Its outputs are stored; ``fixtures/transformers_masks/make.py`` makes them again.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from safetensors.torch import save_file
from torch import Tensor, nn

from reference import weights
from semask.checkpoint import SeMaskCheckpointer
from semask.errors import CheckpointError
from semask.modeling import SeMaskSwin
from semask.modeling.backbone.windows import relative_position_index
from semask.modeling.mask_decoder.mask2former import Mask2FormerDecoder
from semask.modeling.mask_decoder.maskformer import MaskFormerDecoder
from semask.modeling.pixel_decoder import DeformablePixelDecoder, FPNPixelDecoder

FIXTURES = Path(__file__).parent / "fixtures" / "transformers_masks"
WIDTH, QUERIES, CLASSES, DIM, WINDOW = 64, 7, 5, 16, 4
KINDS = pytest.mark.parametrize("kind", ["mask2former", "maskformer"])


class Model(nn.Module):
    """The parts of a mask-classification model, by the names that they have in one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.backbone = SeMaskSwin(
            embed_dim=DIM,
            depths=[2, 2, 2, 2],
            num_heads=[1, 2, 4, 8],
            window_size=WINDOW,
            semantic_attention=["none"] * 4,
            semantic_blocks=[0] * 4,
        )
        shapes = {f"res{i + 2}": ShapeSpec(channels=DIM * 2**i, stride=4 * 2**i) for i in range(4)}
        sizes: dict[str, Any] = {"channels": WIDTH, "mask_channels": WIDTH}
        queries: dict[str, Any] = {
            "num_classes": CLASSES,
            "num_queries": QUERIES,
            "num_layers": 3,
            "dim": WIDTH,
            "feedforward_dim": 128,
            "mask_dim": WIDTH,
        }
        self.sem_seg_head = nn.ModuleDict(
            {
                "pixel_decoder": DeformablePixelDecoder(input_shape=shapes, num_layers=2, **sizes),
                "predictor": Mask2FormerDecoder(**queries),
            }
            if kind == "mask2former"
            else {
                "pixel_decoder": FPNPixelDecoder(input_shape=shapes, **sizes),
                "predictor": MaskFormerDecoder(in_channels=8 * DIM, **queries),
            }
        )

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits and mask logits of the queries."""
        features = self.backbone(image)
        mask_features, maps = self.sem_seg_head["pixel_decoder"](features)
        if isinstance(self.sem_seg_head["predictor"], MaskFormerDecoder):
            maps = [features["res5"]]
        final = self.sem_seg_head["predictor"](maps, mask_features)[-1]
        return final.logits, final.masks


def peer_state_dict(kind: str) -> dict[str, Tensor]:
    """The peer's parameters and buffers by its names."""
    shapes = json.loads((FIXTURES / f"{kind}.json").read_text())
    filled = {k: torch.from_numpy(v) for k, v in weights.fill_state_dict(shapes).items()}
    for name in shapes:
        if name.endswith("relative_position_index"):
            filled[name] = relative_position_index(WINDOW)
    filled["criterion.empty_weight"] = torch.tensor([1.0] * CLASSES + [0.1])
    assert filled.keys() == shapes.keys()
    return filled


def older_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As transformers' earlier conversions name a Mask2Former's encoder."""
    encoder = "model.pixel_level_module.encoder."
    renamed = {}
    for name, value in state.items():
        for part in ("embeddings.", "encoder."):
            name = name.replace(f"{encoder}{part}", f"{encoder}model.{part}")
        for stage in range(4):
            name = name.replace(f"norms.stage{stage + 1}.", f"norms.{stage}.")
        renamed[name] = value
    return renamed


def check_equality(model: nn.Module, kind: str) -> None:
    expected = np.load(FIXTURES / f"{kind}.npz")
    image = torch.from_numpy(weights.make_image(1, 256, 288, seed=3)).double()
    with torch.no_grad():
        logits, masks = model.eval().double()(image)
    for got, want in ((logits, expected["logits"]), (masks, expected["masks"])):
        assert got.shape == want.shape
        assert np.abs(got.numpy() - want).max() <= 1e-6 * np.abs(want).max()


@KINDS
@pytest.mark.parametrize("older", [False, True])
def test_equal_weights_give_equal_queries(tmp_path: Path, kind: str, older: bool) -> None:
    state = peer_state_dict(kind)
    if older:
        state = older_names(state)
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    model = Model(kind)
    SeMaskCheckpointer(model, complete=True).load(str(path))
    check_equality(model, kind)


@KINDS
def test_every_parameter_counts(tmp_path: Path, kind: str) -> None:
    state = peer_state_dict(kind)
    del state["model.transformer_module.decoder.layers.1.fc1.bias"]
    state["model.transformer_module.decoder.layers.1.extra.bias"] = torch.zeros(1)
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    with pytest.raises(CheckpointError, match=r"1 missing.*linear1\.bias.*1 not .*extra"):
        SeMaskCheckpointer(Model(kind)).check(str(path))
