"""Reads JSON files in COCO's formats and explains mistakes in their structure."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from semask.errors import DataError
from semask.utils.files import read_json
from semask.utils.text import one_line

Content = dict[str, list[dict[str, Any]]]


class AnnotationFileError(DataError):
    """An annotation file with mistakes.

    Attributes:
        messages: all mistakes; the error's own text is the first.
    """

    def __init__(self, messages: Sequence[str]) -> None:
        """
        Args:
            messages: at least one.
        """
        super().__init__(messages[0])
        self.messages = list(messages)


def read_annotation_file(json_file: str, hint: str = "") -> Any:
    """The content of a file.

    Args:
        json_file: the file.
        hint: advice for a missing file.

    Raises:
        DataError: it is missing or cannot be read.
    """
    try:
        return read_json(json_file)
    except FileNotFoundError as error:
        missing = f"There is no annotation file '{json_file}'."
        raise DataError(f"{missing} {hint}" if hint else missing) from error
    except (OSError, ValueError) as error:
        reason = one_line(error)
        raise DataError(f"Annotation file '{json_file}' cannot be read: {reason}.") from error


def wrong_form(
    content: Any,
    required: Mapping[str, Sequence[str]],
    *,
    kind: str,
    may_be_empty: Collection[str] = (),
) -> Iterator[str]:
    """The reasons why a file is not in a format.

    Args:
        content: of the file.
        required: the lists that it must have, and the keys that each of their entries needs.
        kind: the format's name.
        may_be_empty: lists that may be empty.
    """
    for part, keys in required.items():
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            yield (
                f"is not in {kind}: it needs '{part}', a list of entries with {', '.join(keys)}."
            )
            continue
        lacking = [entry for entry in entries if not all(key in entry for key in keys)]
        if lacking:
            absent = ", ".join(key for key in keys if key not in lacking[0])
            yield (
                f"has {len(lacking)} entries of '{part}' that are not complete; the first has no "
                f"{absent}: {str(lacking[0])[:200]}."
            )
        if not entries and part not in may_be_empty:
            yield f"has no {part}."


def refuse(json_file: str, found: Sequence[str]) -> None:
    """Refuse a file if mistakes were found.

    Args:
        json_file: the file.
        found: its mistakes, each as the end of a sentence.

    Raises:
        AnnotationFileError: there is a mistake.
    """
    if found:
        raise AnnotationFileError([f"Annotation file '{json_file}' {words}" for words in found])
