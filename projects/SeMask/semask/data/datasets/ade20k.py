"""ADE20K scene parsing as its archive ``ADEChallengeData2016.zip`` unpacks: 150 classes.

20,210 training and 2,000 validation images: Zhou et al., "Scene Parsing through ADE20K Dataset",
CVPR 2017. In the label maps 0 is "other", which is ignored, and 1 to 150 are the classes.
"""

import os
from functools import partial
from typing import Any

from detectron2.data.datasets.builtin_meta import ADE20K_SEM_SEG_CATEGORIES

from semask.data.datasets.catalog import datasets_root, layout_hint, register_sem_seg
from semask.data.datasets.pairs import load_sem_seg_pairs
from semask.data.reading import register_label_map

LABEL_MAP = "ade20k"
FOLDERS = {"train": "training", "val": "validation"}
CLASSES = [synonyms.split(",")[0].strip() for synonyms in ADE20K_SEM_SEG_CATEGORIES]
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


def ade20k_roots(split: str) -> tuple[str, str]:
    """The folders of a split's photographs and label maps."""
    root = os.path.join(datasets_root(), "ADEChallengeData2016")
    return (
        os.path.join(root, "images", FOLDERS[split]),
        os.path.join(root, "annotations", FOLDERS[split]),
    )


def load_ade20k(split: str) -> list[dict[str, Any]]:
    """The dicts of "train" or "val".

    Raises:
        DataError: the files are not where they should be, or do not pair up.
    """
    hint = layout_hint(_LAYOUT)
    return load_sem_seg_pairs(*ade20k_roots(split), label_map=LABEL_MAP, hint=hint)


def register_ade20k() -> None:
    """Register ``ade20k_raw_sem_seg_{train,val}``."""
    register_label_map(LABEL_MAP, [255, *range(150)])
    for split in FOLDERS:
        register_sem_seg(
            f"ade20k_raw_sem_seg_{split}",
            partial(load_ade20k, split),
            CLASSES,
            COLORS,
            roots=partial(ade20k_roots, split),
        )
