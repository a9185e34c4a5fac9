"""An evaluation report as one page of HTML that needs nothing from outside itself.

The page is well-formed XML too, has no script, and forbids the browser any network access.
"""

from collections.abc import Iterable, Sequence
from html import escape

import numpy as np

from semask.report.pictures import Picture
from semask.report.style import STYLE


def page(title: str, parts: Iterable[str]) -> str:
    """The whole page.

    Args:
        title: in the browser's title bar.
        parts: HTML of what is on it.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\"/>\n"
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def header(
    kind: str,
    title: str,
    facts: Sequence[tuple[str, str]],
    tiles: Sequence[tuple[str, str, str]],
) -> str:
    """The head of the page.

    Args:
        kind: of the report.
        title: its headline.
        facts: short names and values.
        tiles: name, value in percent, and a note of the most important results.
    """
    listed = "".join(
        f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in facts
    )
    shown = "".join(
        f'<div class="tile"><div class="name">{name}</div>'
        f'<div class="value">{value}<small> %</small></div>'
        f'<div class="note">{note}</div></div>'
        for name, value, note in tiles
    )
    return (
        f"<header>\n<p>{escape(kind)}</p>\n<h1>{escape(title)}</h1>\n"
        f'<dl class="facts">{listed}</dl>\n</header>\n<div class="tiles">{shown}</div>'
    )


def section(title: str, note: str, content: str) -> str:
    """A part of the page with a headline and a note (text) above its content (HTML)."""
    return f'<section>\n<h2>{title}</h2>\n<p class="note">{escape(note)}</p>\n{content}\n</section>'


def figures(pictures: Iterable[Picture], ratio: str, kind: str) -> str:
    """Pictures beside each other.

    Args:
        pictures: in their order.
        ratio: "width / height" that all are shown in.
        kind: class of the style sheet, "pictures" or "priors".
    """
    shown = "".join(
        f"<figure><figcaption>{escape(picture.title)}</figcaption>"
        f'<img class="{"map" if picture.is_map else "photo"}" style="aspect-ratio:{ratio}" '
        f'src="{picture.uri}" alt="{escape(picture.alt)}"/></figure>'
        for picture in pictures
    )
    return f'<div class="{kind}">{shown}</div>'


def in_percent(value: float) -> str:
    """42.124 as "42.12"; an en dash where there is nothing to say."""
    return "–" if np.isnan(value) else f"{value:.2f}"
