"""Own datasets in COCO's format that a config describes, so that they need no Python."""

import difflib
import os

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from semask.data.datasets.catalog import datasets_root, forget_dataset
from semask.data.datasets.coco_folder import register_coco_folder
from semask.errors import ConfigError

REQUIRED = ("NAME", "IMAGE_DIR", "JSON_FILE")
KEYS = (*REQUIRED, "ALLOW_OUTSIDE")


def register_config_coco_folders(cfg: CfgNode) -> None:
    """Register the datasets of ``DATASETS.COCO_FOLDERS``; see ``add_semask_config`` for the keys.

    ``register_config_folders`` does it, too. A name may be registered from configs again and
    again, and then stands for the last one; other datasets are not replaced.

    Args:
        cfg: with this project's keys; it is not changed.

    Raises:
        ConfigError: an entry lacks a key, has one that does not exist, or takes the name of
            another dataset.
    """
    for index, entry in enumerate(cfg.DATASETS.COCO_FOLDERS):
        where = f"DATASETS.COCO_FOLDERS[{index}]"
        if not isinstance(entry, dict):
            raise ConfigError(f"{where} has to be a mapping with the keys {', '.join(KEYS)}.")
        for key in entry:
            if key not in KEYS:
                near = difflib.get_close_matches(str(key).upper(), KEYS, n=1)
                hint = f"Did you mean '{near[0]}'?" if near else f"Known are {', '.join(KEYS)}."
                raise ConfigError(f"{where} has the key '{key}', which does not exist. {hint}")
        for key in REQUIRED:
            if not isinstance(entry.get(key), str) or not entry[key]:
                raise ConfigError(f"{where} needs {key}, as a text.")
        name = entry["NAME"]
        root = os.path.expanduser(cfg.DATASETS.FOLDER_ROOT) or datasets_root()
        image_dir, json_file = (
            os.path.join(root, os.path.expanduser(entry[key])) for key in REQUIRED[1:]
        )
        if name in DatasetCatalog and MetadataCatalog.get(name).get("from_config", False):
            forget_dataset(name)
        try:
            register_coco_folder(
                *(name, image_dir, json_file),
                allow_outside=bool(entry.get("ALLOW_OUTSIDE", False)),
                from_config=True,
            )
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from error
