"""Texts, sizes and tables in messages and arguments."""

import ast
import math
import re
import unicodedata
from collections.abc import Sequence

from tabulate import tabulate

from semask.errors import ConfigError

# In a cell of `value_table` whose value is NaN.
NO_VALUE = "-"

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def pluralize(number: int, noun: str) -> str:
    """A number of things, such as "1 image" or "2 images".

    Args:
        number: of the things, 0 or more.
        noun: in the singular; its plural must end in "s".
    """
    ending = "es" if noun.endswith(("s", "x", "ch", "sh")) else "s"
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{ending}"


def first_of(items: Sequence[object], shown: int) -> str:
    """The first of some items, and the number of the others, such as "a, b and 3 more".

    Args:
        items: all of them.
        shown: how many are listed.
    """
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return ", ".join(map(str, items[:shown])) + more


def table(rows: Sequence[Sequence[object]], headers: Sequence[str], names: int = 0) -> str:
    """A table in Markdown; its cells are shown as they are.

    Args:
        rows: the cells, one for each header; there may be no row.
        headers: of the columns.
        names: the column that is aligned to the left; the others are numbers.
    """
    # tabulate 0.9 fails where columns of an empty table are aligned.
    columns = range(len(headers)) if rows else ()
    alignment = ["left" if column == names else "right" for column in columns]
    return tabulate(rows, headers, tablefmt="pipe", colalign=alignment, disable_numparse=True)


def value_table(rows: Sequence[Sequence[object]], headers: Sequence[str], absent: str) -> str:
    """A table of names and numbers, in which NaN is "-", with a line that says why.

    Args:
        rows: a name, then numbers.
        headers: of the columns.
        absent: what the ground truth has none of where a number is NaN, such as "instance of this
            size".
    """

    def is_nan(value: object) -> bool:
        return isinstance(value, float) and math.isnan(value)

    cells = [[None if is_nan(value) else value for value in row] for row in rows]
    text = tabulate(cells, headers, tablefmt="pipe", floatfmt=".2f", missingval=NO_VALUE)
    if not any(is_nan(value) for row in rows for value in row):
        return text
    return f"{text}\n{NO_VALUE}: there is no {absent}"


def is_worth_logging(count: int) -> bool:
    """Whether to log the ``count``-th of many similar events, to limit their number in the log."""
    return count <= 3 or count in (10, 100, 1000, 10000)


def as_value(text: str) -> str:
    """A string as the value of a config key on the command line, quoted if it looks like another.

    Args:
        text: such as "2024", which would become a number.
    """
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text
    return repr(text)


def composed(name: str) -> str:
    """A name in Unicode's composed form (NFC); macOS stores names of files decomposed (NFD)."""
    return unicodedata.normalize("NFC", name)


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def parse_size(text: str, option: str) -> int:
    """Parse a size with a unit, such as 24GiB, 24G or 16000M; returns bytes.

    Args:
        text: the size.
        option: the option's name, for the message.

    Raises:
        ConfigError: the text is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f"{option} '{text}' is not a size: use a value such as 24GiB.")
    return int(float(match[1]) * _UNITS[match[2].lower()])
