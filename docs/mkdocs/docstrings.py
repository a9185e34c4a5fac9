"""An extension of griffe: the roles of docstrings (``:class:`Name```) become links.

A role whose name is no object of the package is a warning, which ends a strict build.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress

from griffe import Alias, Class, Extension, GriffeLoader, Kind, Module, NameResolutionError, Object

KINDS = {
    "attr": Kind.ATTRIBUTE,
    "class": Kind.CLASS,
    "data": Kind.ATTRIBUTE,
    "exc": Kind.CLASS,
    "func": Kind.FUNCTION,
    "meth": Kind.FUNCTION,
    "mod": Kind.MODULE,
}
ROLE = re.compile(rf":({'|'.join(KINDS)}):`~?\.?([\w.]+)`")
_log = logging.getLogger("mkdocs.plugins.docstrings")


class Roles(Extension):
    """Links for roles, where their targets are on a page; the plain name elsewhere."""

    def on_package(self, *, pkg: Module, loader: GriffeLoader, **_: object) -> None:
        """Rewrite the docstrings of a package that has been loaded completely."""
        if pkg.name != "semask":
            return
        objects = {item.path: item for item in _objects(pkg)}
        endings = defaultdict(list)  # of paths: "Task", "base.Task", ...
        for path in objects:
            parts = path.split(".")
            for start in range(len(parts)):
                endings[".".join(parts[start:])].append(path)
        for item in objects.values():
            if item.docstring is None:
                continue
            here = item

            def link(match: re.Match[str], here: Object = here) -> str:
                kind, name = KINDS[match[1]], match[2]
                candidates = _candidates(here, name, objects, endings)
                path = next((path for path in candidates if objects[path].kind is kind), None)
                if path is None:
                    _log.warning("%s: %s is no object of the package", here.path, match[0])
                    return f"`{name}`"
                return f'<autoref optional identifier="{path}"><code>{name}</code></autoref>'

            text = ROLE.sub(link, item.docstring.value)
            item.docstring.value = re.sub(r"::$", ":", text, flags=re.MULTILINE)


def _objects(item: Object) -> Iterator[Object]:
    yield item
    for member in item.members.values():
        if isinstance(member, Object):
            yield from _objects(member)


def _followed(path: str, objects: dict[str, Object]) -> str:
    """A path through names that packages import, such as ``semask.Predictor``, to where it is."""
    item, *parts = path.split(".")
    for part in parts:
        member = objects[item].members.get(part) if item in objects else None
        item = (
            _followed(member.target_path, objects)
            if isinstance(member, Alias)
            else f"{item}.{part}"
        )
    return item


def _candidates(
    here: Object, name: str, objects: dict[str, Object], endings: dict[str, list[str]]
) -> Iterator[str]:
    """What a docstring may mean by a name: in its scope, inherited, or what alone is called so."""
    first, dot, rest = name.partition(".")
    with suppress(NameResolutionError):
        yield from {_followed(here.resolve(first) + dot + rest, objects)} & objects.keys()
    yield from {_followed(name, objects)} & objects.keys()
    within = here if isinstance(here, Class) else here.parent
    if isinstance(within, Class):
        for base in within.bases:
            yield from endings.get(f"{str(base).partition('[')[0]}.{name}", ())
    if len(endings.get(name, ())) == 1:
        yield from endings[name]
