"""The layers of the package ("rooms"): each imports only itself and lower ones."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

# From the lowest to the highest. The package's __init__ and __main__ stand above all of them.
ROOMS = (
    *("errors", "compat", "utils", "config", "modeling", "ops", "data", "visualize", "evaluation"),
    *("checkpoint", "solver", "inference", "report", "tasks", "engine", "api", "demo", "cli"),
)
ABOVE = ("", "__main__")
# The same within semask.modeling.
PARTS_OF_MODELING = (
    *("layers", "backbone.contract", "architecture", "backbone", "pixel_decoder"),
    *("mask_decoder", "losses", "heads", "meta_arch", "build"),
)


class Import(NamedTuple):
    """An import of a module of the package, with its location."""

    module: str
    imported: str
    line: int
    inside_function: bool
    has_reason: bool

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.imported}"


@pytest.fixture(scope="module")
def modules(repository: Path) -> dict[str, Path]:
    """The files of the package by the name of their module."""
    root = repository / "projects" / "SeMask"
    names = {}
    for file in sorted((root / "semask").rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return names


@pytest.fixture(scope="module")
def imports(modules: dict[str, Path]) -> list[Import]:
    return [entry for name, file in modules.items() for entry in imports_of(name, file, modules)]


def imports_of(name: str, file: Path, modules: dict[str, Path]) -> Iterator[Import]:
    text = file.read_text(encoding="utf-8")
    lines, tree = text.splitlines(), ast.parse(text)
    nested = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            longer = [f"{node.module}.{alias.name}" for alias in node.names]
            imported = [each if each in modules else node.module for each in longer]
        else:
            continue
        reason = any("#" in line for line in lines[max(0, node.lineno - 2) : node.end_lineno])
        for each in dict.fromkeys(imported):
            if each.split(".")[0] == "semask":
                yield Import(name, each, node.lineno, id(node) in nested, reason)


def room(module: str) -> int:
    """The height of a module's room."""
    name = module.partition(".")[2].partition(".")[0]
    return len(ROOMS) if name in ABOVE else ROOMS.index(name)


def test_every_file_is_in_a_room(modules: dict[str, Path]) -> None:
    rooms = {name.partition(".")[2].partition(".")[0] for name in modules}
    assert rooms <= {*ROOMS, *ABOVE}


def test_no_import_runs_upwards(imports: list[Import]) -> None:
    assert imports
    upwards = [entry for entry in imports if room(entry.imported) > room(entry.module)]
    assert not [str(entry) for entry in upwards]


def part_of_modeling(module: str) -> int:
    """The height of a module within semask.modeling; the package itself stands above all."""
    name = module.removeprefix("semask.modeling").removeprefix(".")
    parts = [part for part in PARTS_OF_MODELING if f"{name}.".startswith(f"{part}.")]
    return PARTS_OF_MODELING.index(max(parts, key=len)) if name else len(PARTS_OF_MODELING)


def test_no_import_runs_upwards_within_modeling(imports: list[Import]) -> None:
    inside = [
        entry
        for entry in imports
        if all(m.startswith("semask.modeling") for m in (entry.module, entry.imported))
    ]
    assert inside
    assert not [
        str(entry)
        for entry in inside
        if part_of_modeling(entry.imported) > part_of_modeling(entry.module)
    ]


# What is about speed or memory. "memory" is also the field's name for what queries attend to.
ABOUT_SPEED = re.compile(
    r"\b(fast(er|est)?|speed\w*|slow\w*|quick\w*|cheap\w*|expensive|out of memory|"
    r"(less|more|much|little|save\w*|peak|gpu) memory)\b",
    re.IGNORECASE,
)
NAMES_OF_MODELS = re.compile("Faster( R-CNN|,)")


def test_modeling_has_no_word_about_speed_or_memory(modules: dict[str, Path]) -> None:
    """The paper, plainly: the faster forms are in ops/. ``activation_checkpoint`` is the exception,
    a promised argument of the backbone.
    """
    files = [file for name, file in modules.items() if name.startswith("semask.modeling.")]
    assert len(files) > 20
    found = [
        f"{file.name}:{number}: {line.strip()}"
        for file in files
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if ABOUT_SPEED.search(NAMES_OF_MODELS.sub("", line))
    ]
    assert not found
    arguments = {
        node.arg
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.arg)
    }
    telling = re.compile("checkpoint|chunk|stripe|cache|fast|fused|sdpa|recompute|lazy|stream")
    assert {name for name in arguments if telling.search(name)} <= {"activation_checkpoint"}


def test_an_import_inside_a_function_has_its_reason_beside_it(imports: list[Import]) -> None:
    hidden = [entry for entry in imports if entry.inside_function and not entry.has_reason]
    assert not [str(entry) for entry in hidden]


# Compiled deformable attention and convolution outside of torchvision.
COMPILED = {
    *("MultiScaleDeformableAttention", "deformable_attention", "mmcv", "mmcv.ops", "detrex"),
    *("dcn_v2", "DCNv2", "detectron2._C", "detectron2.layers.deform_conv"),
}


def test_no_compiled_operator_is_imported(modules: dict[str, Path]) -> None:
    """Not even where it happens to be installed; neither by a statement nor by its name."""
    for name, file in modules.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {alias.name for alias in node.names}
                found = {f"{node.module}", *(f"{node.module}.{each}" for each in names)}
                if node.module == "detectron2.layers":
                    assert not names & {"DeformConv", "ModulatedDeformConv"}, name
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found = {node.value}
            else:
                continue
            if name == "semask.compat":  # which replaces it where it has not been compiled
                found -= {"detectron2._C"}
            assert not found & COMPILED, name


def test_modules_do_not_import_each_other_in_a_circle(imports: list[Import]) -> None:
    graph: dict[str, set[str]] = {}
    for entry in imports:
        if not entry.inside_function:
            graph.setdefault(entry.module, set()).add(entry.imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_imports_name_whole_paths(modules: dict[str, Path]) -> None:
    for name, file in modules.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.level), name


def mapped(text: str) -> Iterator[tuple[int, str]]:
    """Depth and path of each name at the start of a line of a document's map."""
    block = re.search(r"^```\n(configs/ .*?)^```", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    folders: list[str] = []
    for line in block[1].splitlines():
        depth, rest = (len(line) - len(line.lstrip())) // 4, line.strip()
        if depth > 3:  # continues the description of the line above
            continue
        for name in re.split(r"  +", rest):
            if not re.fullmatch(r"[\w/]+(/|\.\w+)", name):
                break
            folders[depth:] = [name]
            yield depth, "".join(folders)


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_maps_of_the_documents_show_what_is_there(repository: Path, document: str) -> None:
    paths = list(mapped((repository / document).read_text()))
    assert len(paths) > 20
    assert [path for _, path in paths if not (repository / path).exists()] == []
    package = "projects/SeMask/semask/"
    rooms = [path for depth, path in paths if depth == 1 and path.startswith(package)]
    names = [path.removeprefix(package).removesuffix(".py").rstrip("/") for path in rooms]
    assert names == list(reversed(ROOMS))


# ---- the tests ----


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def defined_names(tree: ast.AST) -> Iterator[str]:
    """Names of functions, classes, variables and attributes of ``self``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def used_names(tree: ast.AST) -> Iterator[str]:
    """Names that are imported, attributes of other objects than ``self``, and patched names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) != "self":
            yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("setattr"):
            words = (each.value for each in node.args if isinstance(each, ast.Constant))
            yield from (word.rpartition(".")[2] for word in words if isinstance(word, str))


def test_no_test_uses_a_private_name(repository: Path) -> None:
    """Tests use what users use: private names of the package and the benchmarks may change."""

    def trees(*folders: str) -> dict[str, ast.AST]:
        files = [file for folder in folders for file in (repository / folder).rglob("*.py")]
        return {file.name: ast.parse(file.read_text(encoding="utf-8")) for file in files}

    own = trees("projects/SeMask/semask", "benchmarks").values()
    private = {name for tree in own for name in defined_names(tree) if is_private(name)}
    assert len(private) > 100
    found = {
        f"{file}: {name}"
        for file, tree in trees("tests").items()
        for name in used_names(tree)
        if name in private
    }
    # Detectron2's backbones, and so those of users, set these.
    backbones = {"_out_features", "_out_feature_channels", "_out_feature_strides"}
    assert found <= {f"test_detectors.py: {name}" for name in backbones}


def test_errors_are_not_matched_by_sentences(repository: Path) -> None:
    """By type, and by the key, file or number that they name: the wording may get better."""
    four_words = re.compile(r"\b[A-Za-z]+(,? [a-z]+){3}")
    found = [
        f"{file.name}:{keyword.value.lineno}"
        for file in (repository / "tests").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.raises"
        for keyword in node.keywords
        if keyword.arg == "match" and four_words.search(ast.unparse(keyword.value))
    ]
    assert not found
