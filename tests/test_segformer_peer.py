"""transformers' SegFormer encoder: the same weights give the same features here.

Its outputs are stored; ``fixtures/segformer/make.py`` makes them again.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from reference import weights
from semask.checkpoint import SeMaskCheckpointer
from semask.modeling import SeMaskTimm, TimmEncoder

FIXTURES = Path(__file__).parent / "fixtures" / "segformer"
CONTENT = json.loads((FIXTURES / "shapes.json").read_text())


def test_equal_weights_give_equal_features(tmp_path: Path) -> None:
    state = weights.fill_state_dict(CONTENT["state_dict"])
    save_file(
        {key: torch.from_numpy(value) for key, value in state.items()}, tmp_path / "a.safetensors"
    )
    backbone = SeMaskTimm(name="mit_b0", semantic_attention=["none"] * 4)
    SeMaskCheckpointer(nn.ModuleDict({"backbone": backbone})).load(str(tmp_path / "a.safetensors"))
    encoder = backbone.encoder.eval().double()
    for module in encoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5  # as the peer's, whatever its config says
    x = encoder.stem(torch.from_numpy(weights.make_image(1, 72, 100, seed=3)).double())
    expected = np.load(FIXTURES / "mit_b0.npz")
    with torch.no_grad():
        for index, stage in enumerate(encoder.stages):
            x = stage(x)
            want = expected[f"stage{index}"]
            assert x.shape == want.shape
            assert np.abs(x.numpy() - want).max() <= 1e-6 * np.abs(want).max()


def test_epsilons_are_those_of_the_published_configs() -> None:
    """1e-6 where the authors name it, PyTorch's own where they do not."""
    norms = {
        name: module.eps
        for name, module in TimmEncoder("mit_b0").network.named_modules()
        if isinstance(module, nn.LayerNorm)
    }
    for name, eps in norms.items():
        default = name.startswith("patch_embed.") or ".downsample." in name or ".attn." in name
        assert eps == (1e-5 if default else 1e-6), name


@pytest.mark.parametrize("variant", CONTENT["parameters"])
def test_parameters(variant: str) -> None:
    with torch.device("meta"):
        network = TimmEncoder(variant).network
    assert sum(p.numel() for p in network.parameters()) == CONTENT["parameters"][variant]
