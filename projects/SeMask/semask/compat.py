"""Patches that Detectron2 v0.6 needs on current NumPy, Pillow and setuptools, before its import.

Detectron2's tagged release is older than NumPy 1.24 (which dropped ``np.int`` and the like), Pillow
10 (``Image.LINEAR``) and setuptools 82 (``pkg_resources``), and its pure-Python installation has no
compiled ``detectron2._C``. Each step below checks for one of these and does nothing if it exists,
so Detectron2's main branch, built from its repository, is not changed.
"""

import importlib
import importlib.machinery
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

INSTALL_DETECTRON2 = (
    "SeMask needs Detectron2, which is not installed in this Python environment. In a clone of "
    "the project 'make setup' installs everything; otherwise build Detectron2 from its repository "
    "(facebookresearch/detectron2, INSTALL.md), or install its pure-Python form as the project's "
    "README describes."
)

# What Detectron2 v0.6 uses and current packages lack: the file to search, the text to find, and the
# names to add. Searching all of its files would slow down every import.
NUMPY_ALIASES: dict[str, type] = {"bool": bool, "float": float, "int": int, "str": str}
USES_NUMPY_ALIASES = ("structures/masks.py", "np.bool)")
USES_PILLOW_LINEAR = ("data/transforms/transform.py", "Image.LINEAR")
USES_MESHGRID = ("modeling/anchor_generator.py", "torch.meshgrid(shifts_y, shifts_x)")
USES_PKG_RESOURCES = ("model_zoo/model_zoo.py", "import pkg_resources")

ANCHORS_GRID = "detectron2.modeling.anchor_generator._create_grid_offsets"

# What `apply` changed, as dotted names; empty before it, and if nothing was needed.
changes: list[str] = []


def apply() -> None:
    """Make the installed Detectron2 importable; calling it again changes nothing.

    Raises:
        ImportError: Detectron2 is not installed; the message says how to install it.
    """
    spec = importlib.util.find_spec("detectron2")
    if spec is None:
        raise ImportError(INSTALL_DETECTRON2, name="detectron2")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if uses(folders, *USES_NUMPY_ALIASES):
        import numpy

        add_missing(numpy, NUMPY_ALIASES)
    if uses(folders, *USES_PILLOW_LINEAR):
        from PIL import Image

        add_missing(Image, {"LINEAR": Image.Resampling.BILINEAR})

    with warnings.catch_warnings():
        # Detectron2 and fvcore script a few functions when they are imported.
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.script.* is deprecated")
        if importlib.util.find_spec("detectron2._C") is None and not _works_without_extension():
            _stand_in_for_extension()
        importlib.import_module("detectron2.modeling")
        if uses(folders, *USES_MESHGRID) and ANCHORS_GRID not in changes:
            _silence_the_anchors_grid()
        lacks_pkg_resources = importlib.util.find_spec("pkg_resources") is None
        if lacks_pkg_resources and uses(folders, *USES_PKG_RESOURCES):
            _provide_pkg_resources()


def uses(folders: Iterable[Path], file: str, text: str) -> bool:
    """Whether the package in ``folders`` has a file of this name that contains the text."""
    found = (folder / file for folder in folders)
    return any(path.is_file() and text in path.read_text(encoding="utf-8") for path in found)


def add_missing(module: ModuleType, names: Mapping[str, Any]) -> None:
    """Set those of ``names`` that ``module`` does not have."""
    for name, value in names.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy warns when asked for such a name
            exists = hasattr(module, name)
        if not exists:
            setattr(module, name, value)
            changes.append(f"{module.__name__}.{name}")


def _works_without_extension() -> bool:
    """Whether this Detectron2 works without ``detectron2._C``, as the main branch does."""
    try:
        importlib.import_module("detectron2.layers")
    except ImportError as error:
        if "_C" not in str(error):
            raise
        return False
    return True


def missing_op(name: str) -> Callable[..., Any]:
    """A function that raises an error when called: ``name`` needs the compiled Detectron2."""

    def raise_error(*_args: Any, **_kwargs: Any) -> Any:
        raise NotImplementedError(
            f"'{name}' is one of Detectron2's compiled operators, and the installed Detectron2 is "
            "its pure-Python form. Semantic segmentation, and detection, instance and panoptic "
            "segmentation with upright boxes, need none of them; for this one, build Detectron2 "
            "from its repository (facebookresearch/detectron2, INSTALL.md)."
        )

    return raise_error


def _stand_in_for_extension() -> None:
    """Install placeholder modules for ``detectron2._C`` and for what only works with it."""
    import torch
    from pycocotools.cocoeval import COCOeval

    extension = _new_module("detectron2._C")
    # Detectron2's environment report calls these three in every installation.
    extension.get_compiler_version = lambda: "none (pure-Python installation)"  # type: ignore[attr-defined]
    extension.get_cuda_version = lambda: "none (pure-Python installation)"  # type: ignore[attr-defined]
    extension.has_cuda = lambda: False  # type: ignore[attr-defined]

    def __getattr__(name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return missing_op(name)

    extension.__getattr__ = __getattr__  # type: ignore[method-assign]
    importlib.import_module("detectron2")._C = extension  # type: ignore[attr-defined]

    # The one operator that v0.6 accesses in another way.
    add_missing(torch.ops.detectron2, {"nms_rotated": missing_op("nms_rotated")})

    # The fast COCO evaluation is compiled too; pycocotools computes the same more slowly.
    _new_module("detectron2.evaluation.fast_eval_api").COCOeval_opt = COCOeval  # type: ignore[attr-defined]


def _new_module(name: str) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None)
    sys.modules[name] = module
    changes.append(name)
    return module


def _silence_the_anchors_grid() -> None:
    """PyTorch warns of ``torch.meshgrid`` without an order of axes, in every run of a detector."""
    module_name, _, name = ANCHORS_GRID.rpartition(".")
    module = importlib.import_module(module_name)
    create_grid_offsets = getattr(module, name)

    def silenced(*args: Any) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"torch\.meshgrid: in an upcoming release")
            return create_grid_offsets(*args)

    setattr(module, name, silenced)
    changes.append(ANCHORS_GRID)


def _provide_pkg_resources() -> None:
    """Import Detectron2's model zoo with a temporary ``pkg_resources``.

    Other packages test for ``pkg_resources`` by importing it, so it must not stay importable.
    """
    if "detectron2.model_zoo" in sys.modules:
        return

    def resource_filename(package: str, resource: str) -> str:
        return os.path.join(os.path.dirname(sys.modules[package].__file__ or ""), resource)

    stand_in = ModuleType("pkg_resources")
    stand_in.resource_filename = resource_filename  # type: ignore[attr-defined]
    sys.modules["pkg_resources"] = stand_in
    try:
        importlib.import_module("detectron2.model_zoo")
    finally:
        del sys.modules["pkg_resources"]
    changes.append("detectron2.model_zoo.model_zoo.pkg_resources")
