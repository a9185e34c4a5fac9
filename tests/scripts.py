"""The programs under projects/SeMask/tools as modules.

Not by ``import tools``: Detectron2's package on the index installs a package of that name.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).parents[1] / "projects" / "SeMask" / "tools"


def load_tool(name: str) -> Any:
    """The module of ``tools/<name>.py``."""
    module_name = f"semask_tools_{name}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, TOOLS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    return sys.modules[module_name]
