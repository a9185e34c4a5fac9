"""The classes of the output: which names are one class, which mark pixels that do not count."""

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
        colors: (red, green, blue) of each; None = the source has none for it.
        index: index of each name of the source, or ``IGNORE``.
        of_source: the same, in the order of ``Labels.classes``.
        fill: value of pixels that are in no region.
    """

    names: list[str]
    colors: list[tuple[int, int, int] | None]
    index: dict[str, int]
    of_source: list[int]
    fill: int = IGNORE


def spelling(name: str) -> str:
    """What names of one class in different spelling share."""
    return re.sub(r"[\s_\-]+", " ", name).strip().casefold()


def class_table(
    labels: Labels, *, order: Sequence[str] = (), background: bool, unlabelled: str = BACKGROUND
) -> ClassTable:
    """Bring names together that differ in case, spaces, "_" and "-" alone, and number them.

    Classes that are called ignore, void or unlabelled get ``IGNORE``.

    Args:
        labels: the source's; what is brought together is added to its notes.
        order: names of all classes in the order that is wanted; () = the source's.
        background: pixels in no region are a class, or ignored: a label map is written.
        unlabelled: "background" or "ignore".

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
            reason = f"{others} taken for the class '{spellings[0]}', which is spelt alike"
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
                "bring the classes into another order; it cannot leave some out."
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
        raise DataError("The labels have no class: there is nothing to learn.")
    if len(keys) > MAX_CLASSES:
        raise DataError(f"The labels have {len(keys)} classes; there can be {MAX_CLASSES} at most.")
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
