"""Images and label maps in two folders, paired by name."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from semask.data.image_files import JPEG_LABELS, is_jpeg
from semask.errors import DataError
from semask.utils.files import files_below
from semask.utils.text import composed, first_of

LABEL_MAPS = "label maps"
_ALONE = " Images alone can be segmented with `semask predict`."


class PairingError(DataError):
    """Images or label maps without a counterpart.

    Attributes:
        records: dicts of the complete pairs.
        images: the images without a label map.
        labels: the label maps without an image.
    """

    def __init__(
        self,
        message: str,
        records: Sequence[dict[str, Any]] = (),
        images: Sequence[str] = (),
        labels: Sequence[str] = (),
    ) -> None:
        """
        Args:
            message: names the problem and the remedy.
            records, images, labels: the attributes of these names.
        """
        super().__init__(message)
        self.records = list(records)
        self.images = list(images)
        self.labels = list(labels)


def load_sem_seg_pairs(
    image_root: str,
    label_root: str,
    image_suffix: str | Sequence[str] = ".jpg",
    label_suffix: str | Sequence[str] = ".png",
    *,
    label_map: str | None = None,
    hint: str = "",
) -> list[dict[str, Any]]:
    """Find the images of a dataset and their label maps, without opening them.

    An image and a label map are a pair if their paths below the two folders are equal up to the
    suffix, as in ``train/a.jpg`` and ``train/a.png``, or ``x_leftImg8bit.png`` and
    ``x_labelIds.png``. Folders are searched with their subfolders; files with another suffix,
    hidden files and hidden folders are ignored. Composed and decomposed letters are equal.

    Args:
        image_root: folder of the images.
        label_root: folder of the label maps.
        image_suffix: ending of the images' names, or several endings; case is ignored.
        label_suffix: the same of the label maps.
        label_map: name of a registered table from raw label values to training ids, if needed.
        hint: for messages, says where the files should be.

    Returns:
        Dicts with "file_name", "sem_seg_file_name", and "label_map" if given, sorted by name.

    Raises:
        DataError: a folder is missing or has no such files, or two files have the same name up to
            the suffix.
        PairingError: an image or label map has no counterpart.
    """
    images = find_files(image_root, image_suffix, "images", hint)
    labels = find_files(label_root, label_suffix, LABEL_MAPS, hint)
    return pair_files(images, labels, image_root, label_root, label_map=label_map, hint=hint)


def pair_files(
    images: Mapping[str, str],
    labels: Mapping[str, str],
    image_root: str,
    label_root: str,
    *,
    label_map: str | None = None,
    hint: str = "",
) -> list[dict[str, Any]]:
    """Dataset dicts of the images and label maps with the same key.

    Args:
        images: paths of the images, by the key that a pair shares.
        labels: paths of the label maps.
        image_root, label_root: the folders, for the message.
        label_map, hint: see ``load_sem_seg_pairs``.

    Returns:
        As ``load_sem_seg_pairs``.

    Raises:
        PairingError: an image or label map has no counterpart.
    """
    extra = {} if label_map is None else {"label_map": label_map}
    records: list[dict[str, Any]] = [
        {"file_name": images[key], "sem_seg_file_name": labels[key], **extra}
        for key in sorted(images.keys() & labels.keys())
    ]
    no_label = sorted(images.keys() - labels.keys())
    no_image = sorted(labels.keys() - images.keys())
    alone = []
    if no_label:
        alone.append(f"{_some(no_label)} in '{image_root}' without a label map")
    if no_image:
        alone.append(f"{_some(no_image)} in '{label_root}' without an image")
    if alone:
        raise PairingError(
            f"Images and label maps do not pair up: {'; '.join(alone)}. Add what is missing or "
            "remove what is unpaired." + _appended(hint),
            records,
            [images[key] for key in no_label],
            [labels[key] for key in no_image],
        )
    return records


def find_files(
    root: str,
    suffix: str | Sequence[str],
    what: str,
    hint: str = "",
    *,
    first_suffix_wins: bool = False,
) -> dict[str, str]:
    """The files below a folder whose names end in ``suffix``, of those that ``files_below`` lists.

    Args:
        root: the folder.
        suffix: one ending or several; case is ignored.
        what: a noun for these files, for messages, in the plural.
        hint: for messages, says where the files should be.
        first_suffix_wins: of files that are equal up to the suffix, take the one whose suffix
            comes first; otherwise they are an error.

    Returns:
        Paths of the files, by their path below ``root`` without the suffix, in composed Unicode
        (NFC).

    Raises:
        DataError: the folder is missing or has no such files, or there are two where one is
            expected; or a subfolder cannot be read.
    """
    suffixes = (suffix,) if isinstance(suffix, str) else tuple(suffix)
    if not os.path.isdir(root):
        alone = _ALONE if what == LABEL_MAPS else ""
        raise DataError(f"There is no folder '{root}' for the {what}.{alone}" + _appended(hint))
    found: dict[str, tuple[int, str]] = {}
    others: Counter[str] = Counter()
    for file in files_below(root):
        low = file.name.lower()
        rank = next((i for i, s in enumerate(suffixes) if low.endswith(s.lower())), None)
        if rank is None:
            others[file.suffix.lower() or file.name] += 1
            continue
        path = str(file)
        key = composed(file.relative_to(root).as_posix()[: -len(suffixes[rank])])
        other = found.get(key)
        array = other is not None and ".npy" in (suffixes[rank], suffixes[other[0]])
        wins = (first_suffix_wins or array) and other is not None and other[0] != rank
        if other is not None and not wins:
            first, second = sorted((other[1], path))
            raise DataError(
                f"'{first}' and '{second}' have the same name up to the suffix, so that "
                "pairs are ambiguous; remove or rename one."
            )
        found[key] = min((rank, path), other or (rank, path))
    if not found:
        raise DataError(
            f"The folder '{root}' has no {what} (*{' or *'.join(suffixes)})."
            + _appended(_instead(others, what) + hint)
        )
    return {key: path for key, (_, path) in found.items()}


def _instead(others: Counter[str], what: str) -> str:
    """A sentence about the files that the folder has instead."""
    if not others:
        return "It has no files. "
    listed = ", ".join(f"{number} {suffix}" for suffix, number in others.most_common(5))
    lossy = what == LABEL_MAPS and any(is_jpeg(suffix) for suffix in others)
    return f"It has {listed}. " + (f"{JPEG_LABELS} " if lossy else "")


def _some(names: Sequence[str], shown: int = 5) -> str:
    return f"{len(names)} ({first_of(names, shown)})"


def _appended(hint: str) -> str:
    return f" {hint}" if hint else ""
