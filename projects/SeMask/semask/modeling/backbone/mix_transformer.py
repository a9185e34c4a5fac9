"""Mix Transformers B0 to B5 (SegFormer, arXiv 2105.15203), registered with timm as ``mit_b0``...

They have the structure of timm's PVTv2 (arXiv 2106.13797), with MLPs of four times the width in
every stage and other depths. The weights that NVIDIA has published for them may be used for
research and evaluation only; :mod:`semask.checkpoint.encoder_names` loads them.
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.pvt_v2 import PyramidVisionTransformerV2

# Variant: channels of the first stage, blocks of each stage.
_SIZES: dict[str, tuple[int, tuple[int, int, int, int]]] = {
    "mit_b0": (32, (2, 2, 2, 2)),
    "mit_b1": (64, (2, 2, 2, 2)),
    "mit_b2": (64, (3, 4, 6, 3)),
    "mit_b3": (64, (3, 4, 18, 3)),
    "mit_b4": (64, (3, 8, 27, 3)),
    "mit_b5": (64, (3, 6, 40, 3)),
}
# Read by timm's registry.
default_cfgs = generate_default_cfgs(
    {
        variant: {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
        for variant in _SIZES
    }
)


def mix_transformer(variant: str, pretrained: bool = False, **options: Any) -> Any:
    """Build a Mix Transformer from timm's PVTv2.

    Args:
        variant: "mit_b0" to "mit_b5".
        pretrained: must be False, as timm publishes no weights of these networks.
        options: of ``timm.create_model``.

    Raises:
        RuntimeError: ``pretrained`` is set.
    """
    if pretrained:
        raise RuntimeError("timm publishes no weights of Mix Transformers")
    width, depths = _SIZES[variant]
    wide = (32, 64, 160, 256) if width == 32 else (64, 128, 320, 512)
    arguments = {
        "embed_dims": wide,
        "depths": depths,
        "num_heads": (1, 2, 5, 8),
        "mlp_ratios": (4, 4, 4, 4),
        "sr_ratios": (8, 4, 2, 1),
    }
    return build_model_with_cfg(
        PyramidVisionTransformerV2,
        variant,
        pretrained=False,
        feature_cfg={"flatten_sequential": True, "out_indices": (0, 1, 2, 3)},
        **{**arguments, **options},
    )


@register_model
def mit_b0(pretrained: bool = False, **options: Any) -> Any:
    """3.3 million parameters."""
    return mix_transformer("mit_b0", pretrained, **options)


@register_model
def mit_b1(pretrained: bool = False, **options: Any) -> Any:
    """13.2 million parameters."""
    return mix_transformer("mit_b1", pretrained, **options)


@register_model
def mit_b2(pretrained: bool = False, **options: Any) -> Any:
    """24.2 million parameters."""
    return mix_transformer("mit_b2", pretrained, **options)


@register_model
def mit_b3(pretrained: bool = False, **options: Any) -> Any:
    """44.1 million parameters."""
    return mix_transformer("mit_b3", pretrained, **options)


@register_model
def mit_b4(pretrained: bool = False, **options: Any) -> Any:
    """60.8 million parameters."""
    return mix_transformer("mit_b4", pretrained, **options)


@register_model
def mit_b5(pretrained: bool = False, **options: Any) -> Any:
    """81.4 million parameters."""
    return mix_transformer("mit_b5", pretrained, **options)
