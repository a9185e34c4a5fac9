"""Built-in datasets of instances and segments: registered, and their files in COCO's formats.

`semask prepare` writes the files from the downloaded ones, with the functions here; what exists is
not changed.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from semask.data.datasets.catalog import update_metadata
from semask.data.datasets.coco_folder import load_coco_folder
from semask.data.datasets.panoptic_folder import load_panoptic_folder
from semask.data.segments import panoptic_picture, read_segment_ids
from semask.errors import DataError
from semask.utils.files import replacing
from semask.utils.text import pluralize

# Wraps the iteration over the images, as ``tqdm`` does.
Progress = Callable[..., Iterable["Annotated"]]


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
        loader: :func:`load_instances`, :func:`load_segments`, or one with the same arguments.
        paths: the folders and files in the metadata, by their entries. It is asked again at every
            loading, as they may depend on the environment.
        **metadata: further entries of the dataset's metadata.
    """
    if name in DatasetCatalog:
        return
    hint = f"It is made from the downloaded files by `semask prepare {name.partition('_')[0]}`."

    def load() -> list[dict[str, Any]]:
        found = paths()
        update_metadata(name, **found)
        return loader(found, name, hint)

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(**paths(), **metadata)


@dataclass(frozen=True)
class Prepared:
    """The files written for a split.

    Attributes:
        split: its name.
        images: number of images.
        paths: the files, and the folder of panoptic maps.
        kept: those of them that were there, and are not changed.
    """

    split: str
    images: int
    paths: list[str]
    kept: list[str]


@dataclass(frozen=True)
class Segment:
    """A set of pixels with one class, not necessarily connected.

    Attributes:
        number: its id in the panoptic map, at least 1.
        category: the dataset's id of its class.
        thing: whether it is an instance.
        crowd: a group of objects that are not separated.
    """

    number: int
    category: int
    thing: bool
    crowd: bool = False


@dataclass(frozen=True)
class Annotated:
    """An image's entries for both files.

    Attributes:
        stem: name of the image without its suffix.
        size: (height, width).
        segments: entries of "segments_info".
        instances: annotations of instances, without "id" and "image_id".
    """

    stem: str
    size: tuple[int, int]
    segments: list[dict[str, Any]]
    instances: list[dict[str, Any]]


def describe_segments(stem: str, ids: np.ndarray, segments: Sequence[Segment]) -> Annotated:
    """The entries of an image.

    Args:
        stem: its name.
        ids: (H, W), the number of each pixel's segment; 0 = none.
        segments: those without pixels are left out.
    """
    infos: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    for segment in segments:
        rle = mask_util.encode(np.asfortranarray(ids == segment.number, dtype=np.uint8))
        entry = {
            "category_id": segment.category,
            "iscrowd": int(segment.crowd),
            "area": int(mask_util.area(rle)),
            "bbox": [int(value) for value in mask_util.toBbox(rle)],
        }
        if not entry["area"]:
            continue
        infos.append({"id": segment.number, **entry})
        if segment.thing:
            counts = rle["counts"].decode("ascii")
            mask = {"size": [int(side) for side in rle["size"]], "counts": counts}
            instances.append({**entry, "segmentation": mask})
    return Annotated(stem, (ids.shape[0], ids.shape[1]), infos, instances)


def save_ids(folder: str | None, name: str, ids: np.ndarray) -> None:
    """Write a map of segment ids in COCO's encoding, R + 256 G + 65536 B.

    Args:
        folder: of the maps; None = write nothing.
        name: of the file.
        ids: (H, W), 0 = no segment.

    Raises:
        DataError: the file exists, and has other ids.
    """
    if folder is None:
        return
    path = os.path.join(folder, name)
    if os.path.exists(path):
        if not np.array_equal(read_segment_ids(path), ids):
            raise DataError(
                f"'{path}' exists and has other segment ids than `semask prepare` writes.",
                f"Remove or rename the folder '{folder}' to have all maps written again.",
            )
        return
    write_ids(path, ids)


def write_ids(path: str, ids: np.ndarray) -> None:
    """Write a map of segment ids, also over an existing one; see :func:`save_ids`."""
    with replacing(path) as file:
        Image.fromarray(panoptic_picture(ids)).save(file, format="PNG")


def prepare_split(
    split: str,
    task: Callable[[str | None, str], Annotated],
    images: Sequence[str],
    categories: Sequence[dict[str, Any]],
    paths: Mapping[str, str],
    *,
    image_name: Callable[[str], str],
    map_name: Callable[[str], str],
    other_file: Callable[[str], str] | None = None,
    workers: int,
    progress: Progress | None,
) -> Prepared:
    """Convert the images of a split and write those of COCO's two files that do not exist.

    Args:
        split: its name.
        task: converts an image, and writes its panoptic map into a folder, unless this is None.
        images: the last argument of ``task`` for each image; the image's path ends in it.
        categories: "id", "name" and "isthing"; the file of instances has the things.
        paths: "json_file" of the instances, "panoptic_json" and "panoptic_root".
        image_name: from an image's stem to its file, relative to the folder of images.
        map_name: the same for its panoptic map.
        other_file: from an argument of ``task`` to the path of another file that it writes if this
            is missing; None = there is none.
        workers: number of worker processes; 0 = this process.
        progress: wraps the iteration over the images.

    Raises:
        DataError: a downloaded file cannot be used, or an existing file of segments lacks maps.
    """
    missing = [key for key in ("json_file", "panoptic_json") if not os.path.exists(paths[key])]
    kept = [paths["json_file"]] if "json_file" not in missing else []
    maps: str | None = paths["panoptic_root"]
    if "panoptic_json" not in missing:
        # Another program may have written it, with other ids: its maps belong to it.
        _check_maps(paths, [map_name(os.path.basename(image)) for image in images])
        kept += [paths["panoptic_json"], paths["panoptic_root"]]
        maps = None
    if missing:
        annotated = list(_each_image(partial(task, maps), images, workers, progress))
        _write_json(annotated, categories, paths, missing, image_name, map_name)
    elif other_file is not None:
        lacking = [image for image in images if not os.path.exists(other_file(image))]
        for _ in _each_image(partial(task, maps), lacking, workers, progress):
            pass  # the task has written the file
    return Prepared(split, len(images), list(paths.values()), kept)


def _check_maps(paths: Mapping[str, str], names: Sequence[str]) -> None:
    folder = paths["panoptic_root"]
    lacking = [name for name in names if not os.path.exists(os.path.join(folder, name))]
    if lacking:
        raise DataError(
            f"'{paths['panoptic_json']}' exists, but '{folder}' lacks "
            f"{pluralize(len(lacking), 'map')}, the first is '{lacking[0]}'.",
            "Remove the file to have it and its maps written again, or add the maps.",
        )


def _each_image(
    task: Callable[[str], Annotated],
    stems: Sequence[str],
    workers: int,
    progress: Progress | None,
) -> Iterator[Annotated]:
    """Run ``task`` for each image, in order, in ``workers`` processes; 0 = in this process."""

    def shown(results: Iterable[Annotated]) -> Iterable[Annotated]:
        return progress(results, total=len(stems)) if progress else results

    if not workers:
        yield from shown(map(task, stems))
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from shown(pool.map(task, stems, chunksize=8))


def _write_json(
    annotated: Sequence[Annotated],
    categories: Sequence[dict[str, Any]],
    paths: Mapping[str, str],
    keys: Sequence[str],
    image_name: Callable[[str], str],
    map_name: Callable[[str], str],
) -> None:
    """Write the files of ``paths`` with the given keys."""
    images = [
        {
            "id": each.stem,
            "file_name": image_name(each.stem),
            "height": each.size[0],
            "width": each.size[1],
        }
        for each in annotated
    ]
    numbers = iter(range(1, 1 + sum(len(each.instances) for each in annotated)))
    instances = {
        "images": [{**image, "id": number} for number, image in enumerate(images, start=1)],
        "categories": [entry for entry in categories if entry["isthing"]],
        "annotations": [
            {"id": next(numbers), "image_id": number, **entry}
            for number, each in enumerate(annotated, start=1)
            for entry in each.instances
        ],
    }
    panoptic = {
        "images": images,
        "categories": list(categories),
        "annotations": [
            {
                "image_id": each.stem,
                "file_name": map_name(each.stem),
                "segments_info": each.segments,
            }
            for each in annotated
        ],
    }
    contents = {"json_file": instances, "panoptic_json": panoptic}
    for key in keys:
        with replacing(paths[key]) as file:
            file.write(json.dumps(contents[key]).encode())
