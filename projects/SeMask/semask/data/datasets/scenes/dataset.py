"""Scenes: 400 + 100 drawn landscapes with ten classes that come in look-alike pairs.

The files are drawn when the dataset is first used, under ``$DETECTRON2_DATASETS/scenes``. Each
file appears under its name only when it is complete, and states its identity inside; the manifest
is written last. So drawing may be interrupted at any moment, and the next use continues it.
"""

import contextlib
import importlib
import io
import json
import logging
import os
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from semask.data.datasets.catalog import datasets_root, register_sem_seg
from semask.data.datasets.scenes.painting import CLASSES, COLORS
from semask.data.datasets.scenes.render import GENERATOR_VERSION, render_scene
from semask.errors import DataError
from semask.utils.files import read_json, remove_temporaries, replacing

# Windows has no such module, and the dataset can do without.
fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None

logger = logging.getLogger(__name__)

SEED = 0
SPLITS: Mapping[str, int] = {"train": 400, "val": 100}

_KINDS = ("images", "annotations")
_MANIFEST = "manifest.json"
# Key of the text in each PNG file that identifies it.
_MARK = "semask-scenes"

# Of each scene: "height", "width", and the bytes of the files in "images" and "annotations".
_Records = dict[str, list[dict[str, int]]]


def make_scenes(folder: str, splits: Mapping[str, int] = SPLITS) -> dict[str, list[dict[str, Any]]]:
    """Complete the dataset in ``folder``: draw missing images.

    Any number of processes may call this at once; one draws and the others wait for it.

    Args:
        folder: of the dataset; it need not exist.
        splits: number of images of each split; the keys are some of those of ``SPLITS``.

    Returns:
        The dataset dicts of each split.

    Raises:
        DataError: the files cannot be written, or there is no such split.
    """
    if unknown := sorted({*splits} - {*SPLITS}):
        raise DataError(
            f"The scenes dataset has no split '{unknown[0]}': use {' or '.join(SPLITS)}."
        )
    records = _finished(folder, splits)
    if records is None:
        try:
            os.makedirs(folder, exist_ok=True)
            with _lock(folder) as locked:
                records = _finished(folder, splits) or _finish(folder, splits, tidy=locked)
        except OSError as error:
            raise DataError(
                f"Cannot write the scenes dataset into '{os.path.abspath(folder)}': {error}. Set "
                "the environment variable DETECTRON2_DATASETS to a folder that can be written to "
                "and has 50 MB free."
            ) from error
    return {
        split: [
            {
                "file_name": _path(folder, "images", split, index),
                "sem_seg_file_name": _path(folder, "annotations", split, index),
                "height": record["height"],
                "width": record["width"],
            }
            for index, record in enumerate(scenes)
        ]
        for split, scenes in records.items()
    }


def register_scenes() -> None:
    """Register ``scenes_sem_seg_{train,val}``."""
    for split in SPLITS:
        register_sem_seg(
            f"scenes_sem_seg_{split}",
            partial(_load, split),
            CLASSES,
            COLORS,
            roots=partial(_roots, split),
        )


def _load(split: str) -> list[dict[str, Any]]:
    return make_scenes(_folder())[split]


def _folder() -> str:
    return os.path.join(datasets_root(), "scenes")


def _roots(split: str) -> tuple[str, str]:
    return os.path.join(_folder(), "images", split), os.path.join(_folder(), "annotations", split)


def _path(folder: str, kind: str, split: str, index: int) -> str:
    return os.path.join(folder, kind, split, f"{index:05d}.png")


def _identity(splits: Mapping[str, int]) -> dict[str, Any]:
    """Everything that the pixels depend on."""
    return {"generator_version": GENERATOR_VERSION, "seed": SEED, "images": dict(splits)}


def _mark(kind: str, split: str, index: int) -> str:
    return f"version {GENERATOR_VERSION}, seed {SEED}, {kind}/{split}/{index:05d}"


def _finished(folder: str, splits: Mapping[str, int]) -> _Records | None:
    """The manifest's records, if it is of this dataset and all files are complete."""
    try:
        manifest = read_json(os.path.join(folder, _MANIFEST))
        records: _Records = manifest["files"]
        same = manifest["dataset"] == _identity(splits) and all(
            os.path.getsize(_path(folder, kind, split, index)) == records[split][index][kind]
            for split, count in splits.items()
            for index in range(count)
            for kind in _KINDS
        )
    except (OSError, ValueError, LookupError, TypeError):
        # No manifest, a damaged one, or a file missing: in each case it is not finished.
        return None
    return records if same else None


def _finish(folder: str, splits: Mapping[str, int], tidy: bool) -> _Records:
    """Draw the missing scenes, then write the manifest."""
    for kind in _KINDS:
        for split in splits:
            os.makedirs(os.path.join(folder, kind, split), exist_ok=True)
    if tidy:  # files that killed processes have left
        for place, _, _ in os.walk(folder):
            remove_temporaries(place)
    scenes = [(split, index) for split, count in splits.items() for index in range(count)]
    found = {scene: record for scene in scenes if (record := _find_scene(folder, *scene))}
    missing = [scene for scene in scenes if scene not in found]
    logger.info(
        "Drawing %d of the %d images of the scenes dataset into '%s' (once; seed %d)",
        len(missing),
        len(scenes),
        os.path.abspath(folder),
        SEED,
    )
    for scene in tqdm(missing, desc="Drawing scenes", unit="image", mininterval=1.0):
        found[scene] = _draw_scene(folder, *scene)
    records = {
        split: [found[split, index] for index in range(count)] for split, count in splits.items()
    }
    description = {"classes": CLASSES, "colors": COLORS, "ignore_label": 255}
    _write(os.path.join(folder, "classes.json"), json.dumps(description, indent=1).encode())
    manifest = {"dataset": _identity(splits), "files": records}
    _write(os.path.join(folder, _MANIFEST), json.dumps(manifest).encode())
    return records


def _find_scene(folder: str, split: str, index: int) -> dict[str, int] | None:
    """The record of a scene whose two files exist undamaged; else None."""
    record = {}
    for kind in _KINDS:
        path = _path(folder, kind, split, index)
        try:
            with Image.open(path, formats=["PNG"]) as image:
                if image.info.get(_MARK) != _mark(kind, split, index):
                    return None
                record["height"], record["width"] = image.height, image.width
                image.verify()
            record[kind] = os.path.getsize(path)
        except (OSError, ValueError, SyntaxError):
            # Missing or damaged (Pillow reports broken PNG chunks as SyntaxError).
            return None
    return record


def _draw_scene(folder: str, split: str, index: int) -> dict[str, int]:
    arrays = render_scene(SEED, list(SPLITS).index(split), index)
    record = {"height": arrays[0].shape[0], "width": arrays[0].shape[1]}
    for kind, array in zip(_KINDS, arrays, strict=True):
        content = _png(array, _mark(kind, split, index))
        _write(_path(folder, kind, split, index), content)
        record[kind] = len(content)
    return record


def _png(array: np.ndarray, mark: str) -> bytes:
    info = PngInfo()
    info.add_text(_MARK, mark)
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", pnginfo=info, compress_level=3)
    return buffer.getvalue()


def _write(path: str, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)


@contextlib.contextmanager
def _lock(folder: str) -> Iterator[bool]:
    """Make other processes wait; yields False where the file system has no locks.

    Without a lock the result is the same, as files appear complete; only the work is done twice. A
    lock ends with its process.
    """
    with open(os.path.join(folder, ".lock"), "wb") as file:
        if fcntl is None:
            yield False
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except BlockingIOError:
            logger.info("Waiting for another process that draws the scenes dataset")
            fcntl.flock(file, fcntl.LOCK_EX)
            locked = True
        except OSError as error:
            logger.info("'%s' cannot be locked (%s); drawing anyway", folder, error)
            locked = False
        yield locked
