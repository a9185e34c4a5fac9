"""COCO-Stuff as its two editions are downloaded: 171 classes, 80 of things and 91 of stuff.

The 10k edition (v1.1: 9,000 + 1,000 images) has MATLAB annotations and lists of the images of each
split; the 164k edition (118,287 + 5,000 images) has PNGs. Caesar, Uijlings, Ferrari, "COCO-Stuff:
Thing and Stuff Classes in Context", arXiv 1612.03716. Classes are numbered in the order of COCO's
ids, of which 1 to 182 exist and eleven are not in use; pixels without a label are ignored.
"""

import os
from functools import partial
from typing import Any

from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.utils.file_io import PathManager

from semask.data.datasets.catalog import datasets_root, layout_hint, register_sem_seg
from semask.data.datasets.pairs import find_files, pair_files
from semask.data.reading import register_label_map
from semask.errors import DataError
from semask.utils.palette import class_colors

# Ids 92 to 182.
_STUFF = """
banner blanket branch bridge building-other bush cabinet cage cardboard carpet ceiling-other
ceiling-tile cloth clothes clouds counter cupboard curtain desk-stuff dirt door-stuff fence
floor-marble floor-other floor-stone floor-tile floor-wood flower fog food-other fruit
furniture-other grass gravel ground-other hill house leaves light mat metal mirror-stuff moss
mountain mud napkin net paper pavement pillow plant-other plastic platform playingfield railing
railroad river road rock roof rug salad sand sea shelf sky-other skyscraper snow solid-other stairs
stone straw structural-other table tent textile-other towel tree vegetable wall-brick wall-concrete
wall-other wall-panel wall-stone wall-tile wall-wood water-other waterdrops window-blind
window-other wood
"""
NAMES: dict[int, str] = {
    **{entry["id"]: entry["name"] for entry in COCO_CATEGORIES if entry["isthing"]},
    **dict(enumerate(_STUFF.split(), start=92)),
}
"""Names of the ids in use, in ascending order."""

LABEL_MAP_10K, LABEL_MAP_164K = "coco_stuff_10k", "coco_stuff_164k"
SPLITS_10K = ("train", "test")
SPLITS_164K = {"train": "train2017", "val": "val2017"}
_LAYOUT_10K = (
    "cocostuff-10k-v1.1/images/NAME.jpg                  photographs",
    "cocostuff-10k-v1.1/annotations/NAME.mat             label maps: array S, 0..182",
    "cocostuff-10k-v1.1/imageLists/{train,test}.txt      the NAMEs of each split",
)
_LAYOUT_164K = (
    "coco_stuff164k/images/{train2017,val2017}/NAME.jpg         photographs",
    "coco_stuff164k/annotations/{train2017,val2017}/NAME.png    label maps: 0..181, 255 = ignored",
)


def coco_stuff_10k_roots() -> tuple[str, str]:
    """The folders of the 10k edition's photographs and label maps."""
    root = os.path.join(datasets_root(), "cocostuff-10k-v1.1")
    return os.path.join(root, "images"), os.path.join(root, "annotations")


def load_coco_stuff_10k(split: str) -> list[dict[str, Any]]:
    """The dicts of one of ``SPLITS_10K``, sorted by name.

    Raises:
        DataError: the files are not where they should be, or one that is listed is missing.
    """
    hint = layout_hint(_LAYOUT_10K)
    image_root, label_root = coco_stuff_10k_roots()
    list_file = os.path.join(os.path.dirname(image_root), "imageLists", f"{split}.txt")
    images = find_files(image_root, ".jpg", "images", hint)
    labels = find_files(label_root, ".mat", "label maps", hint)
    names = _listed(list_file, hint)
    missing = sorted(name for name in names if name not in images and name not in labels)
    if missing:
        raise DataError(
            f"'{list_file}' lists {len(missing)} images that are not there, the first of them "
            f"'{missing[0]}'. {hint}"
        )
    return pair_files(
        {name: images[name] for name in names if name in images},
        {name: labels[name] for name in names if name in labels},
        image_root,
        label_root,
        label_map=LABEL_MAP_10K,
        hint=hint,
    )


def _listed(path: str, hint: str) -> list[str]:
    try:
        with PathManager.open(path, "r", encoding="utf-8-sig") as file:
            names = file.read().split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read the list of images '{path}': {error}. {hint}") from error
    if not names:
        raise DataError(f"The list of images '{path}' is empty. {hint}")
    return names


def coco_stuff_164k_roots(split: str) -> tuple[str, str]:
    """The folders of a split's photographs and label maps in the 164k edition."""
    root, folder = os.path.join(datasets_root(), "coco_stuff164k"), SPLITS_164K[split]
    return os.path.join(root, "images", folder), os.path.join(root, "annotations", folder)


def load_coco_stuff_164k(split: str) -> list[dict[str, Any]]:
    """The dicts of "train" or "val".

    Raises:
        DataError: the files are not where they should be, or do not pair up.
    """
    roots, hint = coco_stuff_164k_roots(split), layout_hint(_LAYOUT_164K)
    images = find_files(roots[0], ".jpg", "images", hint)
    labels = find_files(roots[1], ".png", "label maps", hint)
    # Some other tools leave their converted label maps beside the published ones.
    labels = {name: path for name, path in labels.items() if not name.endswith("_labelTrainIds")}
    return pair_files(images, labels, *roots, label_map=LABEL_MAP_164K, hint=hint)


def register_coco_stuff() -> None:
    """Register ``coco_stuff_10k_sem_seg_{train,test}``, ``coco_stuff_164k_sem_seg_{train,val}``."""
    train_ids = {coco_id: index for index, coco_id in enumerate(NAMES)}
    register_label_map(LABEL_MAP_10K, {0: 255, **train_ids})
    in_png = {coco_id - 1: index for coco_id, index in train_ids.items()}
    register_label_map(LABEL_MAP_164K, {**in_png, 255: 255})
    classes, colors = list(NAMES.values()), class_colors(len(NAMES)).tolist()
    for split in SPLITS_10K:
        register_sem_seg(
            f"coco_stuff_10k_sem_seg_{split}",
            partial(load_coco_stuff_10k, split),
            classes,
            colors,
            roots=coco_stuff_10k_roots,
        )
    for split in SPLITS_164K:
        register_sem_seg(
            f"coco_stuff_164k_sem_seg_{split}",
            partial(load_coco_stuff_164k, split),
            classes,
            colors,
            roots=partial(coco_stuff_164k_roots, split),
        )
