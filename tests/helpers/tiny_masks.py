"""A smallest SeMask with a mask decoder, and images with masks for it."""

from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Instances
from torch import nn

import tiny
from semask.config import load_config
from semask.modeling.heads import mask_classification

CLASSES = 5
DECODERS = tuple(mask_classification.DECODERS)


def config(decoder: str = "mask2former", **overrides: Any) -> CfgNode:
    """Overrides are below MODEL; ``MASK_FORMER__TEST__INSTANCE_ON`` is a key's name."""
    settings: dict[str, Any] = {
        "META_ARCHITECTURE": "SeMaskMaskFormer",
        "DEVICE": "cpu",
        "BACKBONE__NAME": "SeMaskSwin",
        "SWIN__EMBED_DIM": 8,
        "SWIN__DEPTHS": [1, 1, 1, 1],
        "SWIN__NUM_HEADS": [1, 2, 2, 4],
        "SWIN__WINDOW_SIZE": 4,
        "SWIN__DROP_PATH_RATE": 0.0,
        "SEM_SEG_HEAD__NAME": "MaskClassificationHead",
        "SEM_SEG_HEAD__IN_FEATURES": ["res2", "res3", "res4", "res5"],
        "SEM_SEG_HEAD__NUM_CLASSES": CLASSES,
        "SEM_SEG_HEAD__CONVS_DIM": 32,
        "SEM_SEG_HEAD__MASK_DIM": 32,
        "SEM_SEG_HEAD__NORM": "GN",
        "SEM_SEG_HEAD__TRANSFORMER_ENC_LAYERS": 1,
        "MASK_FORMER__DECODER": decoder,
        "MASK_FORMER__NUM_OBJECT_QUERIES": 6,
        "MASK_FORMER__DEC_LAYERS": 3,
        "MASK_FORMER__HIDDEN_DIM": 32,
        "MASK_FORMER__DIM_FEEDFORWARD": 48,
        "MASK_FORMER__TRAIN_NUM_POINTS": 64,
        **overrides,
    }
    cfg = load_config()
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [120.0] * 3, [60.0] * 3
    for key, value in settings.items():
        cfg.merge_from_list(["MODEL." + key.replace("__", "."), value])
    return cfg


def build(decoder: str = "mask2former", **overrides: Any) -> Any:
    """Build a model with different predictions for each query, in evaluation mode."""
    torch.manual_seed(1)
    model = build_model(config(decoder, **overrides)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("gamma", "class_embed.weight", "mask_embed.layers.2.weight")):
            nn.init.normal_(parameter)
    return model


def write_config(path: Path, decoder: str = "mask2former", **sections: Any) -> str:
    """A config for whole runs on the dataset of ``tiny``; sections as for ``tiny.write_config``."""
    levels = ["res2", "res3", "res4", "res5"]
    own: dict[str, Any] = {
        "MODEL": {
            "META_ARCHITECTURE": "SeMaskMaskFormer",
            "DEVICE": "cpu",
            "SWIN": {
                "DEPTHS": [1, 1, 1, 1],
                "NUM_HEADS": [1, 2, 2, 4],
                "OUT_FEATURES": levels,
                "ACTIVATION_CHECKPOINT": [False] * 4,
            },
            "SEMASK": {"ATTENTION": ["window"] * 3 + ["global"], "NUM_BLOCKS": [1] * 4},
            "SEM_SEG_HEAD": {
                "NAME": "MaskClassificationHead",
                "IN_FEATURES": levels,
                "CONVS_DIM": 32,
                "MASK_DIM": 32,
                "NORM": "GN",
                "TRANSFORMER_ENC_LAYERS": 1,
            },
            "MASK_FORMER": {
                "DECODER": decoder,
                "NUM_OBJECT_QUERIES": 6,
                "DEC_LAYERS": 3,
                "HIDDEN_DIM": 32,
                "DIM_FEEDFORWARD": 48,
                "TRAIN_NUM_POINTS": 64,
            },
        },
        "INPUT": {
            "DATASET_MAPPER_NAME": "mask_former_semantic",
            "MIN_SIZE_TRAIN": [32, 40],
            "MAX_SIZE_TRAIN": 80,
            "SIZE_DIVISIBILITY": 32,
            "MIN_SIZE_TEST": 40,
            "MAX_SIZE_TEST": 80,
        },
        "SOLVER": {
            "OPTIMIZER": "ADAMW",
            "BASE_LR": 0.001,
            "NO_DECAY": ["layer_norm", "group_norm", "batch_norm", "embedding", "position"],
            "CLIP_GRADIENTS": {"ENABLED": True, "CLIP_TYPE": "full_model", "CLIP_VALUE": 0.01},
        },
        "TEST": {"AUG": {"MIN_SIZES": [32, 40], "MAX_SIZE": 80}},
    }
    tiny.merge(own, sections)
    return tiny.write_config(path, **own)


def checkpoint(folder: Path, decoder: str = "mask2former") -> str:
    """The weights of a model whose queries differ, in a file beside its ``config.yaml``."""
    # Two numbers in each group of the norm at stride 32, where small images are one pixel.
    wide = {"SEM_SEG_HEAD": {"CONVS_DIM": 64}, "MASK_FORMER": {"HIDDEN_DIM": 64}}
    cfg = load_config(write_config(folder / "config.yaml", decoder, MODEL=wide))
    torch.manual_seed(6)  # with which every class is predicted somewhere
    model = build_model(cfg)
    for name, parameter in model.named_parameters():
        if name.endswith(("gamma", "class_embed.weight", "mask_embed.layers.2.weight")):
            nn.init.normal_(parameter, std=3.0)
    torch.save({"model": model.state_dict()}, folder / "model.pth")
    return str(folder / "model.pth")


def batch(*sizes: tuple[int, int], empty: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    """Images with a mask for each class; those of ``empty`` have no target and no valid pixel."""
    generator = torch.Generator().manual_seed(5)
    samples = []
    for index, (height, width) in enumerate(sizes):
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        coarse = torch.randint(0, CLASSES, (height // 8 + 1, width // 8 + 1), generator=generator)
        label = coarse.repeat_interleave(8, 0).repeat_interleave(8, 1)[:height, :width].clone()
        label[: height // 5] = 255
        if index in empty:
            label[:] = 255
        classes = label.unique()
        classes = classes[classes != 255]
        samples.append(
            {
                "file_name": f"{index}.png",
                "image": image,
                "sem_seg": label,
                "instances": Instances(
                    (height, width),
                    gt_classes=classes,
                    gt_masks=label[None] == classes[:, None, None],
                ),
                "height": height + 9,
                "width": width - 3,
            }
        )
    return samples
