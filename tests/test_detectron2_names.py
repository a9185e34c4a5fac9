"""Every name of Detectron2 that is used is one that release v0.6 and the main branch both have."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

# Look a name up in the sources of both before adding it; the tests import the installed one.
IN_BOTH_VERSIONS: dict[str, set[str]] = {
    "detectron2.checkpoint": {"DetectionCheckpointer"},
    "detectron2.config": {"CfgNode", "configurable", "get_cfg"},
    "detectron2.data": {
        "DatasetCatalog",
        "DatasetFromList",
        "MetadataCatalog",
        "build_detection_test_loader",
        "build_detection_train_loader",
        "detection_utils",
        "get_detection_dataset_dicts",
        "transforms",
    },
    "detectron2.data.datasets": {"builtin", "register_coco_panoptic_separated"},
    "detectron2.data.catalog": {"Metadata"},
    "detectron2.data.datasets.builtin": {
        "register_all_ade20k",
        "register_all_cityscapes",
        "register_all_cityscapes_panoptic",
        "register_all_coco",
    },
    "detectron2.data.datasets.builtin_meta": {
        "ADE20K_SEM_SEG_CATEGORIES",
        "CITYSCAPES_CATEGORIES",
        "COCO_CATEGORIES",
    },
    "detectron2.data.detection_utils": {
        "annotations_to_instances",
        "build_augmentation",
        "filter_empty_instances",
    },
    "detectron2.data.transforms": {
        "AugInput",
        "Augmentation",
        "AugmentationList",
        "FixedSizeCrop",
        "RandomCrop",
        "RandomFlip",
        "ResizeScale",
        "ResizeShortestEdge",
        "ResizeTransform",
        "Transform",
        "TransformList",
    },
    "detectron2.engine": {
        "AMPTrainer",
        "DefaultTrainer",
        "HookBase",
        "SimpleTrainer",
        "TrainerBase",
        "default_argument_parser",
        "launch",
    },
    "detectron2.engine.hooks": {"EvalHook"},
    "detectron2.evaluation": {
        "CityscapesInstanceEvaluator",
        "COCOEvaluator",
        "DatasetEvaluator",
        "DatasetEvaluators",
        "SemSegEvaluator",
        "inference_on_dataset",
    },
    "detectron2.evaluation.testing": {"flatten_results_dict"},
    "detectron2.layers": {"Conv2d", "FrozenBatchNorm2d", "ShapeSpec", "get_norm"},
    "detectron2.modeling": {
        "BACKBONE_REGISTRY",
        "Backbone",
        "FPN",
        "GeneralizedRCNN",
        "META_ARCH_REGISTRY",
        "PanopticFPN",
        "RetinaNet",
        "SEM_SEG_HEADS_REGISTRY",
        "SemanticSegmentor",
        "build_backbone",
        "build_model",
    },
    "detectron2.modeling.backbone.fpn": {"LastLevelMaxPool", "LastLevelP6P7"},
    "detectron2.modeling.meta_arch.semantic_seg": {"SemSegFPNHead"},
    "detectron2.solver": {"LRMultiplier", "build_lr_scheduler"},
    "detectron2.solver.build": {"maybe_add_gradient_clipping"},
    "detectron2.structures": {
        "BitMasks",
        "BoxMode",
        "Boxes",
        "ImageList",
        "Instances",
        "PolygonMasks",
    },
    "detectron2.structures.masks": {"polygons_to_bitmask"},
    "detectron2.utils": {"comm"},
    "detectron2.utils.comm": {
        "_LOCAL_PROCESS_GROUP",
        "all_gather",
        "gather",
        "get_local_rank",
        "get_local_size",
        "get_rank",
        "get_world_size",
        "is_main_process",
        "synchronize",
    },
    "detectron2.utils.collect_env": {"collect_env_info"},
    "detectron2.utils.env": {"seed_all_rng"},
    "detectron2.utils.events": {"EventStorage", "EventWriter", "JSONWriter", "get_event_storage"},
    "detectron2.utils.file_io": {"PathManager"},
    "detectron2.utils.logger": {"log_first_n", "setup_logger"},
}


def names_in(source: str) -> set[tuple[str, str]]:
    """The (module, name) pairs of Detectron2 that Python code imports or takes from a module."""
    tree = ast.parse(source)
    found: set[tuple[str, str]] = set()
    modules: dict[str, str] = {}  # an expression of this code, and the module that it stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and _is_detectron2(node.module):
            for alias in node.names:
                found.add((str(node.module), alias.name))
                modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in filter(lambda alias: _is_detectron2(alias.name), node.names):
                modules[alias.asname or alias.name] = alias.name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            module = modules.get(ast.unparse(node.value))
            if module in sys.modules:
                found.add((module, node.attr))
    return found


def _is_detectron2(module: str | None) -> bool:
    return module is not None and module.split(".")[0] == "detectron2"


def test_names_are_found_however_they_are_reached() -> None:
    source = """
import detectron2.solver
from detectron2.data import transforms as T
from detectron2.utils import comm
from detectron2.config import CfgNode
detectron2.solver.build_optimizer(T.RandomFlip(), comm.get_rank(), CfgNode.load_cfg)
"""
    assert names_in(source) == {
        ("detectron2.config", "CfgNode"),
        ("detectron2.data", "transforms"),
        ("detectron2.data.transforms", "RandomFlip"),
        ("detectron2.solver", "build_optimizer"),
        ("detectron2.utils", "comm"),
        ("detectron2.utils.comm", "get_rank"),
    }


def test_only_names_of_both_versions_are_used(repository: Path) -> None:
    files = [repository / "train_net.py", *(repository / "tests").rglob("*.py")]
    files += (repository / "projects" / "SeMask").rglob("*.py")
    unknown = {
        f"{module}.{name} ({file.name})"
        for file in files
        if file != Path(__file__)
        for module, name in names_in(file.read_text(encoding="utf-8"))
        if name not in IN_BOTH_VERSIONS.get(module, ())
    }
    assert not unknown, "look them up in v0.6 and in main, then add them to the table above"


@pytest.mark.parametrize("module", IN_BOTH_VERSIONS)
def test_names_exist(module: str) -> None:
    present = vars(importlib.import_module(module))
    assert IN_BOTH_VERSIONS[module] <= present.keys()
