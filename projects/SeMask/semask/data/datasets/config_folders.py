"""Own datasets that a config describes, so that they need no Python."""

import difflib
import os
from collections.abc import Collection, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from semask.config import register_resolver
from semask.data.datasets.catalog import datasets_root, forget_dataset
from semask.data.datasets.coco_folder import register_coco_folder
from semask.data.datasets.folder import register_folder
from semask.data.datasets.panoptic_folder import register_panoptic_folder
from semask.data.reading import LABEL_MAPS
from semask.errors import ConfigError

# The keys of an entry of DATASETS.COCO_FOLDERS.
COCO_REQUIRED = ("NAME", "IMAGE_DIR", "JSON_FILE")
COCO_OPTIONAL = ("ALLOW_OUTSIDE",)

# The keys of an entry of DATASETS.PANOPTIC_FOLDERS.
PANOPTIC_REQUIRED = ("NAME", "IMAGE_DIR", "PANOPTIC_DIR", "JSON_FILE")

# The keys of an entry of DATASETS.FOLDERS.
REQUIRED = ("NAME", "IMAGE_DIR", "LABEL_DIR")
# Further keys, and the arguments of ``register_folder`` that they set.
OPTIONAL = {
    "CLASSES": "classes",
    "IGNORE": "ignore",
    "COLORS": "colors",
    "IMAGE_EXT": "image_ext",
    "LABEL_EXT": "label_ext",
    "LABEL_MAP": "label_map",
}


def register_config_folders(cfg: CfgNode) -> None:
    """Register the datasets of ``DATASETS.FOLDERS``; see ``add_semask_config`` for the keys.

    Those of ``DATASETS.COCO_FOLDERS`` and ``PANOPTIC_FOLDERS`` are registered, too. ``load_config``
    calls this. A process that gets a config in another way, such as one started by ``launch``, has
    to call it itself. A name may be registered from configs several times; the last one counts.
    Other datasets are not replaced.

    Args:
        cfg: with this project's keys; it is not changed.

    Raises:
        ConfigError: an entry lacks a key, has one that does not exist or a value that cannot be
            used, or takes the name of another dataset.
    """
    for index, entry in enumerate(cfg.DATASETS.FOLDERS):
        where = f"DATASETS.FOLDERS[{index}]"
        _check_keys(entry, where, REQUIRED, OPTIONAL)
        name = entry["NAME"]
        arguments = {OPTIONAL[key]: value for key, value in entry.items() if key in OPTIONAL}
        arguments.setdefault("classes", cfg.DATASETS.FOLDER_CLASSES)
        arguments.setdefault("ignore", cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE)
        image_dir, label_dir = _paths(cfg, entry, REQUIRED[1:])
        _forget(name)
        try:
            register_folder(name, image_dir, label_dir, **arguments, from_config=True)
        except (ValueError, TypeError) as error:
            hint = "" if arguments["classes"] else " Name them in DATASETS.FOLDER_CLASSES."
            raise ConfigError(f"{where}: {error}{hint}") from error
    _register_coco_folders(cfg)
    _register_panoptic_folders(cfg)


def _register_coco_folders(cfg: CfgNode) -> None:
    """The same for ``DATASETS.COCO_FOLDERS``."""
    for index, entry in enumerate(cfg.DATASETS.COCO_FOLDERS):
        where = f"DATASETS.COCO_FOLDERS[{index}]"
        _check_keys(entry, where, COCO_REQUIRED, COCO_OPTIONAL)
        name = entry["NAME"]
        image_dir, json_file = _paths(cfg, entry, COCO_REQUIRED[1:])
        _forget(name)
        try:
            register_coco_folder(
                *(name, image_dir, json_file),
                allow_outside=bool(entry.get("ALLOW_OUTSIDE", False)),
                from_config=True,
            )
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from error


def _register_panoptic_folders(cfg: CfgNode) -> None:
    """The same for ``DATASETS.PANOPTIC_FOLDERS``."""
    for index, entry in enumerate(cfg.DATASETS.PANOPTIC_FOLDERS):
        where = f"DATASETS.PANOPTIC_FOLDERS[{index}]"
        _check_keys(entry, where, PANOPTIC_REQUIRED)
        name = entry["NAME"]
        _forget(name)
        try:
            register_panoptic_folder(
                name, *_paths(cfg, entry, PANOPTIC_REQUIRED[1:]), from_config=True
            )
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from error


def _check_keys(
    entry: Any, where: str, required: Sequence[str], optional: Collection[str] = ()
) -> None:
    known = [*required, *optional]
    if not isinstance(entry, dict):
        raise ConfigError(f"{where} has to be a mapping with the keys {', '.join(known)}.")
    for key in entry:
        if key not in known:
            near = difflib.get_close_matches(str(key).upper(), known, n=1)
            hint = f"Did you mean '{near[0]}'?" if near else f"Known are {', '.join(known)}."
            raise ConfigError(f"{where} has the key '{key}', which does not exist. {hint}")
    for key in required:
        if not isinstance(entry.get(key), str) or not entry[key]:
            raise ConfigError(f"{where} needs {key}, as a text.")


def _paths(cfg: CfgNode, entry: dict[str, Any], keys: Sequence[str]) -> list[str]:
    """Values of an entry, below ``DATASETS.FOLDER_ROOT``."""
    root = os.path.expanduser(cfg.DATASETS.FOLDER_ROOT) or datasets_root()
    return [os.path.join(root, os.path.expanduser(entry[key])) for key in keys]


def _forget(name: str) -> None:
    """Remove what an earlier config registered under ``name``."""
    if name in DatasetCatalog and MetadataCatalog.get(name).get("from_config", False):
        forget_dataset(name)
        LABEL_MAPS.pop(name, None)


register_resolver(register_config_folders)
