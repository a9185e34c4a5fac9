"""COCO's panoptic format: a JSON file, and a folder of PNGs whose colours are segment ids."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from semask.data.importers.contract import (
    ImportedImage,
    Importer,
    LabelFileError,
    Labels,
    Region,
    Source,
    register_format,
)
from semask.data.importers.files import ImageFiles, cached_json, first_file, split_of, unused_images
from semask.data.importers.formats.coco import (
    annotation_files,
    category_names,
    check_entries,
    is_coco,
    json_files,
    rle_of_mask,
)
from semask.data.segments import read_segment_ids
from semask.errors import DataError


@register_format
class Panoptic(Importer):
    """See the module. Pixels outside all segments are ignored, as in COCO."""

    name = "coco-panoptic"
    title = "COCO panoptic"

    def recognise(self, source: Source) -> str:
        found = first_file(
            json_files(source), lambda path: is_coco(cached_json(path), panoptic=True)
        )
        return f"'{found.name}' has segments_info" if found else ""

    def read(self, source: Source) -> Labels:
        files = ImageFiles(source.images, source.folder)
        labels = Labels([], [], background=False)
        used: set[Path] = set()
        for path in annotation_files(source, panoptic=True):
            content = cached_json(path)
            check_entries(path, content)
            names = category_names(path, content)
            labels.classes += [name for name in names.values() if name not in labels.classes]
            for category in content["categories"]:
                color = category.get("color")
                if isinstance(color, list) and len(color) == 3:
                    labels.colors.setdefault(category["name"], (color[0], color[1], color[2]))
            images = {entry.get("id"): entry for entry in content["images"]}
            segments = _segment_folder(path)
            split = split_of(*path.relative_to(source.folder).parts)
            for number, entry in enumerate(content["annotations"]):
                _check_segments(path, number, entry)
                where = f"{path}: {entry['file_name']}"
                listed = images.get(entry.get("image_id"), {})
                image = _image_of(files, listed, entry, path, segments)
                png = segments / Path(entry["file_name"]).name
                if image is None or not png.is_file():
                    missing = "an image" if image is None else f"their map '{png}'"
                    labels.leave_out(where, f"labels without {missing}")
                    continue
                used |= {image, png}
                labels.images.append(
                    ImportedImage(
                        image,
                        files.relative(image),
                        png,
                        split or split_of(files.relative(image)),
                        regions=_regions(png, entry["segments_info"], names, where),
                    )
                )
            used |= set(segments.glob("*.png"))
        for path in unused_images(files, used):
            labels.leave_out(path, "an image that no annotation file lists")
        return labels


def _check_segments(path: Path, number: int, entry: Mapping[str, Any]) -> None:
    """Refuse an annotation without a file name, or with segments that cannot be used."""
    name, segments = entry.get("file_name"), entry.get("segments_info")
    if not isinstance(name, str):
        raise DataError(f"'{path}': entry {number} of 'annotations' has no file_name.")
    if not isinstance(segments, list) or not all(
        isinstance(segment, dict)
        and isinstance(segment.get("id"), int)
        and isinstance(segment.get("category_id"), int | str)
        for segment in segments
    ):
        raise DataError(
            f"'{path}': the segments_info of '{name}' must be a list of segments with id and "
            f"category_id; it is {str(segments)[:100]}."
        )


def _segment_folder(path: Path) -> Path:
    """The folder of the PNGs: named like the JSON file, or the only one with PNGs."""
    folder = path.with_suffix("")
    if folder.is_dir():
        return folder
    others = [entry for entry in sorted(path.parent.iterdir()) if entry.is_dir()]
    named = [entry for entry in others if "panoptic" in entry.name]
    if len(named) == 1:
        return named[0]
    raise DataError(
        f"'{path}' needs its folder of PNGs, '{folder}', which does not exist.",
        "The maps of a panoptic file must be in a folder with the file's name.",
    )


def _image_of(
    files: ImageFiles,
    listed: Mapping[str, Any],
    entry: Mapping[str, Any],
    path: Path,
    segments: Path,
) -> Path | None:
    name = str(listed.get("file_name") or Path(entry["file_name"]).with_suffix(".jpg"))
    image = files.find(name, path)
    return image if image is None or image.parent != segments else None


def _regions(
    png: Path, segments: list[dict[str, Any]], names: Mapping[Any, str], where: str
) -> Callable[[int, int], list[Region]]:
    def regions(height: int, width: int) -> list[Region]:
        ids = read_segment_ids(png)
        if ids.shape != (height, width):
            raise LabelFileError(
                f"'{png}' is {ids.shape[1]}x{ids.shape[0]} pixels, its image {width}x{height}"
            )
        found = []
        for segment in segments:
            if segment["category_id"] not in names:
                raise DataError(
                    f"{where}: segment {segment['id']} has the category id "
                    f"{segment['category_id']!r}, which is not in 'categories'."
                )
            rle = rle_of_mask(ids == segment["id"])
            crowd = bool(segment.get("iscrowd", 0))
            found.append(Region(names[segment["category_id"]], rle=rle, crowd=crowd))
        return found

    return regions
