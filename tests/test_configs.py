"""Every shipped config builds; the published ones have exactly the published parameters."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from timm.models import get_pretrained_cfg

from semask.config.loading import load_config

CONFIGS = Path(__file__).parents[1] / "configs"
SHIPPED = sorted(
    path.relative_to(CONFIGS).as_posix()
    for path in CONFIGS.rglob("*.yaml")
    if "_base_" not in path.parts
)
# arXiv 2112.12782; the Swin-FPN counts of the other data sets follow from the classifier's size.
PARAMETERS = {
    "ade20k/semask_swin_tiny_fpn.yaml": 34_655_748,
    "ade20k/semask_swin_small_fpn.yaml": 55_973_652,
    "ade20k/semask_swin_base_fpn.yaml": 96_485_826,
    "ade20k/semask_swin_large_fpn.yaml": 210_791_934,
    "cityscapes/semask_swin_tiny_fpn.yaml": 34_243_753,
    "cityscapes/semask_swin_small_fpn.yaml": 55_561_657,
    "cityscapes/semask_swin_base_fpn.yaml": 95_948_071,
    "cityscapes/semask_swin_large_fpn.yaml": 210_002_659,
    "coco_stuff_10k/semask_swin_tiny_fpn.yaml": 34_721_793,
    "coco_stuff_10k/semask_swin_small_fpn.yaml": 56_039_697,
    "coco_stuff_10k/semask_swin_base_fpn.yaml": 96_572_031,
    "coco_stuff_10k/semask_swin_large_fpn.yaml": 210_918_459,
    "ade20k/swin_tiny_fpn.yaml": 32_650_064,
    "ade20k/swin_small_fpn.yaml": 53_967_968,
    "ade20k/swin_base_fpn.yaml": 93_115_662,
    "ade20k/swin_large_fpn.yaml": 203_648_330,
}
CLASSES = {"ade20k": 150, "cityscapes": 19, "coco_stuff_10k": 171}
THINGS = {"ade20k": 100, "cityscapes": 8, "coco": 80}
for _variant in ("tiny", "small", "base", "large"):
    for _dataset in ("cityscapes", "coco_stuff_10k"):
        PARAMETERS[f"{_dataset}/swin_{_variant}_fpn.yaml"] = PARAMETERS[
            f"ade20k/swin_{_variant}_fpn.yaml"
        ] + (CLASSES[_dataset] - 150) * (256 + 1)
# What projects/SeMask/README.md says, as "| count | ... [name](config)" or "[count](config)".
TABLES = {
    name: int(count.replace(",", ""))
    for pattern in (
        r"\| ([\d,]{9,}) \|.*\(\.\./\.\./configs/(\S+\.yaml)\)",
        r"\[([\d,]{9,})\]\(\.\./\.\./configs/(\S+\.yaml)\)",
    )
    for count, name in re.findall(
        pattern, (CONFIGS.parent / "projects/SeMask/README.md").read_text()
    )
}


def build_on_meta(cfg: CfgNode) -> torch.nn.Module:
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)


def test_the_24_published_configs_are_shipped() -> None:
    assert len(PARAMETERS) == 24
    assert set(PARAMETERS) <= set(SHIPPED)


def slow_to_build(name: str) -> bool:
    """Whether `make quick` leaves a config out, which differs from the tiny one in sizes alone."""
    return re.search(r"swin_(small|base|large)_|convnext_base_|_b[25]_", name) is not None


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if slow_to_build(name) else name
        for name in SHIPPED
    ],
)
def test_config_builds(name: str) -> None:
    cfg = load_config(str(CONFIGS / name))
    if cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 0:  # those of a dataset that is not here
        cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 2
        cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON = False
    model = build_on_meta(cfg)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == PARAMETERS.get(name, count) == TABLES.get(name, count)
    if name.split("/")[0] in CLASSES:
        assert name in TABLES
    num_classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    of_task = THINGS if name.endswith("mask2former_instance.yaml") else CLASSES
    assert num_classes == of_task.get(name.split("/")[0], num_classes)
    semantic = any(".semantic_layers." in key for key, _ in model.named_parameters())
    assert semantic == name.split("/")[1].startswith("semask")


def test_configs_that_the_documents_name_are_shipped() -> None:
    root = CONFIGS.parent
    named = {
        name
        for file in (
            root / "README.md",
            root / "projects/SeMask/README.md",
            *root.glob("docs/*.md"),
        )
        for name in re.findall(r"configs/([a-z0-9]\w*/\w+\.yaml)", file.read_text())
    }
    named |= {  # MODEL_DETECTOR_{1x,3x}.yaml
        f"coco/{model}_{detector}_{schedule}.yaml"
        for model in ("semask_swin_tiny", "semask_swin_small", "swin_tiny", "swin_small")
        for detector in ("mask_rcnn", "cascade_mask_rcnn", "retinanet", "panoptic_fpn")
        for schedule in ("1x", "3x")
    }
    assert len(named) > 60
    assert named <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_config_opens_with_what_to_expect_and_its_command(name: str) -> None:
    head = (CONFIGS / name).read_text().partition("_BASE_")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert re.search(rf"semask train {name.removesuffix('.yaml')}\b", head)
    if "own_dataset" not in name:
        assert re.search("published|measured here", head, re.IGNORECASE)


def keys_and_values(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys, and values in which tuples are lists, as a config file can only write those."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from keys_and_values(value, f"{prefix}{key}.")
            continue
        if isinstance(value, str) and value.startswith("("):
            value = ast.literal_eval(value)
        yield prefix + key, list(value) if isinstance(value, tuple) else value


@functools.cache
def own_and_inherited(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values that a config file sets itself, and those that its _BASE_ files give."""
    content = yaml.safe_load(file.read_text())
    bases = content.pop("_BASE_", [])
    inherited: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        own, below = own_and_inherited((file.parent / base).resolve())
        inherited |= below | own
    return dict(keys_and_values(content)), inherited


def test_no_config_repeats_what_its_base_files_give() -> None:
    """Nor a default, except under _base_, where it is a part of a recipe."""
    defaults = dict(keys_and_values(load_config()))
    repeated = []
    for file in sorted(CONFIGS.rglob("*.yaml")):
        own, inherited = own_and_inherited(file.resolve())
        if "_base_" not in file.parts:
            inherited = defaults | inherited
        repeated += [
            f"{file.relative_to(CONFIGS)}: {key} {value}"
            for key, value in own.items()
            if key in inherited and inherited[key] == value
        ]
    assert not repeated


# Other encoders than Swin, by the recipes of the Swin of a similar size.
OTHER_ENCODERS = {
    **{
        f"ade20k/semask_{encoder}_fpn": "ade20k/semask_swin_tiny_fpn"
        for encoder in (
            *("mit_b0", "mit_b2", "mit_b5", "convnext_tiny", "convnext_base"),
            *("pvt_v2_b2", "caformer_s18"),
        )
    },
    "ade20k/semask_mit_b2_mask2former": "ade20k/semask_swin_tiny_mask2former",
    "ade20k/semask_convnext_tiny_mask2former": "ade20k/semask_swin_tiny_mask2former",
    "ade20k/semask_convnext_base_mask2former": "ade20k/semask_swin_base_mask2former",
    **{
        f"{dataset}/semask_{encoder}": f"{dataset}/semask_{dataset}"
        for dataset in ("scenes", "camvid")
        for encoder in ("mit_b0", "convnext_atto")
    },
}


@pytest.mark.parametrize("name", OTHER_ENCODERS)
def test_recipe_of_another_encoder_differs_in_the_encoder_alone(name: str) -> None:
    cfg, swin = (
        load_config(str(CONFIGS / f"{config}.yaml")) for config in (name, OTHER_ENCODERS[name])
    )
    timm = cfg.MODEL.TIMM
    assert (CONFIGS / "_base_/backbones" / f"{timm.NAME.partition('.')[0]}.yaml").is_file()
    # Its weights are those for images that are normalised like this.
    published = get_pretrained_cfg(timm.NAME)
    for given, wanted in (
        (cfg.MODEL.PIXEL_MEAN, published.mean),
        (cfg.MODEL.PIXEL_STD, published.std),
    ):
        assert given == pytest.approx([255 * value for value in wanted])
    assert name.replace("/", "_").endswith(cfg.OUTPUT_DIR.removeprefix("output/").replace("/", "_"))
    for config in (cfg, swin):
        config.MODEL.BACKBONE.NAME = config.OUTPUT_DIR = ""
        config.MODEL.pop("TIMM")
    assert cfg == swin


@pytest.mark.parametrize("size", ["tiny", "base"])
def test_networks_that_heads_of_configs_name_are_known(size: str) -> None:
    heads = [
        (CONFIGS / "ade20k" / f"semask_convnext_{size}_{head}.yaml").read_text()
        for head in ("fpn", "mask2former")
    ]
    names = {name for head in heads for name in re.findall(r"MODEL\.TIMM\.NAME=(\S+)", head)}
    assert len(names) == 1
    assert get_pretrained_cfg(names.pop()).license == "dinov3-license"


def test_backbone_and_head_parameters_of_semask_t() -> None:
    model = build_on_meta(load_config(str(CONFIGS / "ade20k/semask_swin_tiny_fpn.yaml")))
    parts = {"backbone": 29_526_382, "sem_seg_head": 5_129_366}
    for part, expected in parts.items():
        assert sum(p.numel() for p in getattr(model, part).parameters()) == expected
