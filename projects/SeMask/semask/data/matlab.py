"""Label maps in MATLAB files, as the 10k edition of COCO-Stuff (arXiv 1612.03716) has them."""

import io
from typing import BinaryIO

import numpy as np

# The array that holds the labels.
LABEL_ARRAY = "S"


def is_matlab(path: str) -> bool:
    """Whether ``path`` is the name of a MATLAB file."""
    return path.lower().endswith(".mat")


def read_matlab_label(file: BinaryIO) -> np.ndarray:
    """The array ``S`` of a MATLAB file (version 4 to 7.2).

    Args:
        file: opened for reading bytes.

    Returns:
        (H, W) integers. MATLAB's default type is double: whole numbers of it are converted.

    Raises:
        ValueError: the file is damaged, or has no such array of integers.
    """
    from scipy import io as scipy_io  # Slow to import, and few datasets need it.

    content = io.BytesIO(file.read())
    try:
        found = scipy_io.loadmat(content, variable_names=[LABEL_ARRAY]).get(LABEL_ARRAY)
        names = [] if found is not None else [name for name, *_ in scipy_io.whosmat(content)]
    except Exception as error:
        # Of a damaged file SciPy raises nearly everything, most of it not documented.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"no sound MATLAB file ({reason})") from error
    if found is None:
        raise ValueError(
            f"it has no array '{LABEL_ARRAY}' but {', '.join(names) or 'nothing at all'}"
        )
    label = np.asarray(found)
    if label.ndim != 2 or label.size == 0 or label.dtype.kind not in "iubf":
        raise ValueError(
            f"its array '{LABEL_ARRAY}' is {label.dtype} of shape {label.shape}; it has to be a "
            "matrix of integers"
        )
    if label.dtype.kind == "f":
        whole = label.astype(np.int64) if np.isfinite(label).all() else None
        if whole is None or not np.array_equal(whole, label):
            raise ValueError(f"its array '{LABEL_ARRAY}' has values that are not whole numbers")
        return whole
    return label
