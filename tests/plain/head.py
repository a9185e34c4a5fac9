"""Semantic FPN (arXiv 1901.02446) and the semantic-prior head (arXiv 2112.12782)."""

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def enlarge(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class ConvModule(nn.Conv2d):
    """Convolution 3 x 3, BatchNorm, ReLU."""

    def __init__(self, in_channels: int, channels: int, sync: bool) -> None:
        super().__init__(in_channels, channels, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        self.norm = (nn.SyncBatchNorm if sync else nn.BatchNorm2d)(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(super().forward(x)))


class PlainFPNHead(nn.Module):
    """Features of stride 4, 8, 16, 32 to logits of stride 4."""

    def __init__(
        self,
        in_channels: Sequence[int],
        *,
        classes: int,
        channels: int = 256,
        drop: float = 0.1,
        sync: bool = False,
    ) -> None:
        super().__init__()
        self.scale_heads = nn.ModuleDict()
        for stage, width in enumerate(in_channels):
            layers: list[nn.Module] = []
            for step in range(max(1, stage)):
                layers.append(ConvModule(width if step == 0 else channels, channels, sync))
                if stage > 0:
                    layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            self.scale_heads[f"res{stage + 2}"] = nn.Sequential(*layers)
        self.dropout = nn.Dropout2d(drop)
        self.predictor = nn.Conv2d(channels, classes, kernel_size=1)
        nn.init.normal_(self.predictor.weight, std=0.01)
        nn.init.constant_(self.predictor.get_parameter("bias"), 0.0)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        output = self.scale_heads["res2"](features["res2"])
        for name, head in self.scale_heads.items():
            if name != "res2":
                output = output + resize(head(features[name]), output.shape[-2:])
        return self.predictor(self.dropout(output))


class PlainPriorHead(nn.Module):
    """The stages' prior maps to prior logits of stride 4; None where no stage has one."""

    def forward(self, features: Mapping[str, Tensor]) -> Tensor | None:
        output = None
        for stage in range(len(features)):
            prior = features.get(f"prior{stage + 2}")
            if prior is None:
                continue
            for _ in range(stage):
                prior = enlarge(prior)
            prior = resize(prior, features["res2"].shape[-2:])
            output = prior if output is None else output + prior
        return output
