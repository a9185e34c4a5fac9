"""The per-class result of a semantic segmentation evaluation as text."""

from collections.abc import Sequence

import numpy as np
from tabulate import tabulate

from semask.evaluation.confusion import (
    ClassCounts,
    check_matrix,
    mean_iou_of_labelled_classes,
    metrics_from_confusion,
)

ABSENT = "absent"


def class_table(matrix: np.ndarray, class_names: Sequence[str]) -> str:
    """One line per class (pixels, IoU, accuracy), then the means and what they leave out.

    "absent" marks what is undefined: the accuracy of a class without ground truth, and the IoU of
    a class that is neither in the ground truth nor predicted. A class that is only predicted has
    an IoU of 0. The mean of the IoU column as shown is mIoU.

    Args:
        matrix: (K, K + 1) confusion matrix (see ``semask.evaluation.confusion``).
        class_names: the K names, in the order of the lines.

    Returns:
        Several lines of text, without a final line break.

    Raises:
        ValueError: matrix and class names do not fit together.
    """
    check_matrix(matrix, class_names)
    counts = ClassCounts.of(matrix)
    rows = [
        (name, f"{int(pixels):,}", _percent(iou), _percent(accuracy))
        for name, pixels, iou, accuracy in zip(
            class_names, counts.labelled, 100 * counts.iou, 100 * counts.accuracy, strict=True
        )
    ]
    table = tabulate(
        rows,
        headers=["class", "pixels", "IoU", "accuracy"],
        tablefmt="pipe",
        colalign=["left", "right", "right", "right"],
        disable_numparse=True,
    )
    return "\n".join([table, "", *_footer(matrix, class_names, counts)])


def _footer(matrix: np.ndarray, class_names: Sequence[str], counts: ClassCounts) -> list[str]:
    metrics = metrics_from_confusion(matrix, class_names)
    means = ", ".join(
        f"{key} {_percent(metrics[key])}" for key in ("mIoU", "fwIoU", "mACC", "pACC")
    )
    lines = [f"{means} (percent)"]
    ignored = int(matrix[:, -1].sum())
    if ignored:
        lines.append(f"{ignored:,} of {int(matrix.sum()):,} pixels are ignored.")
    absent = int((counts.union == 0).sum())
    if absent:
        lines.append(
            f"{absent} of {len(class_names)} classes are absent from ground truth and prediction "
            "and left out of the means."
        )
    only_predicted = int(((counts.labelled == 0) & (counts.predicted > 0)).sum())
    if only_predicted:
        other = _percent(mean_iou_of_labelled_classes(matrix))
        lines.append(
            f"{only_predicted} of {len(class_names)} classes are predicted but absent from the "
            f"ground truth: their IoU of 0 counts in mIoU. The mean over the classes in the ground "
            f"truth alone is {other}."
        )
    return lines


def _percent(value: float) -> str:
    return ABSENT if np.isnan(value) else f"{value:.2f}"
