"""Every mask-classification config carries its whole published recipe.

The table is written out here, independently of the configuration files and of how they inherit.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.modeling import build_model

from semask.config import load_config
from semask.data import InstanceMapper
from semask.data.mappers.mask_semantic import MaskFormerSemanticMapper, build_mask_test_scales
from semask.data.mappers.panoptic import PanopticMapper
from semask.data.transforms.geometry import RandomCropWithCategoryLimit
from semask.data.transforms.photometric import PhotometricDistortion
from semask.data.transforms.resizing import (
    PadToFixedSize,
    PadToSquare,
    RandomWindow,
    ResizeShortEdge,
)
from semask.solver import build_lr_scheduler, build_optimizer
from semask.tasks import build_task

CONFIGS = Path(__file__).parents[1] / "configs"

#: embed_dim, depths, heads, window
BACKBONES = {
    "tiny": (96, [2, 2, 6, 2], [3, 6, 12, 24], 7),
    "small": (96, [2, 2, 18, 2], [3, 6, 12, 24], 7),
    "base": (128, [2, 2, 18, 2], [4, 8, 16, 32], 12),
    "large": (192, [2, 2, 18, 2], [6, 12, 24, 48], 12),
}


@dataclass(frozen=True)
class Sizes:
    short_edges: tuple[int, ...]
    max_size: int
    crop: tuple[int, int]
    square: int  # -1 = not padded
    test: tuple[int, int]
    multi_scale: tuple[int, ...]
    multi_scale_max: int


def tenths(base: int) -> tuple[int, ...]:
    """0.5 to 2.0 times a size in steps of 0.1, floored."""
    return tuple(int(0.1 * factor * base) for factor in range(5, 21))


SMALL = Sizes(
    *(tenths(512), 2048, (512, 512), 512),
    *((512, 2048), (256, 384, 512, 640, 768, 896), 3584),
)
COCO = Sizes((), 0, (1024, 1024), 0, (800, 1333), (), 0)  # large-scale jitter
LARGE = Sizes(
    *(tenths(640), 2560, (640, 640), 640),
    *((640, 2560), (320, 480, 640, 800, 960, 1120), 4480),
)
SEMASK_LARGE_MASKFORMER = replace(LARGE, short_edges=(160, 320, 480, 640, 800, 960, 1120))
CITYSCAPES = Sizes(
    *(tenths(1024), 4096, (512, 1024), -1),
    *((1024, 2048), (512, 768, 1024, 1280, 1536, 1792), 4096),
)


@dataclass(frozen=True)
class Recipe:
    classes: int
    attention: str  # of the four stages: window, global or none, by first letter
    semantic_window: int
    decoder: str
    sizes: Sizes
    iterations: int = 160000
    lr: float = 1e-4
    backbone: float = 0.1
    decay: float = 0.05
    warmup: int = 0
    amp: bool = True
    weights: tuple[float, float, float] = (2.0, 5.0, 5.0)  # class, mask, dice
    dropout: float = 0.0
    layers: int = 9
    task: str = "semantic"
    prior_classes: int = 0  # 0 = as many as classes
    queries: int = 100
    steps: tuple[int, int] | None = None  # of a learning rate that falls to a tenth; None = poly
    keep_empty: bool = False


def recipes() -> dict[str, tuple[str, Recipe]]:
    table = {}
    for size, (_, _, _, window) in BACKBONES.items():
        sizes = LARGE if size in ("base", "large") else SMALL
        mask2former = Recipe(150, "wwwg", window, "mask2former", sizes)
        maskformer = replace(
            mask2former,
            decoder="maskformer",
            lr=6e-5,
            backbone=1.0,
            decay=0.01,
            warmup=1500,
            amp=False,
            weights=(1.0, 20.0, 1.0),
            dropout=0.1,
            layers=6,
        )
        cityscapes = replace(
            mask2former,
            classes=19,
            attention="wwww",
            semantic_window=7,
            sizes=CITYSCAPES,
            iterations=90000,
        )
        stuff = replace(mask2former, classes=171, attention="wwww", iterations=80000)
        table[f"ade20k/semask_swin_{size}_mask2former"] = (size, mask2former)
        for name in ("fapn", "msfapn"):
            decoder = f"mask2former_{name}"
            recipe = replace(mask2former, attention="wwgg", decoder=decoder)
            table[f"ade20k/semask_swin_{size}_{decoder}"] = (size, recipe)
        semask = replace(maskformer, sizes=SEMASK_LARGE_MASKFORMER if size == "large" else sizes)
        table[f"ade20k/semask_swin_{size}_maskformer"] = (size, semask)
        table[f"cityscapes/semask_swin_{size}_mask2former"] = (size, cityscapes)
        table[f"coco_stuff_10k/semask_swin_{size}_mask2former"] = (size, stuff)
        for name, recipe in (
            ("ade20k/swin_{}_mask2former", mask2former),
            ("ade20k/swin_{}_maskformer", maskformer),
            ("cityscapes/swin_{}_mask2former", cityscapes),
        ):
            table[name.format(size)] = (size, replace(recipe, attention="nnnn"))
        coco = replace(mask2former, attention="wwww", sizes=COCO)
        coco = replace(coco, steps=(327778, 355092), iterations=368750)
        if size == "large":
            coco = replace(coco, steps=(655556, 710184), iterations=737500, queries=200)
            of_things: dict[str, Any] = {"classes": 100, "prior_classes": 101, "attention": "wwww"}
            enter(table, "ade20k", size, "instance", replace(mask2former, **of_things, **MANY))
            enter(table, "ade20k", size, "panoptic", replace(mask2former, **MANY))
            of_things = {"classes": 8, "prior_classes": 9}
            enter(table, "cityscapes", size, "instance", replace(cityscapes, **of_things, **MANY))
            enter(table, "cityscapes", size, "panoptic", replace(cityscapes, **MANY))
        enter(table, "coco", size, "instance", replace(coco, classes=80, prior_classes=81))
        enter(table, "coco", size, "panoptic", replace(coco, classes=133, keep_empty=True))
    return table


MANY: dict[str, Any] = {"queries": 200, "keep_empty": True}


def enter(
    table: dict[str, tuple[str, Recipe]], folder: str, size: str, task: str, recipe: Recipe
) -> None:
    """A model of another task, with semantic layers and without."""
    recipe = replace(recipe, task=task)
    table[f"{folder}/semask_swin_{size}_mask2former_{task}"] = (size, recipe)
    table[f"{folder}/swin_{size}_mask2former_{task}"] = (size, replace(recipe, attention="nnnn"))


RECIPES = recipes()


@pytest.fixture(params=RECIPES)
def case(request: pytest.FixtureRequest) -> tuple[CfgNode, str, Recipe]:
    size, recipe = RECIPES[request.param]
    return load_config(str(CONFIGS / f"{request.param}.yaml")), size, recipe


def test_every_shipped_one_is_in_the_table() -> None:
    folders = ("ade20k", "cityscapes", "coco", "coco_stuff_10k")
    files = [file for folder in folders for file in (CONFIGS / folder).glob("*swin*former*.yaml")]
    assert {f"{file.parent.name}/{file.stem}" for file in files} == set(RECIPES)


def test_model(case: tuple[CfgNode, str, Recipe]) -> None:
    cfg, size, recipe = case
    swin, semask, former = cfg.MODEL.SWIN, cfg.MODEL.SEMASK, cfg.MODEL.MASK_FORMER
    found = (swin.EMBED_DIM, swin.DEPTHS, swin.NUM_HEADS, swin.WINDOW_SIZE)
    assert found == BACKBONES[size]
    assert swin.DROP_PATH_RATE == 0.3
    assert "".join(kind[0] for kind in semask.ATTENTION) == recipe.attention
    assert (semask.WINDOW_SIZE or swin.WINDOW_SIZE) == recipe.semantic_window
    assert semask.INIT == "live"
    assert recipe.classes == cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    assert cfg.MODEL.SEM_SEG_HEAD.PRIOR_LOSS_WEIGHT == 0.4
    assert recipe.decoder == former.DECODER
    assert recipe.weights == (former.CLASS_WEIGHT, former.MASK_WEIGHT, former.DICE_WEIGHT)
    assert former.NO_OBJECT_WEIGHT == 0.1
    assert recipe.queries == former.NUM_OBJECT_QUERIES
    if recipe.task != "semantic":
        assert (recipe.prior_classes or recipe.classes) == semask.NUM_CLASSES
    assert recipe.layers + (recipe.decoder != "maskformer") == former.DEC_LAYERS
    assert recipe.dropout == former.DROPOUT
    assert former.NHEADS == 8
    assert former.DEEP_SUPERVISION
    assert pytest.approx((123.675, 116.28, 103.53)) == cfg.MODEL.PIXEL_MEAN
    assert pytest.approx((58.395, 57.12, 57.375)) == cfg.MODEL.PIXEL_STD
    assert (former.TRAIN_NUM_POINTS, former.OVERSAMPLE_RATIO) == (12544, 3.0)
    assert former.IMPORTANCE_SAMPLE_RATIO == 0.75
    assert former.SIZE_DIVISIBILITY == 32
    assert recipe.task == cfg.TASK
    predicted = {
        "semantic": (True, False, False),
        "instance": (False, True, False),
        "panoptic": (True, True, True),
    }
    asked = (former.TEST.SEMANTIC_ON, former.TEST.INSTANCE_ON, former.TEST.PANOPTIC_ON)
    assert asked == predicted[recipe.task]
    if recipe.task != "semantic":
        assert cfg.TEST.DETECTIONS_PER_IMAGE == 100
    published = 0.7 if recipe.decoder == "maskformer" else 0.8
    assert (published, 0.8) == (former.TEST.OBJECT_MASK_THRESHOLD, former.TEST.OVERLAP_THRESHOLD)
    assert not former.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE


def test_input(case: tuple[CfgNode, str, Recipe]) -> None:
    cfg, _, recipe = case
    sizes = recipe.sizes
    mapper: Any = build_task(cfg).build_mapper(is_train=True)
    kinds = {
        "semantic": MaskFormerSemanticMapper,
        "instance": InstanceMapper,
        "panoptic": PanopticMapper,
    }
    assert type(mapper) is kinds[recipe.task]
    assert cfg.INPUT.FORMAT == "RGB"
    if recipe.task != "semantic":
        assert mapper.keep_empty == recipe.keep_empty
    if sizes is COCO:
        flip, scale, window, pad = mapper.augmentations.augs
        assert isinstance(scale, T.ResizeScale)
        assert (scale.min_scale, scale.max_scale) == (0.1, 2.0)
        assert (scale.target_height, scale.target_width) == sizes.crop
        assert isinstance(window, RandomWindow)
        assert (window.size, window.diagonal) == (sizes.crop, True)
        assert isinstance(pad, PadToFixedSize)
        assert (pad.size, pad.pixel, pad.ignore_value) == (sizes.crop, 128, 255)
    else:
        resize, crop, distortion, flip, *pads = mapper.augmentations.augs
        assert isinstance(resize, ResizeShortEdge)
        assert tuple(resize.short_edge_length) == sizes.short_edges
        rule = "nearest" if recipe.task == "semantic" else "nearest-exact"
        assert (resize.max_size, resize.label_interpolation) == (sizes.max_size, rule)
        assert isinstance(crop, RandomCropWithCategoryLimit)
        assert (crop.size, crop.max_category_area) == (sizes.crop, 1.0)
        assert isinstance(distortion, PhotometricDistortion)
        assert distortion.hue_inclusive
        if sizes.square > 0:
            (pad,) = pads
            assert isinstance(pad, PadToSquare)
            assert (pad.side, pad.pixel, pad.ignore_value) == (sizes.square, 128, 255)
        else:
            assert pads == []
    assert isinstance(flip, T.RandomFlip)
    assert (flip.prob, flip.horizontal, flip.vertical) == (0.5, True, False)
    (resize,) = build_task(cfg).build_mapper(is_train=False).augmentations.augs
    assert isinstance(resize, T.ResizeShortestEdge)
    assert {*resize.short_edge_length} == {sizes.test[0]}
    assert resize.max_size == sizes.test[1]
    if recipe.task == "semantic":
        cfg.TEST.PROTOCOL = "multi_scale"
        scales = build_mask_test_scales(cfg)
        lengths = tuple(size for scale in scales for size in scale.short_edge_length)
        assert lengths == sizes.multi_scale
        assert {scale.max_size for scale in scales} == {sizes.multi_scale_max}
        assert cfg.TEST.AUG.FROM_RESIZED
        assert cfg.TEST.MULTI_SCALE_FLIP


# Of each folder and task, with the names of its two splits.
DATASETS = {
    ("ade20k", "semantic"): "ade20k_raw_sem_seg_{}, train, val",
    ("ade20k", "instance"): "ade20k_instance_{}, train, val",
    ("ade20k", "panoptic"): "ade20k_panoptic_{}, train, val",
    ("cityscapes", "semantic"): "cityscapes_raw_sem_seg_{}, train, val",
    ("cityscapes", "instance"): "cityscapes_instance_{}, train, val",
    ("cityscapes", "panoptic"): "cityscapes_panoptic_{}, train, val",
    ("coco", "instance"): "coco_2017_{}, train, val",
    ("coco", "panoptic"): "coco_2017_{}_panoptic, train, val",
    ("coco_stuff_10k", "semantic"): "coco_stuff_10k_sem_seg_{}, train, test",
}

# Single scale, and several scales with flip; spec-masks E.4.
PUBLISHED = {
    "ade20k/swin_tiny_maskformer": "46.7 / 48.8",
    "ade20k/swin_small_maskformer": "49.8 / 51.0",
    "ade20k/swin_base_maskformer": "52.7 / 53.9",
    "ade20k/swin_large_maskformer": "54.1 / 55.6",
    "ade20k/swin_tiny_mask2former": "47.7 / 49.6",
    "ade20k/swin_small_mask2former": "51.3 / 52.4",
    "ade20k/swin_base_mask2former": "53.9 / 55.1",
    "ade20k/swin_large_mask2former": "56.1 / 57.3",
    "ade20k/semask_swin_large_maskformer": "54.75 / 56.15",
    "ade20k/semask_swin_large_mask2former": "56.41 / 57.52",
    "ade20k/semask_swin_large_mask2former_fapn": "56.88 / 58.25",
    "ade20k/semask_swin_large_mask2former_msfapn": "57.00 / 58.25",
    "cityscapes/swin_tiny_mask2former": "82.1 / 83.0",
    "cityscapes/swin_small_mask2former": "82.6 / 83.6",
    "cityscapes/swin_base_mask2former": "83.3 / 84.5",
    "cityscapes/swin_large_mask2former": "83.3 / 84.3",
    "cityscapes/semask_swin_large_mask2former": "83.97 / 84.98",
}


def test_every_published_score_has_its_config() -> None:
    assert set(PUBLISHED) <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_datasets_and_published_score(name: str) -> None:
    _, recipe = RECIPES[name]
    file = CONFIGS / f"{name}.yaml"
    cfg = load_config(str(file))
    dataset, *splits = DATASETS[name.split("/")[0], recipe.task].split(", ")
    used = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    assert used == [dataset.format(split) for split in splits]
    if recipe.task == "semantic":
        head = file.read_text().split("_BASE_")[0]
        score = re.search(r"Published mIoU, .*: ([\d./ ]+)\.$", head, re.MULTILINE)
        assert (score and score[1]) == PUBLISHED.get(name)
        assert ("Not published" in head) == (name not in PUBLISHED)


@pytest.mark.parametrize("decoder", ["maskformer", "mask2former"])
def test_prior_and_tables_of_a_whole_model(decoder: str) -> None:
    cfg = load_config(f"ade20k/semask_swin_tiny_{decoder}")
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    prior = model.prior_supervision
    assert (prior.weight, prior.num_classes, prior.ignore_value) == (0.4, 150, 255)
    assert prior.loss.reduction == "valid"
    assert prior.loss.align_corners
    assert prior.decoder.align_corners
    assert prior.loss.ohem_pixels == 0
    groups = build_optimizer(cfg, model).param_groups
    decays = {p: group["weight_decay"] for group in groups for p in group["params"]}
    tables = [p for name, p in model.named_parameters() if name.endswith("bias_table")]
    assert len(tables) == 12
    assert all(decays[table] == 0 for table in tables)
    gammas = [p for name, p in model.named_parameters() if name.endswith("gamma")]
    assert len(gammas) == 4
    assert all(decays[gamma] == cfg.SOLVER.WEIGHT_DECAY > 0 for gamma in gammas)


def test_solver(case: tuple[CfgNode, str, Recipe]) -> None:
    cfg, _, recipe = case
    solver = cfg.SOLVER
    assert (16, recipe.iterations) == (solver.IMS_PER_BATCH, solver.MAX_ITER)
    assert cfg.TEST.EVAL_PERIOD == 5000
    assert recipe.amp == solver.AMP.ENABLED
    assert not recipe.amp or solver.AMP.PRECISION == "float16"
    clip = solver.CLIP_GRADIENTS
    assert (clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE) == (True, "full_model", 0.01)
    model = torch.nn.ModuleDict(
        {
            "backbone": torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.LayerNorm(2)]),
            "sem_seg_head": torch.nn.ModuleList(
                [torch.nn.Linear(2, 2), torch.nn.GroupNorm(1, 2), torch.nn.Embedding(2, 2)]
            ),
        }
    )
    optimizer = build_optimizer(cfg, model)
    assert isinstance(optimizer, torch.optim.AdamW)
    rates = {
        parameter: (group["initial_lr"] if "initial_lr" in group else group["lr"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    decays = {
        parameter: group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for name, parameter in model.named_parameters():
        factor = recipe.backbone if name.startswith("backbone") else 1.0
        assert rates[parameter] == pytest.approx(recipe.lr * factor)
        is_linear = name.startswith(("backbone.0", "sem_seg_head.0"))
        assert decays[parameter] == (recipe.decay if is_linear else 0.0)
    group = optimizer.param_groups[0]
    assert (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8)
    base = group["lr"]
    scheduler = build_lr_scheduler(cfg, optimizer)
    if recipe.steps:
        assert tuple(solver.STEPS) == recipe.steps
        assert (solver.LR_SCHEDULER_NAME, solver.GAMMA) == ("WarmupMultiStepLR", 0.1)
    for step in range(3):
        poly = (1 - step / recipe.iterations) ** 0.9
        warm = 1e-6 * (1 - step / 1500) + step / 1500 if recipe.warmup else 1.0
        expected = 1.0 if recipe.steps else poly * warm
        assert group["lr"] == pytest.approx(base * expected, rel=1e-6)
        optimizer.step()
        scheduler.step()
