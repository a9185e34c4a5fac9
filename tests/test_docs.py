"""The documents: their links, the tests they name, and the site that is built from them."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    document.relative_to(ROOT).as_posix()
    for pattern in (
        "*.md",
        "docs/*.md",
        "projects/*/*.md",
        "benchmarks/*.md",
        "tests/fixtures/**/*.md",
    )
    for document in ROOT.glob(pattern)
)
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def prose(document: Path) -> str:
    """The text of a document without its blocks of code."""
    return FENCED.sub("", document.read_text())


def anchors(document: Path) -> set[str]:
    """The names that git hosts give to a document's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    texts = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    """From a document to a file, a folder or a heading of this repository."""
    document = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(document))):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (document.parent / file).resolve() if file else document
        assert linked.exists(), target
        assert linked.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(linked), target


def functions_of(file: Path) -> set[str]:
    """The names of the test functions of a file."""
    nodes = ast.walk(ast.parse(file.read_text()))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_tests_that_are_named_exist(name: str) -> None:
    for file, test in re.findall(r"(tests/\w+\.py)(?:::(\w+))?", (ROOT / name).read_text()):
        assert (ROOT / file).is_file(), file
        assert not test or test in functions_of(ROOT / file), f"{file}::{test}"


def test_every_promise_has_a_test() -> None:
    text = (ROOT / "docs/reliability.md").read_text()
    rows = re.findall(r"^\| (?!promise|---)(.+) \| (.+) \|$", text, re.MULTILINE)
    assert len(rows) > 30
    for promise, named in rows:
        assert re.fullmatch(r"`tests/\w+\.py::test_\w+`(, `tests/\w+\.py::test_\w+`)*", named), (
            promise
        )
