"""Registration of datasets for semantic segmentation in Detectron2's catalogs."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from semask.data.reading import MAX_CLASSES


def datasets_root() -> str:
    """The folder of all built-in datasets: ``$DETECTRON2_DATASETS``, or "datasets", as of now."""
    return os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))


def layout_hint(layout: Sequence[str]) -> str:
    """The end of an error message: where a built-in dataset is searched.

    Args:
        layout: the expected paths, relative to the root of the datasets.
    """
    value = os.getenv("DETECTRON2_DATASETS")
    state = "is not set" if value is None else f"is '{value}'"
    return (
        f"The environment variable DETECTRON2_DATASETS {state}, so datasets are looked for in "
        f"'{os.path.abspath(datasets_root())}'. Expected there:\n"
        + "\n".join(f"    {line}" for line in layout)
        + "\nPut the files there, or set DETECTRON2_DATASETS to the folder that has them."
    )


def register_sem_seg(
    name: str,
    loader: Callable[[], list[dict[str, Any]]],
    classes: Sequence[str],
    colors: Sequence[Sequence[int]],
    ignore_label: int = 255,
    *,
    roots: Callable[[], tuple[str, str]] | None = None,
    replace: bool = False,
    **metadata: Any,
) -> None:
    """Register a dataset for semantic segmentation; doing the same again changes nothing.

    Args:
        name: for configs, in DATASETS.TRAIN and DATASETS.TEST.
        loader: returns the dataset's dicts, with "file_name" and "sem_seg_file_name". It runs
            when the dataset is used, not here.
        classes: names of the K classes, in the order of their indices.
        colors: K colours (red, green, blue), 0..255.
        ignore_label: value of ignored label pixels.
        roots: returns the folders of images and of label maps, for "image_root" and
            "sem_seg_root" of the metadata. It is called at every loading, as the folders may
            depend on the environment; for fixed folders give these two entries directly.
        replace: take the place of a dataset of that name, if there is one.
        **metadata: further entries of the dataset's metadata.

    Raises:
        ValueError: the numbers of colours and classes differ or exceed ``MAX_CLASSES``, or the
            name belongs to a dataset with other metadata. Nothing is changed then.
    """
    if len(classes) > MAX_CLASSES:
        raise ValueError(
            f"Dataset '{name}' has {len(classes)} classes; the maximum is {MAX_CLASSES}, as "
            "label maps are used with 8 bits and one value is for ignored pixels."
        )
    if len(colors) != len(classes):
        raise ValueError(f"Dataset '{name}' has {len(classes)} classes but {len(colors)} colours.")
    entries = {
        "stuff_classes": list(classes),
        "stuff_colors": [list(color) for color in colors],
        "ignore_label": ignore_label,
        "evaluator_type": "sem_seg",
        **metadata,
    }
    if is_registered(name, entries, replace=replace):
        return

    def load() -> list[dict[str, Any]]:
        _note_roots(name, roots)
        return loader()

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(**entries)
    _note_roots(name, roots)


def is_registered(name: str, entries: Mapping[str, Any], *, replace: bool) -> bool:
    """Whether a dataset with this name and these metadata is registered.

    Args:
        name: of the dataset.
        entries: its metadata.
        replace: forget the dataset of that name, if there is one.

    Raises:
        ValueError: its metadata are others, and ``replace`` is False.
    """
    if name not in DatasetCatalog:
        return False
    if replace:
        forget_dataset(name)
        return False
    known = MetadataCatalog.get(name).as_dict()
    differing = [key for key in entries if key not in known or known[key] != entries[key]]
    if differing:
        raise ValueError(
            f"A dataset '{name}' is registered already, with other {', '.join(differing)}. "
            "Choose another name, or register it with replace=True."
        )
    return True


def update_metadata(name: str, **entries: Any) -> None:
    """Set entries of a dataset's metadata, also existing ones, which ``Metadata.set`` refuses.

    Args:
        name: of the dataset.
        **entries: such as folders, which may depend on the environment.
    """
    vars(MetadataCatalog.get(name)).update(entries)


def forget_dataset(name: str) -> None:
    """Remove a dataset and its metadata, if there is one of that name."""
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
    if name in MetadataCatalog.list():
        MetadataCatalog.remove(name)


def _note_roots(name: str, roots: Callable[[], tuple[str, str]] | None) -> None:
    if roots is not None:
        image_root, sem_seg_root = roots()
        update_metadata(name, image_root=image_root, sem_seg_root=sem_seg_root)
