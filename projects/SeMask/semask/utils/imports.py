"""Import of user modules that register a task, a decoder, a dataset or the like."""

import importlib
import os
import sys
from collections.abc import Sequence

from semask.errors import ConfigError


def import_modules(names: Sequence[str]) -> None:
    """Import modules by name, also from the current folder; errors inside them are not hidden.

    Args:
        names: as in an import statement, such as "my_project.decoder".

    Raises:
        ConfigError: there is no module of a name.
    """
    if names and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # as for ``python -m``, but after installed packages
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # the module exists, but imports a missing one
            raise ConfigError(
                f"--import {name}: there is no module '{error.name}', neither installed nor in "
                f"'{os.getcwd()}'. Use the name of an import statement, without '.py'."
            ) from error
