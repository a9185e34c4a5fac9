"""The patches of importing semask, and that nothing is patched unless needed."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

from semask import compat


def run_python(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a new process that finds modules in ``path`` first."""
    folders = os.pathsep.join(str(folder) for folder in path)
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": folders},
        capture_output=True,
        text=True,
        check=False,
    )


def output_of(code: str, *path: Path) -> str:
    """What ``code`` prints; it must succeed and be silent otherwise."""
    done = run_python(code, *path)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


@pytest.fixture
def project(repository: Path) -> Path:
    return repository / "projects" / "SeMask"


@pytest.fixture
def apply_alone(project: Path) -> str:
    """Code that applies compat.py without the rest of the package and prints what it changed."""
    return f"""
        import importlib.util
        file = {str(project / "semask" / "compat.py")!r}
        spec = importlib.util.spec_from_file_location("compat", file)
        compat = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(compat)
        compat.apply()
        print(compat.changes)
    """


def write_detectron2(folder: Path, **files: str) -> Path:
    """Write a tiny package ``detectron2`` with these Python files and return ``folder``."""
    for package in ("", "layers", "modeling"):
        (folder / "detectron2" / package).mkdir(parents=True)
        (folder / "detectron2" / package / "__init__.py").touch()
    for name, text in files.items():
        (folder / "detectron2" / f"{name}.py").write_text(text)
    return folder


def test_a_complete_detectron2_is_left_alone(tmp_path: Path, apply_alone: str) -> None:
    users = "from detectron2 import _C\nx = np.float32(1)"
    write_detectron2(tmp_path, _C="", **{"layers/deform_conv": users})
    assert output_of(apply_alone, tmp_path) == "[]"


def test_a_detectron2_that_needs_no_extension_is_left_alone(
    tmp_path: Path, apply_alone: str
) -> None:
    write_detectron2(tmp_path)
    assert output_of(apply_alone, tmp_path) == "[]"


def test_a_broken_extension_is_reported_as_it_is(tmp_path: Path, apply_alone: str) -> None:
    broken = "raise ImportError('undefined symbol: _ZN2at')"
    write_detectron2(tmp_path, _C=broken, **{"modeling/__init__": "from detectron2 import _C"})
    done = run_python(apply_alone, tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("ImportError: undefined symbol: _ZN2at")


def test_without_detectron2_the_error_says_how_to_install_it(project: Path) -> None:
    code = """
        import sys
        sys.modules["detectron2"] = None
        try:
            import semask
        except ImportError as error:
            print(error)
    """
    printed = output_of(code, project)
    assert "Detectron2, which is not installed" in printed
    assert "make setup" in printed


def test_only_missing_names_are_added() -> None:
    module = ModuleType("example")
    vars(module)["int"] = "its own"
    before = list(compat.changes)
    try:
        compat.add_missing(module, {"int": int, "float": float})
        assert compat.changes[len(before) :] == ["example.float"]
        assert vars(module)["int"] == "its own"
        assert vars(module)["float"] is float
        compat.add_missing(module, {"int": int, "float": float})
        assert len(compat.changes) == len(before) + 1
    finally:
        compat.changes[:] = before


def test_a_detectron2_that_uses_aliases_gets_them(tmp_path: Path, apply_alone: str) -> None:
    old = write_detectron2(tmp_path)
    for name, text in (
        ("structures/masks", "x = array.astype(np.bool)"),
        ("data/transforms/transform", "x = Image.LINEAR"),
    ):
        (old / "detectron2" / f"{name}.py").parent.mkdir(parents=True)
        (old / "detectron2" / f"{name}.py").write_text(text)
    added = output_of(apply_alone, old)
    kept = output_of("""
        import numpy, warnings
        from PIL import Image
        warnings.simplefilter("ignore")
        print([f"numpy.{n}" for n in ("bool", "float", "int", "str") if not hasattr(numpy, n)]
              + ["PIL.Image.LINEAR"] * (not hasattr(Image, "LINEAR")))
    """)
    assert added == kept


# What NumPy 1.24 dropped.
BUILTIN = r"\bnp\.(bool|complex|float|int|object|str)\b"


@pytest.mark.skipif("numpy.int" not in compat.changes, reason="nothing was needed here")
def test_every_alias_that_the_installed_detectron2_uses_is_there() -> None:
    import numpy

    spec = importlib.util.find_spec("detectron2")
    assert spec is not None
    for folder in spec.submodule_search_locations or ():
        for file in Path(folder).rglob("*.py"):
            for name in re.findall(BUILTIN, file.read_text(encoding="utf-8")):
                assert hasattr(numpy, name), file


def test_applying_again_changes_nothing() -> None:
    before = list(compat.changes)
    compat.apply()
    assert compat.changes == before


def test_anchors_are_those_of_detectron2_without_a_warning() -> None:
    """Spec: the offset's share of the stride is added; x is the faster axis."""
    anchors = importlib.import_module("detectron2.modeling.anchor_generator")
    generator = anchors.DefaultAnchorGenerator(
        sizes=[[8]], aspect_ratios=[1.0], strides=[4], offset=0.5
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (boxes,) = generator([torch.zeros(1, 1, 2, 3)])
    centres = [(x, y) for y in (2.0, 6.0) for x in (2.0, 6.0, 10.0)]
    assert list(map(tuple, boxes.get_centers().tolist())) == centres


def test_missing_op_names_itself_and_the_way_out() -> None:
    with pytest.raises(NotImplementedError, match=r"'roi_align_rotated_forward'.*build Detectron2"):
        compat.missing_op("roi_align_rotated_forward")(torch.zeros(1), size=3)


@pytest.mark.skipif("detectron2._C" not in compat.changes, reason="Detectron2 is compiled here")
def test_without_the_extension_detectron2_works_but_for_its_ops() -> None:
    from pycocotools.cocoeval import COCOeval

    layers = importlib.import_module("detectron2.layers")
    boxes = torch.tensor([[5.0, 5.0, 4.0, 4.0, 0.0]])
    with pytest.raises(NotImplementedError, match="'nms_rotated'"):
        layers.nms_rotated(boxes, torch.ones(1), 0.5)
    with pytest.raises(NotImplementedError, match="'box_iou_rotated'"):
        importlib.import_module("detectron2.layers.rotated_boxes").pairwise_iou_rotated(
            boxes, boxes
        )
    with pytest.raises(NotImplementedError, match="'roi_align_rotated_forward'"):
        layers.ROIAlignRotated((2, 2), 1.0, 0)(torch.zeros(1, 1, 8, 8), torch.zeros(1, 6))

    evaluation = importlib.import_module("detectron2.evaluation.coco_evaluation")
    assert evaluation.COCOeval_opt is COCOeval
    environment = importlib.import_module("detectron2.utils.collect_env").collect_env_info()
    assert "pure-Python" in environment


def test_model_zoo_works() -> None:
    zoo = importlib.import_module("detectron2.model_zoo")
    assert zoo.get_checkpoint_url("COCO-Detection/retinanet_R_50_FPN_1x.yaml").endswith(".pkl")
    with pytest.raises(RuntimeError, match="not available in Model Zoo"):
        zoo.get_config_file("COCO-Detection/no_such_config.yaml")


# Everything else that the import brings along is there before the first snapshot. (Detectron2's own
# first import sets a variable for OpenCV.)
IMPORT_SEMASK = """
    import os, sys
    import cv2, matplotlib, pycocotools.cocoeval, scipy.optimize
    import torch, torchvision
    import detectron2
    from process_state import snapshot

    def refuse(event, arguments):
        if event in ("socket.connect", "socket.getaddrinfo", "urllib.Request"):
            raise RuntimeError(f"{event} {arguments}")

    folder = os.path.dirname(detectron2.__file__) + os.sep
    opened = []

    def watch(event, arguments):
        if event == "open" and str(arguments[0]).startswith(folder):
            opened.append(str(arguments[0]))

    sys.addaudithook(refuse)
    sys.addaudithook(watch)
    before = snapshot()
    import semask
    after = snapshot()
    # The sources of modules that are imported, but no others: they are not searched.
    imported = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    sources = {path for path in opened if path.endswith(".py")}
    assert opened
    assert not sources - imported, sources - imported
    for name in before:
        if not isinstance(after[name], set):
            assert after[name] == before[name], name
    for name in ("numpy", "PIL.Image"):
        for added in after[name] - before[name]:
            assert f"{name}.{added}" in semask.compat.changes, added
    assert not torch.cuda.is_initialized()
    print("nothing else")
"""


HELPERS = Path(__file__).parent / "helpers"


def test_importing_changes_only_what_it_lists(project: Path) -> None:
    assert output_of(IMPORT_SEMASK, project, HELPERS) == "nothing else"
