"""A trained model as a self-contained folder, and on the Hugging Face Hub.

The folder has ``model.safetensors``, ``config.yaml``, ``classes.json`` (names and colours, so that
no dataset is needed) and ``README.md``, a model card. The Hub's own mixin is for modules that are
built from JSON; a config of this project is YAML, so its files are written here, and
huggingface_hub moves them.
"""

import hashlib
import importlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from tabulate import tabulate

from semask.checkpoint import write_checkpoint
from semask.config import load_config
from semask.errors import ConfigError, DataError
from semask.inference.predictor import ImagePredictor, Predictor
from semask.utils.files import read_json, write_text
from semask.utils.text import one_line

WEIGHTS, CONFIG, CLASSES, CARD = "model.safetensors", "config.yaml", "classes.json", "README.md"
FILES = (WEIGHTS, CONFIG, CLASSES, CARD)
# Metadata on classes; the keys of the last two are integer ids, which JSON turns into strings.
_METADATA = ("stuff_classes", "stuff_colors", "thing_classes", "thing_colors", "ignore_label")
_IDS = ("thing_dataset_id_to_contiguous_id", "stuff_dataset_id_to_contiguous_id")
# Config keys with paths of the machine on which the model was trained.
_OF_THE_MACHINE = (
    *(f"DATASETS.{key}" for key in ("FOLDERS", "COCO_FOLDERS", "PANOPTIC_FOLDERS", "FOLDER_ROOT")),
    *("MODEL.WEIGHTS", "OUTPUT_DIR"),
)


def save_pretrained(
    predictor: ImagePredictor,
    folder: str | os.PathLike[str],
    *,
    results: Mapping[str, float] | None = None,
    repo_id: str | None = None,
    private: bool = False,
) -> Path:
    """Write a trained model into a folder, and upload it to the Hub if ``repo_id`` is given.

    Args:
        predictor: of the model.
        folder: created if missing; the files of an earlier ``save_pretrained``, also of an
            interrupted one, are replaced, and so is the card of a fresh clone of a repository. Only
            these files are uploaded, whatever else is in the folder.
        results: measured values by name, such as ``{"mIoU": 71.55}``, for the model card.
        repo_id: also upload the folder there, "user/name"; it needs a token, for instance from ``hf
            auth login``.
        private: whether a newly created repository is private.

    Returns:
        The folder.

    Raises:
        CheckpointError: the weights cannot be written.
        ConfigError: the folder has files with these names that ``save_pretrained`` did not write,
            such as the folder of a run; huggingface_hub is missing, or the upload failed.
    """
    hub = _hub() if repo_id is not None else None  # before anything is written
    folder = Path(folder)
    _check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    classes = _classes(predictor)
    cfg = predictor.cfg.clone()
    cfg.defrost()
    defaults = load_config()
    for key in _OF_THE_MACHINE:
        *path, name = key.split(".")
        section, default = cfg, defaults
        for part in path:
            section, default = section[part], default[part]
        section[name] = default[name]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (), (_name_of(classes),)
    # The classes first: _check_folder recognises an interrupted save by them.
    write_text(str(folder / CLASSES), json.dumps(classes, indent=1, ensure_ascii=False))
    write_text(str(folder / CONFIG), cfg.dump())
    write_text(str(folder / CARD), _card(predictor, repo_id or folder.name, results or {}))
    write_checkpoint(str(folder / WEIGHTS), {"model": predictor.model.state_dict()})
    if hub is not None:
        try:
            hub.create_repo(repo_id, private=private, exist_ok=True)
            hub.upload_folder(repo_id=repo_id, folder_path=str(folder), allow_patterns=list(FILES))
        except (OSError, ValueError) as error:  # base classes of its errors
            raise ConfigError(
                f"Could not upload '{repo_id}' to the Hugging Face Hub: {one_line(error)}."
            ) from error
    return folder


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    overrides: Sequence[str] = (),
) -> ImagePredictor:
    """Load a model that ``save_pretrained`` wrote, strictly, as a predictor.

    Args:
        source: a folder, or a repository on the Hub, "user/name", which is downloaded and cached.
        revision: of the repository: a branch, tag or commit.
        device, overrides: see :class:`ImagePredictor`.

    Raises:
        ConfigError: there is no such folder and huggingface_hub is missing, the repository cannot
            be downloaded, or it has no such model.
        CheckpointError: the weights are damaged or of another model.
    """
    folder = Path(source)
    if not folder.is_dir():
        try:
            folder = Path(_hub().snapshot_download(os.fspath(source), revision=revision))
        except (OSError, ValueError) as error:  # ConfigError, too, is a ValueError
            raise ConfigError(
                f"There is no folder '{source}', and no repository of that name could be "
                f"downloaded: {one_line(error)}."
            ) from error
    missing = [name for name in (WEIGHTS, CONFIG, CLASSES) if not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"'{source}' was not written by semask.save_pretrained: it lacks {', '.join(missing)}."
        )
    try:
        classes = read_json(str(folder / CLASSES))
        _register(classes)
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"'{folder / CLASSES}' is damaged: {one_line(error)}.") from error
    cfg = load_config(str(folder / CONFIG), overrides)
    return Predictor(cfg, folder / WEIGHTS, device=device)


def _check_folder(folder: Path) -> None:
    """
    Raises:
        ConfigError: the folder has files that would be replaced and are not of a saved model.
    """
    there = [name for name in FILES if (folder / name).exists()]
    if not there or {WEIGHTS, CONFIG, CLASSES} <= set(there) or _has_classes(folder / CLASSES):
        return
    if [path.name for path in folder.iterdir() if not path.name.startswith(".")] == [CARD]:
        return  # a new repository of the Hub, which has .git and .gitattributes, too
    raise ConfigError(
        f"'{folder}' has {', '.join(there)}, not written by semask.save_pretrained: choose a new "
        "folder, so that nothing is replaced."
    )


def _has_classes(path: Path) -> bool:
    """Whether ``save_pretrained`` wrote this file, its first; imported labels have another."""
    try:
        content = read_json(str(path))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and not {"stuff_classes", "thing_classes"}.isdisjoint(content)


def _hub() -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ConfigError(
            "The Hub needs the package huggingface_hub: pip install 'semask[hub]'."
        ) from error


def _classes(predictor: ImagePredictor) -> dict[str, Any]:
    """The class metadata of the dataset that the predictor takes its names from, for JSON."""
    names = list(getattr(predictor, "class_names", ()))
    for dataset in (*predictor.cfg.DATASETS.TEST, *predictor.cfg.DATASETS.TRAIN):
        if dataset not in MetadataCatalog.list():
            continue
        metadata = MetadataCatalog.get(dataset)
        if names in (
            list(metadata.get("stuff_classes", ())),
            list(metadata.get("thing_classes", ())),
        ):
            known = {key: metadata.get(key) for key in _METADATA}
            ids = {key: sorted((metadata.get(key) or {}).items()) for key in _IDS}
            return {key: value for key, value in {**known, **ids}.items() if value}
    return {"stuff_classes": names, "thing_classes": names}


def _name_of(classes: Mapping[str, Any]) -> str:
    """A dataset name derived from the classes, so that equal classes share one."""
    text = json.dumps(classes, sort_keys=True)
    return f"pretrained_{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _register(classes: Mapping[str, Any]) -> None:
    """Register a dataset without images that has the metadata of these classes."""
    name = _name_of(classes)
    if name in DatasetCatalog:
        return

    def no_images() -> list[dict[str, Any]]:
        raise DataError(
            f"Dataset '{name}' holds the classes of a pretrained model and no images: set "
            "DATASETS.TRAIN and DATASETS.TEST to your own datasets."
        )

    DatasetCatalog.register(name, no_images)
    known = {key: classes[key] for key in _METADATA if key in classes}
    ids = {key: dict(map(tuple, classes[key])) for key in _IDS if key in classes}
    MetadataCatalog.get(name).set(**known, **ids)


def _card(predictor: ImagePredictor, name: str, results: Mapping[str, float]) -> str:
    cfg, model = predictor.cfg, predictor.model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rows = [(key, f"{value:.2f}") for key, value in results.items()]
    measured = (
        tabulate(rows, ["measure", "value"], tablefmt="pipe") if rows else "Nothing was given."
    )
    classes = ", ".join(getattr(predictor, "class_names", ()))
    return f"""---
library_name: semask
pipeline_tag: image-segmentation
tags:
- semask
- detectron2
- {cfg.TASK}-segmentation
---

# {name}

{cfg.MODEL.META_ARCHITECTURE} on {cfg.MODEL.BACKBONE.NAME}, {parameters:,} parameters, for
{cfg.TASK} segmentation ([SeMask](https://arxiv.org/abs/2112.12782)).

```python
import semask

predictor = semask.from_pretrained("{name}")
prediction = predictor("photograph.jpg")
```

## Measured

{measured}

## Classes

{classes}
"""
