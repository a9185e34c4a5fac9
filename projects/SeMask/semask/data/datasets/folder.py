"""Own datasets: a folder of images and a folder of label maps.

A config can describe these, and those in COCO's formats, so that they need no Python.
"""

import difflib
import os
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from semask.config import register_resolver
from semask.data.datasets.catalog import datasets_root, forget_dataset, register_sem_seg
from semask.data.datasets.coco_folder import register_coco_folder
from semask.data.datasets.pairs import load_sem_seg_pairs
from semask.data.datasets.panoptic_folder import register_panoptic_folder
from semask.data.image_files import JPEG_LABELS, is_jpeg
from semask.data.reading import LABEL_MAPS, MAX_CLASSES, check_label_map, register_label_map
from semask.errors import ConfigError
from semask.utils.palette import class_colors

# An array counts where there is no other image of its name.
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".npy")
# No JPEG or WebP: they change the values of the pixels.
LABEL_EXTENSIONS = (".png", ".tif", ".tiff", ".bmp", ".mat")

_HINT = (
    "An image and its label map have the same name and the same path below their folders, as in "
    "'a/1.jpg' and 'a/1.png'."
)

# The keys of an entry of DATASETS.COCO_FOLDERS.
COCO_REQUIRED = ("NAME", "IMAGE_DIR", "JSON_FILE")
COCO_OPTIONAL = ("ALLOW_OUTSIDE",)

# The keys of an entry of DATASETS.PANOPTIC_FOLDERS.
PANOPTIC_REQUIRED = ("NAME", "IMAGE_DIR", "PANOPTIC_DIR", "JSON_FILE")

# The keys of an entry of DATASETS.FOLDERS.
FOLDER_REQUIRED = ("NAME", "IMAGE_DIR", "LABEL_DIR")
# Further keys, and the arguments of ``register_folder`` that they set.
FOLDER_OPTIONAL = {
    "CLASSES": "classes",
    "IGNORE": "ignore",
    "COLORS": "colors",
    "IMAGE_EXT": "image_ext",
    "LABEL_EXT": "label_ext",
    "LABEL_MAP": "label_map",
}


def register_folder(
    name: str,
    image_dir: str | os.PathLike[str],
    label_dir: str | os.PathLike[str],
    classes: Sequence[str],
    ignore: int = 255,
    *,
    colors: Sequence[Sequence[int]] | None = None,
    image_ext: str | Sequence[str] = IMAGE_EXTENSIONS,
    label_ext: str | Sequence[str] = LABEL_EXTENSIONS,
    label_map: str | Sequence[int] | Mapping[int, int] | None = None,
    replace: bool = False,
    **metadata: Any,
) -> None:
    """Register an own dataset for DATASETS.TRAIN and DATASETS.TEST.

    The folders are searched, with their subfolders, when the dataset is used. An image and its
    label map have the same path below their folders, up to the extension. A label map has one
    channel with the class index of each pixel.

    Args:
        name: of the dataset, for configs.
        image_dir: folder of the images.
        label_dir: folder of the label maps; it may be the same one where the extensions differ.
        classes: names of the K classes (at most 255), in the order of their indices.
        ignore: value of ignored label pixels, K..255.
        colors: K colours (red, green, blue), 0..255; None = well distinguishable ones.
        image_ext: extension or extensions of the images, or other endings of their names, such as
            "_rgb.png".
        label_ext: the same of the label maps; JPEG cannot hold class indices.
        label_map: for files with other values than class indices: the index (or ``ignore``) of
            each raw value, as a list or as a dict; or the name of a registered label map.
        replace: take the place of a dataset of that name, as when a notebook's cell with other
            arguments runs again; without it, the same call again changes nothing.
        **metadata: further entries of the dataset's metadata.

    Raises:
        ValueError: an argument cannot be used, or the name belongs to another dataset or, with a
            table as ``label_map``, to another label map. Nothing is changed then.
    """
    names = _checked_classes(name, classes, ignore)
    if colors is not None:
        class_colors(len(names), colors)
    table = None if label_map is None or isinstance(label_map, str) else label_map
    had_table = _has_own_table(name)
    has_table = table is not None and (had_table or name not in LABEL_MAPS)
    if table is not None:
        # A table of that name that another dataset uses, such as ADE20K's, is never replaced.
        check_label_map(name, table, replace=replace and has_table)
    label_map_name = _label_map_name(name, label_map)
    image_root, label_root = (
        os.path.abspath(os.path.expanduser(folder)) for folder in (image_dir, label_dir)
    )
    image_suffixes, label_suffixes = _suffixes(image_ext), _suffixes(label_ext)
    if any(is_jpeg(suffix) for suffix in label_suffixes):
        raise ValueError(
            f"Dataset '{name}': the label maps' extension is {' or '.join(label_suffixes)}. "
            f"{JPEG_LABELS}"
        )
    register_sem_seg(
        name,
        partial(
            load_sem_seg_pairs,
            image_root,
            label_root,
            image_suffixes,
            label_suffixes,
            label_map=label_map_name,
            hint=_HINT,
        ),
        names,
        class_colors(len(names), colors).tolist(),
        ignore,
        image_root=image_root,
        sem_seg_root=label_root,
        image_ext=image_suffixes,
        label_ext=label_suffixes,
        label_map=label_map_name,
        has_own_table=has_table,
        replace=replace,
        **metadata,
    )
    if has_table and table is not None:
        register_label_map(name, table, replace=replace)
    elif had_table:
        del LABEL_MAPS[name]


def _has_own_table(name: str) -> bool:
    """Whether a dataset of that name is registered, with a label map of its own."""
    return (
        name in DatasetCatalog
        and name in LABEL_MAPS
        and bool(MetadataCatalog.get(name).get("has_own_table", False))
    )


def _checked_classes(name: str, classes: Sequence[str], ignore: int) -> list[str]:
    if isinstance(classes, str) or not all(isinstance(entry, str) for entry in classes):
        raise ValueError(f"The classes of dataset '{name}' must be a list of names.")
    if not classes or len(set(classes)) != len(classes):
        raise ValueError(
            f"The classes of dataset '{name}' must be different names, at least one; got "
            f"{list(classes)}."
        )
    if len(classes) <= MAX_CLASSES and not len(classes) <= ignore <= 255:
        raise ValueError(
            f"Dataset '{name}' has the classes 0..{len(classes) - 1}, so its ignore value must be "
            f"in {len(classes)}..255; it is {ignore}. If the files use a class index for ignored "
            "pixels, set a label_map from the files' values."
        )
    return list(classes)


def _label_map_name(
    name: str, label_map: str | Sequence[int] | Mapping[int, int] | None
) -> str | None:
    """The name of the label map; a table is registered under the dataset's name."""
    if label_map is None or not isinstance(label_map, str):
        return None if label_map is None else name
    if label_map not in LABEL_MAPS:
        raise ValueError(
            f"Dataset '{name}' names the label map '{label_map}'; registered are: "
            f"{', '.join(sorted(LABEL_MAPS))}."
        )
    return label_map


def _suffixes(extensions: str | Sequence[str]) -> tuple[str, ...]:
    given = (extensions,) if isinstance(extensions, str) else tuple(extensions)
    return tuple(entry if "." in entry else f".{entry}" for entry in given)


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
        _check_keys(entry, where, FOLDER_REQUIRED, FOLDER_OPTIONAL)
        name = entry["NAME"]
        arguments = {
            FOLDER_OPTIONAL[key]: value for key, value in entry.items() if key in FOLDER_OPTIONAL
        }
        arguments.setdefault("classes", cfg.DATASETS.FOLDER_CLASSES)
        arguments.setdefault("ignore", cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE)
        image_dir, label_dir = _paths(cfg, entry, FOLDER_REQUIRED[1:])
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
                name,
                image_dir,
                json_file,
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
        raise ConfigError(f"{where} must be a mapping with the keys {', '.join(known)}.")
    for key in entry:
        if key not in known:
            near = difflib.get_close_matches(str(key).upper(), known, n=1)
            hint = f"Did you mean '{near[0]}'?" if near else f"Known are {', '.join(known)}."
            raise ConfigError(f"{where} has the key '{key}', which does not exist. {hint}")
    for key in required:
        if not isinstance(entry.get(key), str) or not entry[key]:
            raise ConfigError(f"{where} needs {key}, as a string.")


def _paths(cfg: CfgNode, entry: dict[str, Any], keys: Sequence[str]) -> list[str]:
    """Values of an entry, below ``DATASETS.FOLDER_ROOT``."""
    root = os.path.expanduser(cfg.DATASETS.FOLDER_ROOT) or datasets_root()
    return [os.path.join(root, os.path.expanduser(entry[key])) for key in keys]


def _forget(name: str) -> None:
    """Remove what an earlier config registered under ``name``."""
    if name in DatasetCatalog and MetadataCatalog.get(name).get("from_config", False):
        if _has_own_table(name):
            del LABEL_MAPS[name]
        forget_dataset(name)


register_resolver(register_config_folders)
