"""The documents: their links, the tests they name, and the site that is built from them."""

import ast
import configparser
import importlib.util
import os
import re
import subprocess
import sys
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
    """Links from a document to a file, a folder or a heading of this repository exist."""
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


def test_every_extra_is_explained() -> None:
    declared = configparser.ConfigParser()
    declared.read(ROOT / "setup.cfg")
    table = re.findall(r"^\| `(\w+)` \| .+ \|$", (ROOT / "docs/first_hour.md").read_text(), re.M)
    assert sorted(table) == sorted(declared["options.extras_require"])


@pytest.mark.slow
def test_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """Strictly: links, anchors, and the names in docstrings, which have to be objects."""
    for package in ("material", "mkdocstrings"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package} (pip install '.[docs]')")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    pages = {page.relative_to(tmp_path).as_posix() for page in tmp_path.rglob("*.html")}
    for document in DOCUMENTS:
        if document.startswith("docs/"):
            assert document.removeprefix("docs/").replace(".md", ".html") in pages
    # A docstring's link to a class, and its parameters.
    modeling = (tmp_path / "python/modeling.html").read_text()
    assert 'id="semask.modeling.SemanticLayer"' in modeling
    assert 'href="#semask.modeling.SemanticLayer"' in modeling
    # No page asks another host for anything.
    loaded = r"<(script|img|iframe)[^>]* src=\W?https?:|<link [^>]*rel=\W?stylesheet[^>]*https?:"
    for page in tmp_path.rglob("*.html"):
        assert not re.search(loaded, page.read_text()), page
