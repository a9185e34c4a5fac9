"""SeMask: semantically masked transformers for semantic segmentation (arXiv 2112.12782)."""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"


def _is_command() -> bool:
    """Whether this process is the ``semask`` command, and not one of its child processes.

    This includes the scripts of this repository, but not other programs of the same name.

    The command parses its arguments before it loads PyTorch; any other program imports the whole
    package at once, so that Detectron2 knows the registered classes.
    """
    if sys.argv[:1] == ["-m"]:  # while the package of `python -m semask` is imported
        return ("-m", "semask") in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
    if not sys.argv[:1] or sys.argv[0] not in sys.orig_argv:
        return False
    script, project = Path(sys.argv[0]), Path(__file__).resolve().parents[1]
    scripts = (project.parents[1] / "train_net.py", *(project / "tools").glob("*.py"))
    return script.stem == "semask" or script.resolve() in scripts


if TYPE_CHECKING or not _is_command():
    from semask.api import *  # noqa: F403  (semask/api.py is the list of the public names)
else:

    def __getattr__(name: str) -> Any:
        if name.startswith("__"):  # Python itself asks for such names
            raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
        return getattr(importlib.import_module("semask.api"), name)
