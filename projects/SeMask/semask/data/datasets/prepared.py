"""Built-in datasets of instances and segments, whose files `semask prepare` writes."""

import os
from collections.abc import Callable, Mapping
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from semask.data.datasets.coco_folder import load_coco_folder
from semask.data.datasets.panoptic_folder import load_panoptic_folder


def instance_file(folder: str, dataset: str, split: str) -> dict[str, str]:
    """The file of a split's instances, by its entry of the metadata.

    Args:
        folder: it is in.
        dataset: what `semask prepare` calls it.
        split: "train" or "val".
    """
    return {"json_file": os.path.join(folder, f"{dataset}_instance_{split}.json")}


def panoptic_files(folder: str, dataset: str, split: str) -> dict[str, str]:
    """The file of a split's segments and the folder of their maps; see :func:`instance_file`."""
    stem = os.path.join(folder, f"{dataset}_panoptic_{split}")
    return {"panoptic_json": f"{stem}.json", "panoptic_root": stem}


def load_instances(paths: Mapping[str, str], name: str, hint: str) -> list[dict[str, Any]]:
    """The dicts of a dataset of instances.

    Args:
        paths: "image_root" and "json_file".
        name: of the dataset.
        hint: what to say of missing files.

    Raises:
        DataError: see :func:`load_coco_folder`.
    """
    return load_coco_folder(paths["json_file"], paths["image_root"], name, hint)


def load_segments(paths: Mapping[str, str], name: str, hint: str) -> list[dict[str, Any]]:
    """The dicts of a panoptic dataset.

    Args:
        paths: "image_root", "panoptic_json" and "panoptic_root".
        name: of the dataset.
        hint: what to say of missing files.

    Raises:
        DataError: see :func:`load_panoptic_folder`.
    """
    return load_panoptic_folder(
        paths["panoptic_json"], paths["image_root"], paths["panoptic_root"], name, hint
    )


def register_prepared(
    name: str,
    loader: Callable[[Mapping[str, str], str, str], list[dict[str, Any]]],
    paths: Callable[[], Mapping[str, str]],
    **metadata: Any,
) -> None:
    """Register a dataset whose files `semask prepare` writes.

    Args:
        name: what configs call it.
        loader: :func:`load_instances`, :func:`load_segments`, or one that takes the same.
        paths: the folders and files in the metadata, by their entries. It is asked again at every
            loading, as they may depend on the environment.
        **metadata: further entries of the dataset's metadata.
    """
    if name in DatasetCatalog:
        return
    hint = f"It is made from the downloaded files by `semask prepare {name.partition('_')[0]}`."

    def load() -> list[dict[str, Any]]:
        found = paths()
        # Metadata.set refuses to change what is there already.
        vars(MetadataCatalog.get(name)).update(found)
        return loader(found, name, hint)

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(**paths(), **metadata)
