"""A small model by this project's names, for checkpoints that load in no time."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Toy(nn.Module):
    """The names of a small model: a backbone's, with or without semantic layers, and a head's."""

    def __init__(self, classes: int = 3, dim: int = 4, window: int = 2, semantic: bool = True):
        super().__init__()
        rows = (2 * window - 1) ** 2
        blocks = nn.ModuleList([nn.ModuleDict({"attn": BiasTable(rows, dim)})])
        semantic_layer = nn.ModuleDict({"query": nn.Linear(dim, classes)})
        self.backbone = nn.ModuleDict(
            {
                "encoder": nn.ModuleDict(
                    {
                        "stem": nn.ModuleDict(
                            {"patch_embed": nn.ModuleDict({"proj": nn.Linear(3, dim)})}
                        ),
                        "stages": nn.ModuleList([nn.ModuleDict({"blocks": blocks})]),
                    }
                ),
                "semantic_layers": nn.ModuleDict({"res2": semantic_layer} if semantic else {}),
                "output_norms": nn.ModuleDict({"res2": nn.LayerNorm(dim)}),
            }
        )
        self.sem_seg_head = nn.ModuleDict({"predictor": nn.Linear(dim, classes)})


class BiasTable(nn.Module):
    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.randn(rows, 1))
        self.qkv = nn.Linear(dim, 3 * dim)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def imagenet(model: Toy) -> dict[str, Tensor]:
    """The backbone's values by the names of an ImageNet Swin checkpoint."""
    state = values(model)
    table = "blocks.0.attn.relative_position_bias_table"
    return {
        "patch_embed.proj.weight": state["backbone.encoder.stem.patch_embed.proj.weight"],
        "patch_embed.proj.bias": state["backbone.encoder.stem.patch_embed.proj.bias"],
        "layers.0.blocks.0.attn.qkv.weight": state[
            "backbone.encoder.stages.0.blocks.0.attn.qkv.weight"
        ],
        "layers.0.blocks.0.attn.qkv.bias": state[
            "backbone.encoder.stages.0.blocks.0.attn.qkv.bias"
        ],
        f"layers.0.{table}": state[f"backbone.encoder.stages.0.{table}"],
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(4, 4),
        "layers.0.blocks.1.attn_mask": torch.zeros(1, 4, 4),
        "norm.weight": torch.ones(4),
        "norm.bias": torch.zeros(4),
        "head.weight": torch.zeros(1000, 4),
        "head.bias": torch.zeros(1000),
    }


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path
