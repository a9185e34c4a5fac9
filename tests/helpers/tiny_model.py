"""The smallest SeMask in which all parts have an effect, and its checkpoint, for predictions."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

import tiny
from semask.config.loading import load_config


def config(folder: Path, **test: Any) -> CfgNode:
    """The tiny config on the CPU, with keys of its section TEST; the file is ``config.yaml``."""
    sections = {"TEST": test, "MODEL": {"DEVICE": "cpu"}}
    return load_config(tiny.write_config(folder / "config.yaml", **sections))


def build_tiny_model(cfg: CfgNode) -> nn.Module:
    """Build a model with effective semantic attention, and logits that vary over the image."""
    torch.manual_seed(1)
    built = build_model(cfg).eval()
    for name, parameter in built.named_parameters():
        if name.endswith(("gamma", "predictor.weight")):
            nn.init.normal_(parameter)
    return built


def checkpoint(folder: Path) -> str:
    """The weights of ``build_tiny_model`` in a file."""
    path = folder / "model.pth"
    torch.save({"model": build_tiny_model(config(folder)).state_dict()}, path)
    return str(path)


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(height, width, 3) uint8: coarse blocks of colour with noise on them."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 200, (-(-height // 8), -(-width // 8), 3))
    blocks = coarse.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
    return (blocks + rng.integers(0, 56, blocks.shape)).astype(np.uint8)


def tensor(pixels: np.ndarray) -> Tensor:
    """(H, W, 3) to (3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
