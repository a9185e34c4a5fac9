"""A hook of mkdocs: documents of the whole repository as pages of one site.

Documents outside docs/ become pages where they are (``PAGES``), so that no text stands twice. Their
relative links lead to files of the repository; here each is turned into a link to the page of that
file. A source file or folder that is linked becomes a page that shows it.
"""

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from semask.cli.arguments import COMMANDS
from semask.cli.main import build_parser

ROOT = Path(__file__).parents[2]
DOCS = "docs/"
# Page of the site by document.
PAGES = {
    "README.md": "index.md",
    "projects/SeMask/README.md": "models.md",
    "benchmarks/NOTES.md": "speed_notes.md",
    "CONTRIBUTING.md": "extending.md",
    "CHANGELOG.md": "changelog.md",
}
DOCUMENTS = {page: document for document, page in PAGES.items()}
# Code, which is left alone, or the target of a link.
CODE_OR_LINK = re.compile(r"^```.*?^```|`[^`\n]+`|\]\(([^)\s]+)\)", re.MULTILINE | re.DOTALL)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".md": "markdown"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents outside docs/, and a page for each source that a page links to."""
    for document, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / document).read_text()))
    sources = {target for file in files.documentation_pages() for target in _sources(file)}
    for source in sorted(sources):
        for path in _with_what_is_inside(ROOT / source):
            uri = _page_of(path.relative_to(ROOT).as_posix())
            if files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, content=_source_page(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links to files of the repository into links to pages; fill in the commands."""
    uri = page.file.src_uri
    if uri.startswith("source/"):
        return markdown
    if uri.startswith("python/"):
        page.meta["search"] = {"boost": 0.3}  # behind the pages that explain

    def relinked(match: re.Match[str]) -> str:
        target = _target(uri, match[1])
        if target is None:
            return match[0]
        path, anchor = target
        return f"]({posixpath.relpath(_page_of(path), posixpath.dirname(uri) or '.')}{anchor})"

    markdown = CODE_OR_LINK.sub(relinked, markdown)
    return markdown + _commands() if uri == "commands.md" else markdown


def on_page_content(html: str, **_: object) -> str:
    """Let the names of tests break behind their file."""
    return re.sub(r"<code>(tests/\w+\.py::)(test_)", r"<code>\1<wbr>\2", html)


def _target(uri: str, link: str | None) -> tuple[str, str] | None:
    """The file of the repository that a link of a page leads to, and the anchor; None = no file."""
    if not link or link.startswith("#") or re.match(r"[a-z]+:", link):
        return None
    path, hash_sign, anchor = link.partition("#")
    document = DOCUMENTS.get(uri, DOCS + uri)
    return posixpath.normpath(
        f"{posixpath.dirname(document)}/{path}".lstrip("/")
    ), hash_sign + anchor


def _page_of(path: str) -> str:
    """The name within the site's sources of a file or folder of the repository."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith(DOCS):
        return path.removeprefix(DOCS)
    return f"source/{path}/index.md" if (ROOT / path).is_dir() else f"source/{path}.md"


def _sources(file: File) -> Iterator[str]:
    """The files and folders of the repository that a page links to and that are no pages."""
    for match in CODE_OR_LINK.finditer(file.content_string):
        target = _target(file.src_uri, match[1])
        if target and (ROOT / target[0]).exists() and _page_of(target[0]).startswith("source/"):
            yield target[0]


def _with_what_is_inside(path: Path) -> Iterator[Path]:
    yield path
    if path.is_dir():
        for inside in _inside(path):
            yield from _with_what_is_inside(inside)


def _inside(folder: Path) -> list[Path]:
    """What a folder's page lists: folders first."""
    kept = (path for path in folder.iterdir() if path.is_dir() or path.suffix in LANGUAGES)
    listed = (path for path in kept if path.name[0] not in "_." or path.name == "__init__.py")
    return sorted(listed, key=lambda path: (path.is_file(), path.name))


def _source_page(path: Path) -> str:
    name = path.relative_to(ROOT).as_posix()
    head = f"---\nsearch:\n  exclude: true\nhide:\n  - toc\n---\n# `{path.name}`\n\n`{name}`\n\n"
    if path.is_file():
        language = LANGUAGES.get(path.suffix, "text")
        return f'{head}`````{language} linenums="1"\n{path.read_text(encoding="utf-8")}\n`````\n'
    here = posixpath.dirname(_page_of(name))
    links = (
        (inside.name, posixpath.relpath(_page_of(inside.relative_to(ROOT).as_posix()), here))
        for inside in _inside(path)
    )
    return head + "".join(f"- [`{text}`]({target})\n" for text, target in links)


def _commands() -> str:
    """The help of every sub-command, as it prints it."""
    os.environ["COLUMNS"] = "90"  # argparse's width
    parts = []
    for command in COMMANDS:
        parser = build_parser(command)
        parts.append(f"\n## semask {command}\n\n```text\n{parser.format_help()}```\n")
    return "".join(parts)
