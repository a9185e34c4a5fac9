"""Docstrings name every argument: of constructors, and of functions whose docstring has any."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SECTION = re.compile(r"^(?:Args|Attributes):\n((?:[ ]{4}.*\n|\n)*)", re.MULTILINE)
ENTRY = re.compile(r"^[ ]{4}([\w*]+(?:, [\w*]+)*):", re.MULTILINE)
REFERENCE = re.compile(r":class:`~?([\w.]+)`")


@pytest.fixture(scope="module")
def trees(repository: Path) -> dict[str, ast.Module]:
    """The modules of the package by file."""
    package = repository / "projects" / "SeMask" / "semask"
    return {
        file.relative_to(package).as_posix(): ast.parse(file.read_text(encoding="utf-8"))
        for file in sorted(package.rglob("*.py"))
    }


def arguments(function: ast.FunctionDef) -> list[str]:
    """Names of the arguments, without ``self``, ``*args``, ``**kwargs`` and private ones."""
    given = function.args
    names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls") and not name.startswith("_")]


def explained(docstring: str | None) -> set[str]:
    """The names in the sections Args and Attributes of a docstring."""
    sections = SECTION.findall(f"{docstring or ''}\n")
    entries = (entry for section in sections for entry in ENTRY.findall(section))
    return {name.strip("*") for entry in entries for name in entry.split(", ")}


def constructor(node: ast.ClassDef) -> ast.FunctionDef | None:
    functions = (item for item in node.body if isinstance(item, ast.FunctionDef))
    return next((item for item in functions if item.name == "__init__"), None)


def constructor_arguments(node: ast.ClassDef) -> list[str]:
    """Of the class's own ``__init__``, or the fields of a dataclass or named tuple."""
    init = constructor(node)
    if init is not None:
        return arguments(init)
    kinds = [ast.unparse(each) for each in (*node.decorator_list, *node.bases)]
    if not any("dataclass" in kind or kind == "NamedTuple" for kind in kinds):
        return []
    fields = [item.target for item in node.body if isinstance(item, ast.AnnAssign)]
    names = [field.id for field in fields if isinstance(field, ast.Name)]
    return [name for name in names if not name.startswith("_")]


def docstrings(node: ast.ClassDef) -> Iterator[str]:
    """Those of the class and of its constructor."""
    for each in (node, constructor(node)):
        yield (ast.get_docstring(each) or "") if each is not None else ""


def test_every_argument_of_a_public_constructor_is_explained(trees: dict[str, ast.Module]) -> None:
    """In the docstring of the class, of its constructor, or of a class that they refer to."""
    classes = [
        (file, node)
        for file, tree in trees.items()
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    known: dict[str, set[str]] = {}
    for _, node in classes:
        for text in docstrings(node):
            known.setdefault(node.name, set()).update(explained(text))
    missing = []
    for file, node in classes:
        names = set(known[node.name])
        for text in docstrings(node):
            for reference in REFERENCE.findall(text):
                names |= known.get(reference.rpartition(".")[2], set())
        missing += [
            f"{file}:{node.lineno} {node.name}: {name}"
            for name in constructor_arguments(node)
            if name not in names
        ]
    assert len(classes) > 200
    assert not missing, "\n".join(missing)


def test_a_section_of_arguments_is_complete(trees: dict[str, ast.Module]) -> None:
    functions = [
        (file, node)
        for file, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name != "__init__"
    ]
    checked, missing = 0, []
    for file, node in functions:
        text = ast.get_docstring(node) or ""
        if not re.search(r"^Args:$", text, re.MULTILINE):
            continue
        checked += 1
        names = explained(text)
        missing += [
            f"{file}:{node.lineno} {node.name}: {name}"
            for name in arguments(node)
            if name not in names
        ]
    assert checked > 300
    assert not missing, "\n".join(missing)
