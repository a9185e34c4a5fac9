"""CamVid in its 11-class form at 480x360 (SegNet's split): 367, 101 and 233 frames.

The frames of a drive through Cambridge: Brostow, Fauqueur, Cipolla, "Semantic Object Classes in
Video: A High-Definition Ground Truth Database", Pattern Recognition Letters 30 (2009); the 11
classes: SegNet, arXiv 1511.00561. For research use only.
"""

import os
from functools import partial
from typing import Any

from semask.data.datasets.catalog import datasets_root, layout_hint, register_sem_seg
from semask.data.datasets.pairs import load_sem_seg_pairs

SPLITS = ("train", "val", "test")
CLASSES_AND_COLORS = {
    "sky": (128, 128, 128),
    "building": (128, 0, 0),
    "pole": (192, 192, 128),
    "road": (128, 64, 128),
    "pavement": (0, 0, 192),
    "tree": (128, 128, 0),
    "sign_symbol": (192, 128, 128),
    "fence": (64, 64, 128),
    "car": (64, 0, 128),
    "pedestrian": (64, 64, 0),
    "bicyclist": (0, 128, 192),
}
_LAYOUT = (
    "camvid/images/{train,val,test}/NAME.jpg         photographs",
    "camvid/annotations/{train,val,test}/NAME.png    label maps: 0..10, 255 = ignored",
)


def camvid_roots(split: str) -> tuple[str, str]:
    """The folders of a split's photographs and label maps."""
    root = os.path.join(datasets_root(), "camvid")
    return os.path.join(root, "images", split), os.path.join(root, "annotations", split)


def load_camvid(split: str) -> list[dict[str, Any]]:
    """The dicts of one of ``SPLITS``.

    Raises:
        DataError: the files are not where they should be, or do not pair up.
    """
    return load_sem_seg_pairs(*camvid_roots(split), ".jpg", ".png", hint=layout_hint(_LAYOUT))


def register_camvid() -> None:
    """Register ``camvid_sem_seg_{train,val,test}``."""
    for split in SPLITS:
        register_sem_seg(
            f"camvid_sem_seg_{split}",
            partial(load_camvid, split),
            list(CLASSES_AND_COLORS),
            list(CLASSES_AND_COLORS.values()),
            roots=partial(camvid_roots, split),
        )
