"""Results as a table for the log."""

import math
from collections.abc import Sequence

from tabulate import tabulate

# In a cell whose value is NaN.
NO_VALUE = "-"


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
    table = tabulate(cells, headers, tablefmt="pipe", floatfmt=".2f", missingval=NO_VALUE)
    if not any(is_nan(value) for row in rows for value in row):
        return table
    return f"{table}\n{NO_VALUE}: there is no {absent}"
