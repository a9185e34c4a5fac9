"""The evaluation that a config describes."""

import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from torch import nn

from semask.data.mappers.instance import InstanceMapper
from semask.data.mappers.semantic import SemSegMapper
from semask.evaluation.boundary import BoundaryIoU
from semask.evaluation.instance_evaluators import build_instance_evaluator
from semask.evaluation.metric import Metric
from semask.evaluation.prediction_files import PredictionFiles
from semask.evaluation.sem_seg_evaluator import SemSegConfusionEvaluator
from semask.report.instances import write_instance_report
from semask.report.semantic import report_parts, write_report
from semask.utils.palette import class_colors


def inference_folder(cfg: CfgNode, dataset_name: str) -> str:
    """Where everything about the evaluation on a dataset goes."""
    return os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)


def build_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """The evaluator of a dataset, with what ``cfg.TEST`` asks for.

    Raises:
        ConfigError: the dataset has no class names, or another number of them than the model, or
            is of a kind that is not known.
    """
    folder = inference_folder(cfg, dataset_name)
    if cfg.INPUT.MAPPER == "instances":
        return build_instance_evaluator(cfg, dataset_name, folder)
    metadata = MetadataCatalog.get(dataset_name)
    names = metadata.get("stuff_classes", [])
    metrics: list[Metric] = []
    if cfg.TEST.BOUNDARY_IOU:
        metrics.append(BoundaryIoU(names))
    if cfg.TEST.SAVE_PREDICTIONS:
        colors = class_colors(len(names), metadata.get("stuff_colors"))
        metrics.append(PredictionFiles(dataset_name, os.path.join(folder, "predictions"), colors))
    if cfg.TEST.REPORT:
        metrics += report_parts()
    return SemSegConfusionEvaluator(
        dataset_name,
        output_dir=folder,
        num_classes=cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
        metrics=metrics,
    )


def write_reports(cfg: CfgNode, model: nn.Module) -> list[str]:
    """The report of each dataset of ``DATASETS.TEST``, right after its evaluation.

    To be called in the main process only.

    Args:
        cfg: the run's config.
        model: the evaluated model, possibly wrapped for distributed training.

    Returns:
        The paths of the pages; none where ``TEST.REPORT`` is off.
    """
    if not cfg.TEST.REPORT:
        return []
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if cfg.INPUT.MAPPER == "instances":
        facts = [("Model", cfg.MODEL.META_ARCHITECTURE), ("Parameters", f"{parameters:,}")]
        to_inputs = InstanceMapper(cfg, is_train=False)
        return [
            write_instance_report(model, name, to_inputs, inference_folder(cfg, name), facts=facts)
            for name in cfg.DATASETS.TEST
        ]
    facts = [
        ("Model", f"{cfg.MODEL.BACKBONE.NAME} + {cfg.MODEL.SEM_SEG_HEAD.NAME}"),
        ("Parameters", f"{parameters:,}"),
        ("Test protocol", cfg.TEST.PROTOCOL.replace("_", " ")),
    ]
    mapper = SemSegMapper(cfg, is_train=False)
    return [
        write_report(model, name, mapper, inference_folder(cfg, name), facts=facts)
        for name in cfg.DATASETS.TEST
    ]
