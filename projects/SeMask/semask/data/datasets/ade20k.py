"""ADE20K as its archive ``ADEChallengeData2016.zip`` unpacks: 150 classes, 100 of them things.

20,210 training and 2,000 validation images: Zhou et al., "Scene Parsing through ADE20K Dataset",
CVPR 2017. In the label maps 0 is "other", which is ignored, and 1 to 150 are the classes.

The instances are another archive, ``annotations_instance.tar`` of the Places Challenge 2017
(http://sceneparsing.csail.mit.edu): PNGs whose red channel is the category, 1 to 100, and whose
green channel numbers the instances of the image. `semask prepare ade20k` turns them into the files
for instance and panoptic segmentation.
"""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from detectron2.data.datasets.builtin_meta import ADE20K_SEM_SEG_CATEGORIES

from semask.data.datasets.catalog import datasets_root, layout_hint, register_sem_seg
from semask.data.datasets.pairs import find_files, load_sem_seg_pairs, pair_files
from semask.data.datasets.prepared import (
    Annotated,
    Prepared,
    Progress,
    Segment,
    describe_segments,
    instance_file,
    load_instances,
    load_segments,
    panoptic_files,
    prepare_split,
    register_prepared,
    save_ids,
)
from semask.data.reading import check_same_size, read_image, read_label, register_label_map
from semask.errors import DataError

LABEL_MAP = "ade20k"
FOLDERS = {"train": "training", "val": "validation"}
CLASSES = [synonyms.split(",")[0].strip() for synonyms in ADE20K_SEM_SEG_CATEGORIES]
# The classes without instances; the other 100 are things, in the instances' files 1 to 100.
STUFF = (
    *(0, 1, 2, 3, 4, 5, 6, 9, 11, 13, 16, 17, 21, 25, 26, 28, 29, 34, 40, 46, 48, 51, 52, 54, 59),
    *(60, 61, 63, 68, 77, 79, 84, 91, 94, 96, 99, 100, 101, 105, 106, 109, 113, 114, 117, 122),
    *(128, 131, 140, 141, 145),
)
THINGS = tuple(index for index in range(len(CLASSES)) if index not in STUFF)
# The benchmark's own colours.
_HEX_COLORS = """
787878 b47878 06e6e6 503232 04c803 787850 8c8c8c cc05ff e6e6e6 04fa07 e005ff ebff07 96053d 787846
08ff33 ff0652 8fff8c ccff04 ff3307 cc4603 0066c8 3de6fa ff0633 0b66ff ff0747 ff09e0 0907e6 dcdcdc
ff095c 7009ff 08ffd6 07ffe0 ffb806 0aff47 ff290a 07ffff e0ff08 6608ff ff3d06 ffc207 ff7a08 00ff14
ff0829 ff0599 0633ff eb0cff a09614 00a3ff 8c8c8c fa0a0f 14ff00 1fff00 ff1f00 ffe000 99ff00 0000ff
ff4700 00ebff 00adff 1f00ff 0bc8c8 ff5200 00fff5 003dff 00ff70 00ff85 ff0000 ffa300 ff6600 c2ff00
008fff 33ff00 0052ff 00ff29 00ffad 0a00ff adff00 00ff99 ff5c00 ff00ff ff00f5 ff0066 ffad00 ff0014
ffb8b8 001fff 00ff3d 0047ff ff00cc 00ffc2 00ff52 000aff 0070ff 3300ff 00c2ff 007aff 00ffa3 ff9900
00ff0a ff7000 8fff00 5200ff a3ff00 ffeb00 08b8aa 8500ff 00ff5c b800ff ff001f 00b8ff 00d6ff ff0070
5cff00 00e0ff 70e0ff 46b8a0 a300ff 9900ff 47ff00 ff00a3 ffcc00 ff008f 00ffeb 85ff00 ff00eb f500ff
ff007a fff500 0abed4 d6ff00 00ccff 1400ff ffff00 0099ff 0029ff 00ffcc 2900ff 29ff00 ad00ff 00f5ff
4700ff 7a00ff 00ffb8 005cff b8ff00 0085ff ffd600 19c2c2 66ff00 5c00ff
"""
COLORS = [list(bytes.fromhex(color)) for color in _HEX_COLORS.split()]
_LAYOUT = (
    "ADEChallengeData2016/images/{training,validation}/NAME.jpg         photographs",
    "ADEChallengeData2016/annotations/{training,validation}/NAME.png    label maps: 0..150",
)

_PREPARED_FROM = (
    "ADEChallengeData2016/images/{training,validation}/NAME.jpg                  photographs",
    "ADEChallengeData2016/annotations/{training,validation}/NAME.png             0..150",
    "ADEChallengeData2016/annotations_instance/{training,validation}/NAME.png    instances",
)


def ade20k_roots(split: str) -> tuple[str, str]:
    """The folders of a split's photographs and label maps."""
    return (
        os.path.join(_root(), "images", FOLDERS[split]),
        os.path.join(_root(), "annotations", FOLDERS[split]),
    )


def _root() -> str:
    return os.path.join(datasets_root(), "ADEChallengeData2016")


def load_ade20k(split: str) -> list[dict[str, Any]]:
    """The dicts of "train" or "val".

    Raises:
        DataError: the files are not where they should be, or do not pair up.
    """
    hint = layout_hint(_LAYOUT)
    return load_sem_seg_pairs(*ade20k_roots(split), label_map=LABEL_MAP, hint=hint)


def _instance_paths(split: str) -> dict[str, str]:
    image_root, _ = ade20k_roots(split)
    return {"image_root": image_root, **instance_file(_root(), "ade20k", split)}


def _panoptic_paths(split: str) -> dict[str, str]:
    image_root, label_root = ade20k_roots(split)
    files = panoptic_files(_root(), "ade20k", split)
    return {"image_root": image_root, "sem_seg_root": label_root, **files}


def prepared_paths(split: str) -> dict[str, str]:
    """What `semask prepare ade20k` writes: files of instances, of segments, and their maps."""
    return instance_file(_root(), "ade20k", split) | panoptic_files(_root(), "ade20k", split)


def _load_panoptic(paths: Mapping[str, str], name: str, hint: str) -> list[dict[str, Any]]:
    """Records that also name the label map, against which the mIoU is measured."""
    records = load_segments(paths, name, hint)
    for record in records:
        stem = os.path.splitext(os.path.basename(record["pan_seg_file_name"]))[0]
        record["sem_seg_file_name"] = os.path.join(paths["sem_seg_root"], f"{stem}.png")
        record["label_map"] = LABEL_MAP
    return records


def register_ade20k() -> None:
    """Register ``ade20k_{raw_sem_seg,instance,panoptic}_{train,val}``."""
    register_label_map(LABEL_MAP, [255, *range(150)])
    for split in FOLDERS:
        register_sem_seg(
            f"ade20k_raw_sem_seg_{split}",
            partial(load_ade20k, split),
            CLASSES,
            COLORS,
            roots=partial(ade20k_roots, split),
        )
        register_prepared(
            f"ade20k_instance_{split}",
            load_instances,
            partial(_instance_paths, split),
            evaluator_type="coco",
            thing_classes=[CLASSES[index] for index in THINGS],
            thing_colors=[COLORS[index] for index in THINGS],
            thing_dataset_id_to_contiguous_id={given: i for i, given in enumerate(THINGS)},
        )
        register_prepared(
            f"ade20k_panoptic_{split}",
            _load_panoptic,
            partial(_panoptic_paths, split),
            evaluator_type="ade20k_panoptic_seg",
            ignore_label=255,
            stuff_classes=list(CLASSES),
            stuff_colors=COLORS,
            thing_classes=[CLASSES[index] for index in THINGS],
            thing_dataset_id_to_contiguous_id={index: index for index in THINGS},
            stuff_dataset_id_to_contiguous_id={index: index for index in range(len(CLASSES))},
        )


def prepare_ade20k(*, workers: int = 0, progress: Progress | None = None) -> list[Prepared]:
    """Write ``ade20k_instance_{train,val}.json`` and ``ade20k_panoptic_{train,val}{.json,/}``.

    A pixel of a thing class outside all instances is in no segment. Category ids are the classes'
    indices in the list of 150, from 0.

    Args:
        workers: number of worker processes; 0 = this process.
        progress: wraps the iteration over the images.

    Returns:
        What was written, and what was there, for each split.

    Raises:
        DataError: files are missing or unpaired, or have invalid values; or files of an earlier
            preparation are incomplete.
    """
    return [_prepare(split, workers, progress) for split in FOLDERS]


def _prepare(split: str, workers: int, progress: Progress | None) -> Prepared:
    hint = layout_hint(_PREPARED_FROM)
    image_root, label_root = ade20k_roots(split)
    instance_root = os.path.join(
        datasets_root(), "ADEChallengeData2016", "annotations_instance", FOLDERS[split]
    )
    labels = find_files(label_root, ".png", "label maps", hint)
    instances = find_files(instance_root, ".png", "maps of instances", hint)
    images = find_files(image_root, ".jpg", "images", hint)
    pair_files(images, labels, image_root, label_root, hint=hint)
    pair_files(images, instances, image_root, instance_root, hint=hint)
    paths = prepared_paths(split)
    task = partial(_convert, label_root, instance_root)
    categories = [
        {"id": index, "name": name, "isthing": int(index in THINGS)}
        for index, name in enumerate(CLASSES)
    ]
    return prepare_split(
        split,
        task,
        sorted(images),
        categories,
        paths,
        image_name="{}.jpg".format,
        map_name="{}.png".format,
        workers=workers,
        progress=progress,
    )


def _convert(label_root: str, instance_root: str, maps: str | None, stem: str) -> Annotated:
    """Paint stuff first, then instances over it; the map is written into ``maps``."""
    path = os.path.join(instance_root, f"{stem}.png")
    label_path = os.path.join(label_root, f"{stem}.png")
    picture, label = read_image(path), read_label(label_path)
    check_same_size(picture, label, path, label_path)
    categories, numbers = picture[..., 0].astype(np.int64), picture[..., 1].astype(np.int64)
    ids = np.zeros(label.shape, np.int64)
    segments: list[Segment] = []
    for value in np.unique(label[label > 0]).tolist():
        if value - 1 not in THINGS:
            segments.append(Segment(len(segments) + 1, value - 1, thing=False))
            ids[label == value] = len(segments)
    for number in np.unique(numbers[numbers > 0]).tolist():
        inside = numbers == number
        category = _category(categories[inside], number, path)
        segments.append(Segment(len(segments) + 1, category, thing=True))
        ids[inside] = len(segments)
    save_ids(maps, f"{stem}.png", ids)
    return describe_segments(stem, ids, segments)


def _category(values: Sequence[int] | np.ndarray, number: int, path: str) -> int:
    """The class of an instance, 0..149, from the red channel of its pixels."""
    found = np.unique(values).tolist()
    if len(found) != 1 or not 1 <= found[0] <= len(THINGS):
        raise DataError(
            f"In '{path}' instance {number} (green channel) has the categories {found} (red "
            f"channel); it needs exactly one of 1..{len(THINGS)}."
        )
    return THINGS[found[0] - 1]
