"""The interface of pixel decoders: four features to one fine map and three coarser ones."""

from abc import abstractmethod
from collections.abc import Callable, Mapping

import torch.nn.functional as F
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from torch import Tensor, nn

from semask.errors import ConfigError

STRIDES = (4, 8, 16, 32)


class PixelDecoder(nn.Module):
    """Compute the map that masks are predicted from, and maps for a transformer to attend to.

    Attributes:
        in_features: names of the input features, of strides 4, 8, 16 and 32.
    """

    def __init__(
        self, *, input_shape: Mapping[str, ShapeSpec], channels: int, mask_channels: int, norm: str
    ) -> None:
        """
        Args:
            input_shape: channels and stride of the features, by name.
            channels: of the convolutions and of the multi-scale features.
            mask_channels: of the mask features.
            norm: of the convolutions, as ``detectron2.layers.get_norm`` takes it; "" = none.

        Raises:
            ConfigError: the strides are not 4, 8, 16 and 32, or a number is out of its range.
        """
        super().__init__()
        self.in_features = _ordered_features(input_shape)
        for key, value in (("CONVS_DIM", channels), ("MASK_DIM", mask_channels)):
            if value < 1:
                raise ConfigError(f"MODEL.SEM_SEG_HEAD.{key} must be at least 1, got {value}.")
        if norm == "GN" and channels % 32:
            raise ConfigError(
                "MODEL.SEM_SEG_HEAD.CONVS_DIM must be a multiple of the 32 groups that "
                f"MODEL.SEM_SEG_HEAD.NORM 'GN' has, got {channels}."
            )

    @abstractmethod
    def forward(self, features: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """
        Args:
            features: {name: (B, C_i, H_i, W_i)}; other entries are ignored.

        Returns:
            The mask features (B, mask_channels, H / 4, W / 4), and the multi-scale features
            (B, channels, H / s, W / s) for the strides s = 32, 16, 8.
        """

    def pick(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        """The features of strides 4, 8, 16 and 32.

        Raises:
            ConfigError: one is missing.
        """
        missing = [name for name in self.in_features if name not in features]
        if missing:
            raise ConfigError(
                f"The pixel decoder reads {', '.join(self.in_features)} "
                f"(MODEL.SEM_SEG_HEAD.IN_FEATURES), and the backbone returned no "
                f"{', '.join(missing)}; it returned {', '.join(features) or 'nothing'}."
            )
        return [features[name] for name in self.in_features]


def _ordered_features(input_shape: Mapping[str, ShapeSpec]) -> list[str]:
    ordered = sorted(input_shape.items(), key=lambda item: item[1].stride or 0)
    if tuple(shape.stride for _, shape in ordered) != STRIDES:
        got = ", ".join(f"{name} of stride {shape.stride}" for name, shape in ordered) or "none"
        raise ConfigError(
            "A pixel decoder needs four features, of strides "
            f"{', '.join(map(str, STRIDES))}; MODEL.SEM_SEG_HEAD.IN_FEATURES and the backbone "
            f"give {got}."
        )
    return [name for name, _ in ordered]


def lateral_conv(in_channels: int, channels: int, norm: str) -> Conv2d:
    """The 1x1 convolution from a feature to the decoder's channels; no activation."""
    return _conv(in_channels, channels, 1, norm, None)


def output_conv(in_channels: int, channels: int, norm: str) -> Conv2d:
    """The 3x3 convolution, normalisation and ReLU after a sum of two maps."""
    return _conv(in_channels, channels, 3, norm, F.relu)


def mask_conv(channels: int, mask_channels: int, kernel_size: int) -> Conv2d:
    """The convolution with bias that makes the mask features."""
    conv = Conv2d(channels, mask_channels, kernel_size=kernel_size, padding=kernel_size // 2)
    init_conv(conv)
    return conv


def init_conv(conv: nn.Conv2d) -> None:
    """Kaiming uniform with a = 1, bias 0."""
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def _conv(
    in_channels: int,
    channels: int,
    kernel_size: int,
    norm: str,
    activation: Callable[[Tensor], Tensor] | None,
) -> Conv2d:
    conv = Conv2d(
        in_channels,
        channels,
        kernel_size=kernel_size,
        padding=kernel_size // 2,
        bias=not norm,
        norm=get_norm(norm, channels),
        activation=activation,
    )
    init_conv(conv)
    return conv
