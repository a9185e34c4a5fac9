"""Panoptic segmentation by Panoptic FPN, evaluated by PQ, AP and the mIoU of the semantic map."""

from collections.abc import Sequence

from semask.errors import ConfigError
from semask.evaluation.instance_evaluators import check_evaluator_type
from semask.modeling.meta_arch.detectors import has_semantic_head
from semask.tasks.base import TASK_REGISTRY
from semask.tasks.instance import InstanceTask


@TASK_REGISTRY.register()
class PanopticTask(InstanceTask):
    """Images with instances and a semantic map; models give both, and "panoptic_seg"."""

    name = "panoptic"

    def check_datasets(self, names: Sequence[str], *, eval_only: bool) -> None:
        """As :meth:`InstanceTask.check_datasets`; the model has to predict a semantic map."""
        if not has_semantic_head(self.cfg):
            raise ConfigError(
                "TASK is 'panoptic', but MODEL.META_ARCHITECTURE "
                f"'{self.cfg.MODEL.META_ARCHITECTURE}' predicts instances alone: set TASK to "
                "'instance', or the architecture to 'SeMaskPanopticFPN'."
            )
        super().check_datasets(names, eval_only=eval_only)

    def evaluates_panoptic(self, name: str) -> bool:
        """On datasets with panoptic maps; on others the instances alone are evaluated."""
        return check_evaluator_type(name)
