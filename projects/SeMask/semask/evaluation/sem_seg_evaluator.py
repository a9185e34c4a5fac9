"""Detectron2's semantic segmentation evaluation from a confusion matrix."""

import json
import logging
import math
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from semask.data.mappers.prior_target import panoptic_to_semantic
from semask.data.reading import check_label_values, read_label
from semask.data.segments import read_segment_ids
from semask.errors import ConfigError, DataError
from semask.evaluation.confusion import (
    class_table,
    confusion_matrix,
    mean_iou_of_labelled_classes,
    metrics_from_confusion,
)
from semask.evaluation.metric import EvaluatedImage, Metric
from semask.ops.lazy_scores import LazyScores, lazy
from semask.utils.files import replacing

logger = logging.getLogger(__name__)

RESULT_FILE = "sem_seg_evaluation.json"
DEFAULT_IGNORE_LABEL = 255


class SemSegConfusionEvaluator(DatasetEvaluator):
    """mIoU, fwIoU, mACC and pACC of semantic segmentation, as Detectron2 reports them.

    Replaces ``detectron2.evaluation.SemSegEvaluator``, with the same protocol and result format. It
    stores one integer confusion matrix on the device of the predictions instead of the predictions,
    so its memory does not grow with the dataset and its result does not depend on the number of
    processes.

    Label maps are read with ``semask.data.reading.read_label``, as in training. Their paths
    ("sem_seg_file_name", with an optional "label_map") come from the model's inputs, or, if the
    data mapper has removed them, from the registered dataset by "file_name". Without label maps,
    the classes come from the segments of a panoptic map ("pan_seg_file_name", "segments_info").
    """

    def __init__(
        self,
        dataset_name: str,
        *,
        distributed: bool = True,
        output_dir: str | None = None,
        num_classes: int | None = None,
        ignore_label: int | None = None,
        metrics: Sequence[Metric] = (),
    ) -> None:
        """
        Args:
            dataset_name: a registered dataset whose metadata have ``stuff_classes``.
            distributed: add up the matrices of all processes; otherwise each process evaluates
                what it has seen.
            output_dir: folder for ``sem_seg_evaluation.json`` (results in percent, class names, the
                confusion matrix, and what the metrics add), written by the main process; None = not
                written.
            num_classes: the model's K, checked against the metadata; None = not checked here.
            ignore_label: label value of ignored pixels; None = the metadata's ``ignore_label``, or
                255 if they have none.
            metrics: additional metrics; see ``semask.evaluation.metric``.

        Raises:
            ConfigError: the metadata have no class names, or not K of them.
        """
        metadata = MetadataCatalog.get(dataset_name)
        names = metadata.get("stuff_classes")
        if not names:
            raise ConfigError(
                f"Dataset '{dataset_name}' has no class names: set "
                f"MetadataCatalog.get('{dataset_name}').stuff_classes."
            )
        if num_classes is not None and num_classes != len(names):
            raise ConfigError(_class_count_message(dataset_name, len(names), num_classes))
        if ignore_label is None:
            ignore_label = metadata.get("ignore_label", DEFAULT_IGNORE_LABEL)
        self._dataset_name = dataset_name
        self._distributed = distributed
        self._output_dir = output_dir
        self._class_names: list[str] = list(names)
        self._ignore_label = int(ignore_label)
        self._metrics = list(metrics)
        self._records: dict[str, Mapping[str, Any]] | None = None
        self.reset()

    def reset(self) -> None:
        """Discard all results."""
        classes = len(self._class_names)
        self._matrix = torch.zeros((classes, classes + 1), dtype=torch.int64)
        for metric in self._metrics:
            metric.reset()

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        """Count the pixels of a batch.

        Args:
            inputs: dataset dicts, as passed to the model.
            outputs: for each, {"scores": LazyScores} or {"sem_seg": (K, H, W) logits}, of the
                label's size.

        Raises:
            DataError: a label map is missing or damaged, of another size than the prediction, or
                has a value that is neither a class nor the ignore value.
            ConfigError: the model has another number of classes than the dataset.
        """
        for dataset_dict, output in zip(inputs, outputs, strict=True):
            image = self._evaluated(dataset_dict, self._scores(output))
            self._matrix = self._matrix.to(image.matrix.device)
            self._matrix += image.matrix
            for metric in self._metrics:
                metric.process(image)

    def evaluate(self) -> "OrderedDict[str, dict[str, float]] | None":
        """Compute the metrics, log the table per class, write the result file.

        Returns:
            {"sem_seg": metrics} in percent, see ``metrics_from_confusion``, and those of
            ``metrics``; None in processes other than the main one when ``distributed``.
        """
        share = [self._matrix.cpu().numpy(), *(metric.share() for metric in self._metrics)]
        gathered = [share]
        if self._distributed:
            comm.synchronize()
            gathered = comm.gather(share)
            if not comm.is_main_process():
                return None
        matrices, *shares = zip(*gathered, strict=True)
        matrix = np.stack(matrices).sum(axis=0)
        if not matrix[:, :-1].any():
            logger.warning(
                "No labelled pixel of '%s' has been evaluated; its metrics are undefined (NaN).",
                self._dataset_name,
            )
        percentages = metrics_from_confusion(matrix, self._class_names)
        logger.info(
            "Evaluation of '%s':\n%s", self._dataset_name, class_table(matrix, self._class_names)
        )
        results = [metric.evaluate(own) for metric, own in zip(self._metrics, shares, strict=True)]
        for result in results:
            percentages.update(result.metrics)
        if self._output_dir and comm.is_main_process():
            document = {key: value for result in results for key, value in result.document.items()}
            self._write(self._output_dir, matrix, percentages, document)
        return OrderedDict(sem_seg=percentages)

    def _scores(self, output: Mapping[str, Any]) -> LazyScores:
        """The scores of a model's output, checked for the dataset's number of classes."""
        classes = len(self._class_names)
        if "scores" in output:
            scores: LazyScores = output["scores"]
        elif output["sem_seg"].dim() == 3:
            scores = lazy(output["sem_seg"], "logits")
        else:
            raise ConfigError(
                "A semantic segmentation model must return (K, H, W) class scores as 'sem_seg'; "
                f"this one returns {tuple(output['sem_seg'].shape)}."
            )
        if scores.num_classes != classes:
            raise ConfigError(_class_count_message(self._dataset_name, classes, scores.num_classes))
        return scores

    def _evaluated(self, dataset_dict: Mapping[str, Any], scores: LazyScores) -> EvaluatedImage:
        """One image with its label map, its prediction and the confusion matrix of the two."""
        classes = len(self._class_names)
        record = self._record(dataset_dict)
        path = record.get("sem_seg_file_name") or record["pan_seg_file_name"]
        if "sem_seg_file_name" in record:
            label = read_label(path, label_map=record.get("label_map"))
        else:
            segments = record["segments_info"]
            label = panoptic_to_semantic(read_segment_ids(path), segments, self._ignore_label)
        if label.shape != scores.size:
            raise DataError(
                f"Label map '{path}' is {label.shape[1]}x{label.shape[0]} pixels (width x height) "
                f"but the prediction for '{dataset_dict.get('file_name')}' is "
                f"{scores.size[1]}x{scores.size[0]}: image and label map must have the same size."
            )
        check_label_values(label, classes, self._ignore_label, path)
        truth = torch.from_numpy(label).to(scores.device)
        confidence: torch.Tensor | None = None
        if any(metric.needs_confidence for metric in self._metrics):
            prediction, confidence = scores.labels_and_confidence()
        else:
            prediction = scores.labels()
        return EvaluatedImage(
            record={**dataset_dict, **record},
            scores=scores,
            prediction=prediction,
            confidence=confidence,
            label=truth,
            ignore_label=self._ignore_label,
            matrix=confusion_matrix(prediction, truth, classes, self._ignore_label),
        )

    def _record(self, dataset_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        """The dict that names the label map: the input, or the dataset's own for the same image."""
        if _has_label(dataset_dict):
            return dataset_dict
        if self._records is None:
            self._records = {
                record["file_name"]: record for record in DatasetCatalog.get(self._dataset_name)
            }
        record = self._records.get(dataset_dict.get("file_name", ""))
        if record is None or not _has_label(record):
            raise DataError(
                f"Image '{dataset_dict.get('file_name')}' has no label map in the dataset "
                f"'{self._dataset_name}' and cannot be evaluated. Add 'sem_seg_file_name', or "
                "'pan_seg_file_name' and 'segments_info', to its dict."
            )
        return record

    def _write(
        self,
        folder: str,
        matrix: np.ndarray,
        metrics: Mapping[str, float],
        more: Mapping[str, Any],
    ) -> None:
        document = {
            "dataset": self._dataset_name,
            "results": {key: _finite(value) for key, value in metrics.items()},
            "mIoU_of_labelled_classes": _finite(mean_iou_of_labelled_classes(matrix)),
            "class_names": self._class_names,
            "ignore_label": self._ignore_label,
            "confusion_matrix": matrix.tolist(),
            "confusion_matrix_axes": "rows: prediction; columns: ground truth, then ignored pixels",
            **more,
        }
        with replacing(os.path.join(folder, RESULT_FILE)) as file:
            file.write(json.dumps(document, allow_nan=False).encode())


def _has_label(record: Mapping[str, Any]) -> bool:
    return "sem_seg_file_name" in record or {"pan_seg_file_name", "segments_info"} <= set(record)


def _class_count_message(dataset_name: str, in_dataset: int, in_model: int) -> str:
    return (
        f"The model predicts {in_model} classes but dataset '{dataset_name}' has {in_dataset} "
        "(metadata stuff_classes): set MODEL.SEM_SEG_HEAD.NUM_CLASSES to match."
    )


def _finite(value: float) -> float | None:
    """JSON has no NaN: undefined values become null."""
    return None if math.isnan(value) else value
