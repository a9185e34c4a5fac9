"""Chooses faster forms and puts them into a built model.

A faster form is a subclass of the plain module in :mod:`semask.modeling` that it replaces. It
computes the same, up to rounding, from the same parameters and buffers. ``apply_fast_paths``
changes the class of a module that has been built (as PyTorch's ``fully_shard`` does), so names in
the state dict, hooks, optimizers and references to the module stay as they are. A form's ``set_up``
may add attributes, such as caches, or change how a module computes: :class:`EarlySumFPN` sets
the memory format of its parameters and in-place activations.

``MODEL.FAST_PATHS`` "none" is exactly the classes of :mod:`semask.modeling`.
"""

import contextlib
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d
from torch import nn

from semask.errors import ConfigError
from semask.modeling.backbone.semantic_layer import SemanticAttention, SemanticLayer
from semask.modeling.backbone.semask import SeMaskBackbone
from semask.modeling.backbone.swin import PatchEmbed, PatchMerging, SwinBlock
from semask.modeling.backbone.windows import WindowAttention
from semask.modeling.layers.deformable_attention import MultiScaleDeformableAttention
from semask.modeling.losses.cross_entropy import SegmentationLoss
from semask.modeling.losses.mask_losses import Mask2FormerCriterion
from semask.modeling.losses.matcher import Mask2FormerMatcher
from semask.modeling.mask_decoder.mask2former import Mask2FormerDecoder
from semask.modeling.meta_arch.mask_classification import SeMaskMaskFormer
from semask.modeling.meta_arch.protocol import MultiScale, SlidingWindow, WholeImage
from semask.modeling.meta_arch.semantic import SeMaskSegmentor
from semask.modeling.pixel_decoder.deformable import DeformablePixelDecoder, Encoder, EncoderLayer
from semask.modeling.pixel_decoder.semantic_fpn import SemanticFPNDecoder
from semask.ops.convolutions import LinearConv2d, PlainLinearConv2d, WinogradConv2d
from semask.ops.deformable_attention import BaggedDeformableAttention
from semask.ops.malloc import can_keep_memory
from semask.ops.mask_decoder import LevelledMask2FormerDecoder
from semask.ops.mask_losses import FactoredCriterion, OneSoftplusMatcher
from semask.ops.pixel_decoder import (
    ChunkedEncoder,
    LeanDeformablePixelDecoder,
    RecomputedEncoderLayer,
)
from semask.ops.products import OneDnnLinear, onednn_is_faster
from semask.ops.semantic_fpn import BandedFPN, EarlySumFPN
from semask.ops.semantic_layer import (
    ChunkedSemanticLayer,
    FoldedSemanticAttention,
    GatheredSemanticLayer,
    RecomputedSemanticLayer,
    SplitSemanticAttention,
)
from semask.ops.streamed import (
    StreamedMaskFormer,
    StreamedMultiScale,
    StreamedSegmentor,
    StreamedSlidingWindow,
    StreamedWholeImage,
)
from semask.ops.striped_loss import StripedSegmentationLoss
from semask.ops.swin import (
    ChunkedPatchEmbed,
    ChunkedPatchMerging,
    ChunkedSwinBlock,
    GatheredWindowAttention,
    RecomputedSwinBlock,
    SdpaWindowAttention,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FastPath:
    """One way to be faster.

    Attributes:
        does: a description, for the log.
        pays_on: types of the devices on which "auto" takes it; None = all of them.
        forms: {plain class: the subclass that takes its place}. A form calls ``super()`` where
            it does not apply (in training, say, or under autocast), so several forms of one
            class can be combined. Empty where it changes something other than the model.
        available: whether this installation can do it.
        spared: modules of a model that stay plain because the form is not faster there.
    """

    does: str
    pays_on: Collection[str] | None = None
    forms: Mapping[type[nn.Module], type[nn.Module]] = field(default_factory=dict)
    available: Callable[[], bool] = lambda: True
    spared: Callable[[nn.Module], Iterable[nn.Module]] = lambda model: ()


def _not_worth_recomputing(model: nn.Module) -> Iterator[nn.Module]:
    """The last stage, whose maps are small, and semantic layers that are recomputed already.

    ``ACTIVATION_CHECKPOINT`` recomputes whole stages. The blocks of such a stage are not spared:
    they are recomputed once with the stage, which then keeps only their inputs, and once more for
    their own gradient.
    """
    for backbone in model.modules():
        if not isinstance(backbone, SeMaskBackbone):
            continue
        yield from backbone.encoder.stages[-1].modules()
        for stage, name in enumerate(backbone.names):
            last = stage == len(backbone.names) - 1
            if name in backbone.semantic_layers and (last or backbone.activation_checkpoint[stage]):
                yield backbone.semantic_layers[name]


# In this order: of two forms of one class, the later one is tried first.
FAST_PATHS = {
    "striped_loss": FastPath(
        "up-sampling and cross entropy a stripe of rows at a time",
        forms={SegmentationLoss: StripedSegmentationLoss},
    ),
    # No module changes: `build_optimizer` in solver.py reads this name.
    "fused_optimizer": FastPath("AdamW's update in one kernel", pays_on=("cpu", "cuda")),
    "winograd": FastPath(
        "3x3 convolutions by Winograd's products",
        pays_on=("cpu",),
        forms={Conv2d: WinogradConv2d},
    ),
    "early_sum": FastPath(
        "the FPN decoder's maps are summed in front of their last up-sampling",
        forms={SemanticFPNDecoder: EarlySumFPN},
    ),
    "streamed": FastPath(
        "evaluation's scores a stripe of rows at a time",
        forms={
            MultiScale: StreamedMultiScale,
            SeMaskMaskFormer: StreamedMaskFormer,
            SeMaskSegmentor: StreamedSegmentor,
            SlidingWindow: StreamedSlidingWindow,
            WholeImage: StreamedWholeImage,
        },
    ),
    "gathered": FastPath(
        "windows cut by one gather",
        forms={WindowAttention: GatheredWindowAttention, SemanticLayer: GatheredSemanticLayer},
    ),
    "split": FastPath(
        "evaluation with the similarities of a few queries at a time",
        forms={SemanticAttention: SplitSemanticAttention},
    ),
    "folded": FastPath(
        "evaluation with products of the semantic layers' matrices",
        pays_on=("cpu", "cuda"),
        forms={SemanticAttention: FoldedSemanticAttention},
    ),
    "chunked": FastPath(
        "evaluation a few windows, queries or rows at a time",
        pays_on=("cpu",),
        forms={
            DeformablePixelDecoder: LeanDeformablePixelDecoder,
            Encoder: ChunkedEncoder,
            PatchEmbed: ChunkedPatchEmbed,
            PatchMerging: ChunkedPatchMerging,
            SemanticFPNDecoder: BandedFPN,
            SemanticLayer: ChunkedSemanticLayer,
            SwinBlock: ChunkedSwinBlock,
        },
    ),
    "recomputed": FastPath(
        "training keeps the input of windows and feed-forward layers and recomputes the rest",
        pays_on=("cpu",),
        forms={
            EncoderLayer: RecomputedEncoderLayer,
            SemanticLayer: RecomputedSemanticLayer,
            SwinBlock: RecomputedSwinBlock,
        },
        spared=_not_worth_recomputing,
    ),
    "bagged": FastPath(
        "the points of deformable attention are summed by embedding_bag",
        pays_on=("cpu",),
        forms={MultiScaleDeformableAttention: BaggedDeformableAttention},
    ),
    "pointwise": FastPath(
        "1x1 convolutions of maps in channels_last as linear layers",
        pays_on=("cpu",),
        forms={Conv2d: LinearConv2d, nn.Conv2d: PlainLinearConv2d},
    ),
    "levelled": FastPath(
        "attention masks from mask features of the size of the map that is attended to",
        forms={Mask2FormerDecoder: LevelledMask2FormerDecoder},
    ),
    "factored": FastPath(
        "mask losses with gradients of the matched masks alone",
        forms={Mask2FormerCriterion: FactoredCriterion, Mask2FormerMatcher: OneSoftplusMatcher},
    ),
    "onednn": FastPath(
        "float32 linear layers by oneDNN, on AMD's processors with AVX-512",
        pays_on=("cpu",),
        forms={nn.Linear: OneDnnLinear},
        available=onednn_is_faster,
    ),
    "sdpa": FastPath(
        "window attention by scaled_dot_product_attention",
        pays_on=("cuda",),
        forms={WindowAttention: SdpaWindowAttention},
    ),
    # No module changes: `prepare_process` in engine/launch/run_setup.py reads this name.
    "kept_memory": FastPath(
        "the process keeps the memory that it frees, for the next step",
        pays_on=("cpu",),
        available=can_keep_memory,
    ),
}


def select_fast_paths(cfg: CfgNode) -> frozenset[str]:
    """The names of the forms that a config enables, whether or not they apply to its model.

    Args:
        cfg: ``MODEL.FAST_PATHS``, "auto", "none" or names with commas between them, and
            ``MODEL.DEVICE``.

    Raises:
        ConfigError: there is no form of that name.
    """
    setting, device = cfg.MODEL.FAST_PATHS, torch.device(cfg.MODEL.DEVICE).type
    if setting == "auto":
        names = [
            name
            for name, path in FAST_PATHS.items()
            if (path.pays_on is None or device in path.pays_on) and path.available()
        ]
    else:
        names = [name.strip() for name in setting.split(",") if setting != "none"]
    unknown = [name for name in names if name not in FAST_PATHS]
    if unknown:
        raise ConfigError(
            f"MODEL.FAST_PATHS is '{setting}', and there is no '{unknown[0]}'; use 'auto', 'none' "
            f"or a comma-separated list of {', '.join(FAST_PATHS)}."
        )
    return frozenset(names)


def apply_selected_fast_paths(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """Put the forms that a config enables into its model, in place, and log those applied.

    Args:
        cfg: see :func:`select_fast_paths`.
        model: see :func:`apply_fast_paths`.

    Returns:
        ``model``.

    Raises:
        ConfigError: there is no form of a name in ``MODEL.FAST_PATHS``.
    """
    names = select_fast_paths(cfg)
    apply_fast_paths(model, names)
    applied = [
        f"{name} ({path.does})"
        for name, path in FAST_PATHS.items()
        if name in names
        and any(isinstance(module, tuple(path.forms.values())) for module in model.modules())
    ]
    logger.info(
        "Fast paths in the model on %s (MODEL.FAST_PATHS '%s'): %s",
        cfg.MODEL.DEVICE,
        cfg.MODEL.FAST_PATHS,
        "; ".join(applied) or "none",
    )
    return model


def apply_fast_paths(model: nn.Module, names: Collection[str]) -> nn.Module:
    """Put faster forms into a model, in place.

    A module is changed where its class is exactly the plain one: a subclass may compute something
    else. A form's method ``set_up``, if it has one, is called once on each module.

    Args:
        model: built, on any device, before the optimizer, ``DistributedDataParallel`` and
            ``torch.compile``.
        names: of entries of ``FAST_PATHS``; see :func:`select_fast_paths`.

    Returns:
        ``model``.
    """
    return apply_to_modules(model, [path for name, path in FAST_PATHS.items() if name in names])


def apply_to_modules(model: nn.Module, paths: Collection[FastPath]) -> nn.Module:
    """As :func:`apply_fast_paths`, with forms that need not be in the table.

    Args:
        model: see :func:`apply_fast_paths`.
        paths: later ones are tried first where several have a form of the same class.

    Returns:
        ``model``.
    """
    spared = [set(path.spared(model)) for path in paths]
    for module in list(model.modules()):
        plain = type(module)
        forms = [
            path.forms[plain]
            for path, modules in zip(paths, spared, strict=True)
            if plain in path.forms and module not in modules
        ]
        if not forms:
            continue
        module.__class__ = _combined(plain, tuple(reversed(forms)))
        for form in forms:
            set_up = getattr(form, "set_up", None)
            if set_up is not None:
                set_up(module)
    return model


@contextlib.contextmanager
def plain_forms(model: nn.Module) -> Iterator[None]:
    """Within it, the modules of a model have the classes of :mod:`semask.modeling` again.

    What a form's ``set_up`` has changed stays: memory formats and in-place activations, which
    change values by rounding at most.
    """
    plain = {form: each for path in FAST_PATHS.values() for each, form in path.forms.items()}
    fast = [(module, type(module)) for module in model.modules()]
    fast = [(module, own) for module, own in fast if any(base in plain for base in own.__mro__)]
    try:
        for module, own in fast:
            module.__class__ = next(plain[base] for base in own.__mro__ if base in plain)
        yield
    finally:
        for module, own in fast:
            module.__class__ = own


# One class for each combination, so that equal models have equal classes.
_combinations: dict[tuple[type[nn.Module], ...], type[nn.Module]] = {}


def _combined(plain: type[nn.Module], forms: tuple[type[nn.Module], ...]) -> type[nn.Module]:
    if len(forms) == 1:
        return forms[0]
    if forms not in _combinations:

        def reduce(self: nn.Module, _protocol: int) -> tuple[Any, ...]:
            # pickle looks classes up by name, and one name stands for several combinations here.
            return _uninitialized, (plain, forms), self.__dict__

        members = {"__module__": __name__, "__reduce_ex__": reduce}
        _combinations[forms] = type(f"Fast{plain.__name__}", forms, members)
    return _combinations[forms]


def _uninitialized(plain: type[nn.Module], forms: tuple[type[nn.Module], ...]) -> nn.Module:
    """A module of a combined class, whose state pickle fills in."""
    combined = _combined(plain, forms)
    return combined.__new__(combined)
