"""Files and machines that are not as on the developer's."""

import builtins
from typing import Any

_open = builtins.open


def open_with_ascii(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
    """``open`` where the locale's encoding is ASCII."""
    if "b" not in mode and len(args) < 2 and options.get("encoding") is None:
        options["encoding"] = "ascii"
    return _open(file, mode, *args, **options)
