"""The classes of the output: names that are merged, and names of ignored pixels."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from semask.data.importers.contract import IGNORE, Labels, Note
from semask.data.reading import MAX_CLASSES
from semask.errors import ConfigError, DataError

BACKGROUND = "background"

_IGNORED = ("ignore", "ignored", "void", "unlabeled", "unlabelled", "don't care", "dontcare")


@dataclass
class ClassTable:
    """The classes of the output.

    Attributes:
        names: of the K classes, in the order of their indices.
        colors: (red, green, blue) of each; None = not in the source.
        index: output index of each source name, or ``IGNORE``.
        of_source: the same, in the order of ``Labels.classes``.
        fill: value of pixels outside all regions.
    """

    names: list[str]
    colors: list[tuple[int, int, int] | None]
    index: dict[str, int]
    of_source: list[int]
    fill: int = IGNORE


def spelling(name: str) -> str:
    """A key that is equal for different spellings of a class name."""
    return re.sub(r"[\s_\-]+", " ", name).strip().casefold()


def class_table(
    labels: Labels, *, order: Sequence[str] = (), background: bool, unlabelled: str = BACKGROUND
) -> ClassTable:
    """Merge names that differ only in case, spaces, "_" and "-", and number them.

    Classes named ignore, void or unlabelled get ``IGNORE``.

    Args:
        labels: of the source; merged names are added to its notes.
        order: names of all classes in the output's order; () = the source's order.
        background: label maps are written, so pixels outside all regions need a value.
        unlabelled: that value, "background" or "ignore".

    Raises:
        ConfigError: ``order`` has other names than the source.
        DataError: there is no class, or there are more than 255.
    """
    groups: dict[str, list[str]] = {}
    for name in labels.classes:
        groups.setdefault(spelling(name), []).append(name)
    for spellings in groups.values():
        if len(spellings) > 1:
            others = " and ".join(f"'{name}'" for name in spellings[1:])
            reason = f"{others} merged into the class '{spellings[0]}', which is spelt alike"
            labels.notes.append(Note("changed", "classes", reason))
    ignored = {key for key in groups if key.replace("_", " ") in _IGNORED}
    for key in ignored:
        reason = f"pixels of '{groups[key][0]}' are ignored ({IGNORE}), as the name says"
        labels.notes.append(Note("changed", "classes", reason))
    keys = [key for key in groups if key not in ignored]
    names = [groups[key][0] for key in keys]
    if order:
        wanted = [spelling(name) for name in order]
        if sorted(wanted) != sorted(keys):
            raise ConfigError(
                f"--classes has {', '.join(order)}, but the labels have {', '.join(names)}. It can "
                "reorder the classes, but not leave some out."
            )
        keys, names = wanted, list(order)
    fill = IGNORE
    if background and labels.background and unlabelled == BACKGROUND:
        if BACKGROUND not in keys:
            keys, names = [BACKGROUND, *keys], [BACKGROUND, *names]
        else:
            names[keys.index(BACKGROUND)] = BACKGROUND
        fill = keys.index(BACKGROUND)
    if not keys or (fill != IGNORE and len(keys) == 1 and not groups):
        raise DataError("The labels have no classes, so there is nothing to train on.")
    if len(keys) > MAX_CLASSES:
        raise DataError(f"The labels have {len(keys)} classes; the maximum is {MAX_CLASSES}.")
    index = {
        name: IGNORE if key in ignored else keys.index(key)
        for key, spellings in groups.items()
        for name in spellings
    }
    colors = [
        next((labels.colors[n] for n in groups.get(key, ()) if n in labels.colors), None)
        for key in keys
    ]
    of_source = [index[name] for name in labels.classes]
    return ClassTable(names, colors, index | {"__ignore__": IGNORE}, of_source, fill)
