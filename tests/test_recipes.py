"""Every published configuration carries its whole published recipe (arXiv 2112.12782).

The table is written out here, independently of the configuration files and of how they inherit.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from torch import nn

from semask.config.loading import load_config
from semask.data.mappers.semantic import build_augmentations
from semask.data.transforms.geometry import PadToSize, RandomCropWithCategoryLimit, ResizeByScale
from semask.data.transforms.photometric import PhotometricDistortion
from semask.solver import build_lr_scheduler, build_optimizer

CONFIGS = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True)
class Variant:
    embed_dim: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int


VARIANTS = {
    "tiny": Variant(96, (2, 2, 6, 2), (3, 6, 12, 24), 7),
    "small": Variant(96, (2, 2, 18, 2), (3, 6, 12, 24), 7),
    "base": Variant(128, (2, 2, 18, 2), (4, 8, 16, 32), 12),
    "large": Variant(192, (2, 2, 18, 2), (6, 12, 24, 48), 12),
}


@dataclass(frozen=True)
class Recipe:
    classes: int
    attention: str  # of the four stages: window, global or none, by first letter
    lr: float
    weight_decay: float
    warmup_ratio: float
    images: int
    scale: tuple[int, int]
    factors: tuple[float, ...]
    sampling: str
    crop: int
    category_limit: float
    ohem: int


CHOICE = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
UNIFORM = (0.5, 2.0)

# The fields in the order of the class: K, attention, optimizer (base rate, decay, warm-up ratio,
# images per step), input (scale, factors, how they are drawn, crop, category limit), OHEM pixels.
ADE = (1e-4, 1e-4, 1e-6, 16)
CITY = (1e-3, 0.05, 1e-5, 8)
COCO = (1e-4, 1e-4, 1e-6, 16)
SEMASK = {
    "ade20k": {
        "tiny": Recipe(150, "wwgg", *ADE, (2048, 512), CHOICE, "choice", 512, 0.75, 0),
        "small": Recipe(150, "wwgg", *ADE, (2048, 512), CHOICE, "choice", 512, 1.0, 0),
        "base": Recipe(150, "wwww", *ADE, (2048, 512), CHOICE, "choice", 512, 1.0, 0),
        "large": Recipe(150, "wwgg", *ADE, (2560, 640), CHOICE, "choice", 640, 1.0, 100000),
    },
    "cityscapes": {
        "tiny": Recipe(19, "wwww", *CITY, (2048, 1024), UNIFORM, "range", 768, 0.75, 0),
        "small": Recipe(19, "wwww", *CITY, (2048, 1024), UNIFORM, "range", 768, 0.75, 0),
        "base": Recipe(
            *(19, "wwww", 1e-3, 0.05, 1e-6, 8),
            *((2048, 1024), UNIFORM, "range", 768, 0.75, 0),
        ),
        "large": Recipe(19, "wwww", *CITY, (2048, 1024), UNIFORM, "range", 768, 0.75, 0),
    },
    "coco_stuff_10k": {
        "tiny": Recipe(171, "wwgg", *COCO, (2048, 512), CHOICE, "choice", 512, 1.0, 100000),
        "small": Recipe(171, "wwgg", *COCO, (2048, 512), CHOICE, "choice", 512, 1.0, 100000),
        "base": Recipe(171, "wwww", *COCO, (2048, 512), CHOICE, "choice", 512, 1.0, 100000),
        "large": Recipe(171, "wwgg", *COCO, (2560, 640), CHOICE, "choice", 640, 1.0, 100000),
    },
}
RECIPES = {
    f"{dataset}/{name}": (variant, recipe)
    for dataset, variants in SEMASK.items()
    for variant, semask in variants.items()
    for name, recipe in (
        (f"semask_swin_{variant}_fpn", semask),
        # The Swin-FPN baselines: the same, with their own augmentation.
        (
            f"swin_{variant}_fpn",
            replace(
                *(semask,),
                attention="nnnn",
                factors=UNIFORM,
                sampling="range",
                category_limit=0.75,
            ),
        ),
    )
}


@pytest.fixture(params=RECIPES)
def case(request: pytest.FixtureRequest) -> tuple[CfgNode, str, Recipe]:
    variant, recipe = RECIPES[request.param]
    return load_config(str(CONFIGS / f"{request.param}.yaml")), variant, recipe


def test_there_are_24() -> None:
    assert len(RECIPES) == 24


def test_model(case: tuple[CfgNode, str, Recipe]) -> None:
    cfg, name, recipe = case
    variant, swin, head = VARIANTS[name], cfg.MODEL.SWIN, cfg.MODEL.SEM_SEG_HEAD
    assert variant.embed_dim == swin.EMBED_DIM
    assert tuple(swin.DEPTHS) == variant.depths
    assert tuple(swin.NUM_HEADS) == variant.heads
    assert variant.window == swin.WINDOW_SIZE
    assert cfg.MODEL.SEMASK.WINDOW_SIZE in (0, variant.window)  # 0: the same
    assert (swin.MLP_RATIO, swin.DROP_RATE, swin.ATTN_DROP_RATE) == (4.0, 0.0, 0.0)
    assert swin.DROP_PATH_RATE == 0.3
    assert not swin.ABSOLUTE_POS_EMBED
    assert swin.FREEZE_AT == 0
    assert "".join(kind[0] for kind in cfg.MODEL.SEMASK.ATTENTION) == recipe.attention
    assert cfg.MODEL.SEMASK.NUM_BLOCKS == [1, 1, 1, 1]
    assert cfg.MODEL.SEMASK.DROPOUT == 0.1
    assert cfg.MODEL.SEMASK.NUM_CLASSES in (0, recipe.classes)  # 0: as the head
    assert recipe.classes == head.NUM_CLASSES
    assert (head.CONVS_DIM, head.COMMON_STRIDE, head.DROPOUT) == (256, 4, 0.1)
    assert head.NORM == "SyncBN"


def test_loss(case: tuple[CfgNode, str, Recipe]) -> None:
    cfg, _, recipe = case
    head = cfg.MODEL.SEM_SEG_HEAD
    assert (head.LOSS_WEIGHT, head.PRIOR_LOSS_WEIGHT) == (1.0, 0.4)
    assert (head.LOSS_REDUCTION, head.IGNORE_VALUE) == ("all", 255)
    assert recipe.ohem == head.OHEM_PIXELS


def test_optimizer(case: tuple[CfgNode, str, Recipe]) -> None:
    cfg, _, recipe = case
    optimizer = build_optimizer(cfg, nn.Linear(1, 1))
    assert type(optimizer) is torch.optim.AdamW  # without gradient clipping
    (group,) = optimizer.param_groups
    assert tuple(group["betas"]) == (0.9, 0.999)
    assert (group["eps"], group["weight_decay"]) == (1e-8, recipe.weight_decay)
    assert recipe.images == cfg.SOLVER.IMS_PER_BATCH
    assert cfg.SOLVER.MAX_ITER == 80000
    assert not cfg.SOLVER.AMP.ENABLED
    assert not cfg.SOLVER.EMA.ENABLED
    assert cfg.SOLVER.ACCUMULATE_STEPS == 1
    assert cfg.SOLVER.REFERENCE_WORLD_SIZE == 0


def test_learning_rate(case: tuple[CfgNode, str, Recipe]) -> None:
    cfg, _, recipe = case
    optimizer = build_optimizer(cfg, nn.Linear(1, 1))
    scheduler = build_lr_scheduler(cfg, optimizer)
    optimizer.step()
    for t in (1, 700, 1499, 1500, 40000, 79999, 0):
        scheduler.last_epoch = t - 1
        scheduler.step()
        rate = recipe.lr * (1 - t / 80000)
        if t < 1500:
            rate *= 1 - (1 - t / 1500) * (1 - recipe.warmup_ratio)
        assert math.isclose(optimizer.param_groups[0]["lr"], rate, rel_tol=1e-9), t


def test_input(case: tuple[CfgNode, str, Recipe]) -> None:
    cfg, _, recipe = case
    resize, crop, flip, photometric, pad = build_augmentations(cfg, is_train=True)
    assert vars(resize)["scale"] == recipe.scale
    assert isinstance(resize, ResizeByScale)
    assert (tuple(resize.factors), resize.sampling) == (recipe.factors, recipe.sampling)
    assert isinstance(crop, RandomCropWithCategoryLimit)
    assert tuple(crop.size) == (recipe.crop, recipe.crop)
    assert crop.max_category_area == recipe.category_limit
    assert isinstance(flip, T.RandomFlip)
    assert (vars(flip)["prob"], vars(flip)["horizontal"]) == (0.5, True)
    assert isinstance(photometric, PhotometricDistortion)
    assert isinstance(pad, PadToSize)
    assert tuple(pad.size) == (recipe.crop, recipe.crop)
    (test_resize,) = build_augmentations(cfg, is_train=False)
    assert vars(test_resize)["scale"] == recipe.scale
    assert cfg.INPUT.FORMAT == "RGB"
    assert cfg.MODEL.PIXEL_MEAN == [123.675, 116.28, 103.53]
    assert cfg.MODEL.PIXEL_STD == [58.395, 57.12, 57.375]


def test_evaluation(case: tuple[CfgNode, str, Recipe]) -> None:
    cfg, _, _ = case
    assert cfg.MODEL.META_ARCHITECTURE == "SeMaskSegmentor"
    assert cfg.MODEL.EXPECTS_WEIGHTS
    assert cfg.TEST.PROTOCOL == "whole"
    assert list(CHOICE) == cfg.TEST.MULTI_SCALE_FACTORS
    assert cfg.TEST.MULTI_SCALE_FLIP
