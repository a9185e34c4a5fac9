"""Own datasets: a folder of images and a folder of label maps."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from semask.data.datasets.catalog import register_sem_seg
from semask.data.datasets.pairs import load_sem_seg_pairs
from semask.data.image_files import JPEG_LABELS, is_jpeg
from semask.data.reading import LABEL_MAPS, MAX_CLASSES, check_label_map, register_label_map
from semask.utils.palette import class_colors

# An array counts where there is no other image of its name.
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".npy")
# No JPEG or WebP: they change the values of the pixels.
LABEL_EXTENSIONS = (".png", ".tif", ".tiff", ".bmp", ".mat")

_HINT = (
    "An image and its label map have the same name and the same path below their folders, as in "
    "'a/1.jpg' and 'a/1.png'."
)


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
        ValueError: an argument cannot be used, or the name belongs to another dataset. Nothing is
            changed then.
    """
    names = _checked_classes(name, classes, ignore)
    if colors is not None:
        class_colors(len(names), colors)
    table = None if label_map is None or isinstance(label_map, str) else label_map
    if table is not None:
        check_label_map(name, table, replace=replace)
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
            *(image_root, label_root, image_suffixes, label_suffixes),
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
        replace=replace,
        **metadata,
    )
    if table is not None:
        register_label_map(name, table, replace=replace)


def _checked_classes(name: str, classes: Sequence[str], ignore: int) -> list[str]:
    if isinstance(classes, str) or not all(isinstance(entry, str) for entry in classes):
        raise ValueError(f"The classes of dataset '{name}' have to be a list of names.")
    if not classes or len(set(classes)) != len(classes):
        raise ValueError(
            f"The classes of dataset '{name}' have to be different names, at least one; got "
            f"{list(classes)}."
        )
    if len(classes) <= MAX_CLASSES and not len(classes) <= ignore <= 255:
        raise ValueError(
            f"Dataset '{name}' has the classes 0..{len(classes) - 1}, so that its ignore value "
            f"has to lie in {len(classes)}..255; it is {ignore}. Where the files have a class's "
            "index for ignored pixels, give a label_map from the files' values."
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
            f"Dataset '{name}' asks for the label map '{label_map}'; registered are: "
            f"{', '.join(sorted(LABEL_MAPS))}."
        )
    return label_map


def _suffixes(extensions: str | Sequence[str]) -> tuple[str, ...]:
    given = (extensions,) if isinstance(extensions, str) else tuple(extensions)
    return tuple(entry if "." in entry else f".{entry}" for entry in given)
