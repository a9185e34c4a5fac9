"""The whole model: images in, losses or logits of the images' size out."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor, nn

from .backbone import PlainBackbone
from .head import PlainFPNHead, PlainPriorHead, resize
from .loss import plain_loss


class PlainSegmentor(nn.Module):
    """Backbone, head, prior head and losses, with the inputs and outputs of the project's model.

    Args:
        num_classes: K.
        conv_dims, head_dropout, sync_batch_norm: of the Semantic-FPN head.
        ignore_value, loss_weight, prior_loss_weight, loss_reduction, ohem_pixels: of the losses;
            without a prior map, or with weight 0, there is no prior loss.
        pixel_mean, pixel_std: of each channel, 0..255.
        backbone: the arguments of ``PlainBackbone``.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        conv_dims: int = 256,
        head_dropout: float = 0.1,
        sync_batch_norm: bool = False,
        ignore_value: int = 255,
        loss_weight: float = 1.0,
        prior_loss_weight: float = 0.4,
        loss_reduction: str = "all",
        ohem_pixels: int = 0,
        pixel_mean: Sequence[float] = (123.675, 116.28, 103.53),
        pixel_std: Sequence[float] = (58.395, 57.12, 57.375),
        **backbone: Any,
    ) -> None:
        super().__init__()
        self.backbone = PlainBackbone(**{"semantic_classes": num_classes, **backbone})
        self.sem_seg_head = nn.Module()
        self.sem_seg_head.semantic_fpn = PlainFPNHead(
            [backbone["embed_dim"] * 2**stage for stage in range(len(backbone["depths"]))],
            classes=num_classes,
            channels=conv_dims,
            drop=head_dropout,
            sync=sync_batch_norm,
        )
        self.prior_head = PlainPriorHead()
        self.ignore_value = ignore_value
        self.loss_weight, self.prior_loss_weight = loss_weight, prior_loss_weight
        self.loss_reduction, self.ohem_pixels = loss_reduction, ohem_pixels
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    def logits(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Normalised (B, 3, H, W) to prediction and prior logits of stride 4."""
        features = self.backbone(images)
        head: Any = self.sem_seg_head
        return head.semantic_fpn(features), self.prior_head(features)

    def losses(self, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Of normalised images (B, 3, H, W) and labels (B, H, W)."""
        logits, prior = self.logits(images)
        common: dict[str, Any] = {
            "ignore_value": self.ignore_value,
            "reduction": self.loss_reduction,
        }
        loss = plain_loss(logits, target, ohem_pixels=self.ohem_pixels, **common)
        losses = {"loss_sem_seg": self.loss_weight * loss}
        if prior is not None and self.prior_loss_weight > 0:
            losses["loss_prior"] = self.prior_loss_weight * plain_loss(prior, target, **common)
        return losses

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Losses in training; else for each image "sem_seg", logits of (height, width)."""
        images = [self._normalized(inputs["image"]) for inputs in batched_inputs]
        if self.training:
            targets = [inputs["sem_seg"].to(images[0].device) for inputs in batched_inputs]
            return self.losses(
                torch.stack(_padded(images, 0)), torch.stack(_padded(targets, self.ignore_value))
            )
        if len({image.shape for image in images}) == 1:
            batches = [torch.stack(images)]
        else:
            batches = [image[None] for image in images]
        outputs = []
        for batch in batches:
            logits, _ = self.logits(batch)
            outputs += list(resize(logits, batch.shape[-2:]))
        results = []
        for inputs, logits, image in zip(batched_inputs, outputs, images, strict=True):
            size = (inputs.get("height", image.shape[-2]), inputs.get("width", image.shape[-1]))
            results.append({"sem_seg": resize(logits[None], size)[0]})
        return results

    def _normalized(self, image: Tensor) -> Tensor:
        mean: Any = self.pixel_mean
        return (image.to(mean.device) - mean) / self.pixel_std


def _padded(maps: Sequence[Tensor], value: float) -> list[Tensor]:
    """Right and bottom, to the largest height and width among them."""
    height = max(each.shape[-2] for each in maps)
    width = max(each.shape[-1] for each in maps)
    return [
        F.pad(each, (0, width - each.shape[-1], 0, height - each.shape[-2]), value=value)
        for each in maps
    ]


def plain_arguments(cfg: CfgNode) -> dict[str, Any]:
    """The arguments of ``PlainSegmentor`` for a config of the project.

    Raises:
        ValueError: the config asks for something that has no plain form here.
    """
    swin, semask, head = cfg.MODEL.SWIN, cfg.MODEL.SEMASK, cfg.MODEL.SEM_SEG_HEAD
    stages = [f"res{stage + 2}" for stage in range(len(swin.DEPTHS))]
    if (
        list(swin.OUT_FEATURES) != stages
        or list(head.IN_FEATURES) != stages
        or swin.ABSOLUTE_POS_EMBED
        or swin.FREEZE_AT
        or any(swin.ACTIVATION_CHECKPOINT)
        or head.NORM not in ("BN", "SyncBN")
        or semask.NUM_CLASSES not in (0, head.NUM_CLASSES)
        or cfg.TEST.PROTOCOL != "whole"
    ):
        raise ValueError(
            "The plain model has all stages as features, BN or SyncBN, and knows no absolute "
            "position embedding, frozen stage, activation checkpoint or other test protocol."
        )
    return {
        "embed_dim": swin.EMBED_DIM,
        "depths": list(swin.DEPTHS),
        "num_heads": list(swin.NUM_HEADS),
        "window_size": swin.WINDOW_SIZE,
        "mlp_ratio": swin.MLP_RATIO,
        "drop_rate": swin.DROP_RATE,
        "attn_drop_rate": swin.ATTN_DROP_RATE,
        "drop_path_rate": swin.DROP_PATH_RATE,
        "semantic_attention": list(semask.ATTENTION),
        "semantic_blocks": list(semask.NUM_BLOCKS),
        "semantic_window_size": semask.WINDOW_SIZE or None,
        "semantic_dropout": semask.DROPOUT,
        "num_classes": head.NUM_CLASSES,
        "conv_dims": head.CONVS_DIM,
        "head_dropout": head.DROPOUT,
        "sync_batch_norm": head.NORM == "SyncBN",
        "ignore_value": head.IGNORE_VALUE,
        "loss_weight": head.LOSS_WEIGHT,
        "prior_loss_weight": head.PRIOR_LOSS_WEIGHT,
        "loss_reduction": head.LOSS_REDUCTION,
        "ohem_pixels": head.OHEM_PIXELS,
        "pixel_mean": list(cfg.MODEL.PIXEL_MEAN),
        "pixel_std": list(cfg.MODEL.PIXEL_STD),
    }


def plain_model(cfg: CfgNode, weights_of: nn.Module | None = None) -> PlainSegmentor:
    """The plain model of a config, on the config's device.

    Args:
        cfg: of this project.
        weights_of: the project's model of the same config, whose parameters and statistics are
            copied; None = as initialised.
    """
    model = PlainSegmentor(**plain_arguments(cfg))
    if weights_of is not None:
        model.load_state_dict(weights_of.state_dict())
    return model.to(cfg.MODEL.DEVICE)
