"""Images with coloured or grey label maps: Pascal VOC, CVAT's segmentation masks, and others.

The names of the colours come from a file (``--palette``, CVAT's labelmap.txt, class_dict.csv, ...);
Pascal VOC's are built in, and maps of two values are background and object. Otherwise the colours
are listed with their counts for the user to name.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from semask.data.importers.contract import (
    IGNORE,
    ImportedImage,
    Importer,
    LabelFileError,
    Labels,
    Note,
    Source,
    register_format,
)
from semask.data.importers.files import (
    ImageFiles,
    files_below,
    load_lines,
    some_files,
    split_of,
)
from semask.data.importers.palette import (
    MapColors,
    Palette,
    collect_colors,
    is_grey,
    listed,
    read_colors,
    read_palette,
    rgb,
    to_indices,
    unnamed_colors,
    write_colors,
)
from semask.errors import DataError
from semask.utils.text import composed, pluralize

_IMAGE_WORDS = ("image", "images", "img", "imgs", "jpegimages", "photo", "photos", "rgb", "input")
_MASK_WORDS = (
    *("mask", "masks", "label", "labels", "annotation", "annotations", "ann", "gt", "groundtruth"),
    *("segmentationclass", "segmentationclasspng", "segmentation", "seg", "labelmaps", "labelmap"),
    *("target", "l"),
)
# Visualisations of labels.
_PASSED_OVER = (
    *("segmentationobject", "segmentationobjectpng", "segmentationobjectvisualization"),
    *("segmentationclassvisualization", "overlay", "visualization"),
)
_PALETTES = (
    *("labelmap.txt", "class_dict.csv", "classes.csv", "palette.csv", "label_colors.txt"),
    *("palette.txt", "colors.txt", "colours.txt", "palette.json", "classes.json"),
)
_VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat"),
    *("chair", "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant"),
    *("sheep", "sofa", "train", "tvmonitor"),
)
_TWO_CLASSES = ("background", "object")


def voc_palette() -> Palette:
    """Pascal VOC's colours and names."""
    return {voc_color(255): "ignore"} | {voc_color(i): n for i, n in enumerate(_VOC_CLASSES)}


def voc_color(index: int) -> int:
    """The colour of an index in Pascal VOC's palette, which LabelMe's converter also uses."""
    channels = [0, 0, 0]
    for bit in range(8):
        channels[bit % 3] |= (index >> bit & 1) << (7 - bit // 3)
    return channels[0] << 16 | channels[1] << 8 | channels[2]


@register_format
class Masks(Importer):
    """See the module."""

    name = "masks"
    title = "coloured or grey label maps"
    fallback = True

    def recognise(self, source: Source) -> str:
        try:
            pairs, images, _ = _paired(source)
        except DataError:  # raised again on reading
            return "label maps and images"
        if not pairs:
            return ""
        number = len(pairs) + len(images)
        return f"{len(pairs)} of {pluralize(number, 'image')} have a label map of the same name"

    def read(self, source: Source) -> Labels:
        pairs, images_alone, maps_alone = _paired(source)
        labels = Labels([], [], background=False)
        for path in images_alone.values():
            labels.leave_out(path, "an image without a label map")
        for path in maps_alone.values():
            labels.leave_out(path, "a label map without an image")
        found, failed = collect_colors(mask for _, mask in pairs.values())
        palette = self._palette(source, found)
        names = list(dict.fromkeys(palette.values()))
        labels.classes = names
        labels.colors = {name: rgb(color) for color, name in reversed(palette.items())}
        _check_unknown(found, palette, source)
        indices = {color: names.index(name) for color, name in palette.items()}
        relative = {path: folder for folder, path in _relative_paths(source)}
        parts = _image_sets(source.folder)
        for key, (image, mask) in sorted(pairs.items()):
            if mask in failed:
                labels.leave_out(mask, failed[mask])
                continue
            noisy = mask in found.noisy
            name = _without_word(Path(relative.get(image, image.name)), _IMAGE_WORDS)
            split = parts.get(Path(key).name) or split_of(relative.get(image, ""))
            read = _reader(mask, indices, noisy=noisy)
            labels.images.append(ImportedImage(image, name, mask, split, label_map=read))
        if found.noisy:
            labels.notes.append(_noise_note(found))
        return labels

    def _palette(self, source: Source, found: MapColors) -> Palette:
        """The names of all colours.

        Raises:
            DataError: names are missing; the colours are listed in ``source.palette_target``.
        """
        if source.palette is not None:
            if missing := _missing_names(source.palette):
                raise DataError(
                    f"Palette '{source.palette}' has no name for {listed(missing)}; write it in "
                    "the fourth column, or 'ignore' for ignored pixels."
                )
            return read_palette(source.palette)
        colors = sorted(found.pixels)
        if source.classes:
            if len(source.classes) != len(colors):
                raise DataError(
                    f"--classes has {pluralize(len(source.classes), 'name')}, but the label maps "
                    f"have {pluralize(len(colors), 'value')}: {listed(colors[:20])}."
                )
            return dict(zip(colors, source.classes, strict=True))
        for path in files_below(source.folder, *_PALETTES):
            if path.name.lower() in _PALETTES:
                return read_palette(path)
        for path in files_below(source.folder, "class_names.txt"):
            return _indexed_palette(path, colors)
        voc = voc_palette()
        in_voc = any("segmentationclass" in part.lower() for part in _folder_names(source))
        if in_voc and set(colors) <= voc.keys():
            return voc
        if len(colors) == 2 and is_grey(colors) and colors in ([0, 0xFFFFFF], [0, 0x010101]):
            return dict(zip(colors, _TWO_CLASSES, strict=True))
        write_colors(source.palette_target, found)
        shown = listed(colors[:12]) + (", ..." if len(colors) > 12 else "")
        raise DataError(
            f"The label maps have {pluralize(len(colors), 'value')} without names: {shown}.",
            f"Write the name of each into the fourth column of '{source.palette_target}', "
            "or 'ignore' for ignored pixels, with the same name for values of the same class, and "
            f"run again with --palette '{source.palette_target}'.",
        )


def _indexed_palette(path: Path, colors: list[int]) -> Palette:
    """The names of a list in the order of indices, as written by LabelMe's converter to Pascal
    VOC.
    """
    names = [line.strip() for line in load_lines(path) if line.strip()]
    names = [name for name in names if name != "__ignore__"]
    palette = {voc_color(255): "ignore"} | {voc_color(i): name for i, name in enumerate(names)}
    if not set(colors) <= palette.keys():
        palette = {0xFFFFFF: "ignore"} | {i * 0x010101: name for i, name in enumerate(names)}
    return palette


def _noise_note(found: MapColors) -> Note:
    reason = (
        f"{pluralize(len(found.noisy), 'label map')} with compression noise or soft edges: each "
        "pixel got the most similar named colour, at edges that of the nearest pixel inside a class"
    )
    return Note("changed", str(min(found.noisy)), reason)


def _missing_names(path: Path) -> list[int]:
    first = next(iter(load_lines(path)), "")
    return unnamed_colors(path) if first.startswith("red,green,blue,name") else []


def _check_unknown(found: MapColors, palette: Palette, source: Source) -> None:
    """Raise an error for colours without a name."""
    exact = [color for color in found.pixels if color not in palette]
    near = np.array([rgb(color) for color in palette]).reshape(-1, 3)
    unknown = [
        color
        for color in exact
        if not found.noisy or np.abs(near - np.array(rgb(color))).max(axis=1).min() > 40
    ]
    if unknown:
        unknown.sort(key=lambda color: -found.pixels[color])
        counts = Counter({color: found.pixels[color] for color in unknown})
        shown = "; ".join(f"{listed([c])} ({n} pixels)" for c, n in counts.most_common(8))
        write_colors(source.palette_target, found)
        raise DataError(
            f"The label maps have {pluralize(len(unknown), 'colour')} that the palette does not "
            f"name: {shown}.",
            f"All colours are listed in '{source.palette_target}'; add the missing ones to the "
            "palette ('ignore' for ignored pixels), and pass it as --palette.",
        )


def _reader(mask: Path, indices: dict[int, int], *, noisy: bool) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        labels, unknown = to_indices(read_colors(mask), indices, noisy=noisy)
        share = sum(unknown.values()) / labels.size
        if share > 0.01:
            worst = listed([color for color, _ in unknown.most_common(3)])
            raise LabelFileError(
                f"'{mask}': {100 * share:.0f} % of its pixels have colours without a name ({worst})"
            )
        return np.where(labels == 255, IGNORE, labels)

    return read


# ---- pairing of maps and images


def _paired(
    source: Source,
) -> tuple[dict[str, tuple[Path, Path]], dict[str, Path], dict[str, Path]]:
    """Pairs of image and map with matching paths, and unpaired files of both kinds."""
    images: dict[str, Path] = {}
    masks: dict[str, Path] = {}
    files = [
        (Path(relative), path)
        for relative, path in _relative_paths(source)
        if not any(part.lower() in _PASSED_OVER for part in Path(relative).parts)
    ]
    outside = {path for _, path in files if not (source.images and source.images in path.parents)}
    maps = {path for relative, path in files if _has_word(relative, _MASK_WORDS)} & outside
    if source.images and not maps:  # the folder of images is given, and no name indicates a map
        maps = outside
    for relative, path in files:
        if path not in maps:
            _enter(images, _key(relative, _IMAGE_WORDS), path)
        elif path.suffix.lower() != ".npy":  # LabelMe's converter writes them next to PNGs.
            _enter(masks, _key(relative, _MASK_WORDS), path)
    shared = images.keys() & masks.keys()
    if not shared and images and masks:  # folders differ: match by file names
        images, masks = ({Path(key).name: path for key, path in d.items()} for d in (images, masks))
        shared = images.keys() & masks.keys()
    pairs = {key: (images[key], masks[key]) for key in shared}
    alone = [{k: p for k, p in files.items() if k not in shared} for files in (images, masks)]
    return pairs, alone[0], alone[1]


def _relative_paths(source: Source) -> Iterator[tuple[str, Path]]:
    files = ImageFiles(source.images, source.folder)
    yield from ((relative, path) for path, relative in files.paths.items())


def _enter(files: dict[str, Path], key: str, path: Path) -> None:
    if key in files:
        raise DataError(
            f"'{files[key]}' and '{path}' have the same name up to the suffix, which is ambiguous; "
            "rename or remove one."
        )
    files[key] = path


def _words(part: str) -> list[str]:
    return [word for word in re.split(r"[^A-Za-z]+", part) if word]


def _has_word(path: Path, words: tuple[str, ...]) -> bool:
    folders = [part.lower() for part in path.parts[:-1]]
    if any(
        folder in words or any(w.lower() in words for w in _words(folder)) for folder in folders
    ):
        return not any(folder in _IMAGE_WORDS for folder in folders[-1:])
    return bool(_ending(path.stem, words))


def _ending(stem: str, words: tuple[str, ...]) -> str:
    """The suffix of a name that indicates its kind, such as "_mask"."""
    match = re.search(r"[_\-. ]([A-Za-z]+)$", stem)
    return match[0] if match and match[1].lower() in words else ""


def _key(path: Path, words: tuple[str, ...]) -> str:
    parts = [
        part.lower()
        for part in path.parts[:-1]
        if not any(word.lower() in words for word in _words(part))
    ]
    ending = _ending(path.stem, words)
    return composed("/".join([*parts, path.stem.removesuffix(ending) if ending else path.stem]))


def _without_word(path: Path, words: tuple[str, ...]) -> str:
    """The path of an image in the output, without a folder such as "images"."""
    parts = [part for part in path.parts[:-1] if part.lower() not in words]
    return "/".join([*parts, path.name])


def _folder_names(source: Source) -> set[str]:
    return {part for path in some_files(source.folder, ".png", limit=1) for part in path.parts}


def _image_sets(folder: Path) -> dict[str, str]:
    """The split of each stem, from Pascal VOC's ImageSets/Segmentation/train.txt and val.txt."""
    found: dict[str, str] = {}
    by_part: dict[str, list[Path]] = defaultdict(list)
    for path in files_below(folder, "train.txt", "val.txt", "test.txt"):
        if "imagesets" in path.as_posix().lower():
            by_part[path.stem].append(path)
    for part in ("train", "val", "test"):
        for path in by_part[part]:
            found |= {Path(line.strip()).name: part for line in load_lines(path) if line.strip()}
    return found
