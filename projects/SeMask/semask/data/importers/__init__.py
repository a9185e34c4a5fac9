"""Import of labels in common formats into the layouts for training.

``formats/`` has one file for each format, registered in ``FORMATS``: it recognises a folder and
reads it into the records of ``contract.py``. ``conversion.py`` merges class names and splits
training from validation; ``writers.py`` writes.

No library reads these formats here. These were considered (sizes of November 2026):

- datumaro (16 packages; older OpenCV and Pillow than ours) reads most of them, but drops what it
  cannot use with at most a log line, and does not report what happened to a polygon outside the
  image or a colour without a name.
- supervision (8 packages) reads YOLO, COCO and Pascal VOC boxes of one folder each, with all
  full-size masks of the dataset in memory.
- label-studio-sdk (54 packages, NumPy 2.2) decodes the brush's bit stream: 40 lines here, tested
  against its encoder.
- labelme (26 packages with Qt) and supervisely (79 packages) read their own files, which are JSON.
- pycocotools, a dependency anyway, decodes COCO's masks and draws all polygons.

The tests' files were written by these libraries (``tests/fixtures/labels``).
"""

from semask.data.importers import formats
from semask.data.importers.contract import (
    FORMATS,
    ImportedImage,
    Importer,
    Labels,
    Region,
    register_format,
)
from semask.data.importers.conversion import Options, Result, convert_labels

__all__ = [
    "FORMATS",
    "ImportedImage",
    "Importer",
    "Labels",
    "Options",
    "Region",
    "Result",
    "convert_labels",
    "formats",
    "register_format",
]
