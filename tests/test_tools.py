"""The programs as a user starts them: in a process of their own, from any folder."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import TOOLS

PROGRAMS = [TOOLS.parents[2] / "train_net.py", *sorted(TOOLS.glob("*.py"))]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_semask_is_imported_before_detectron2(program: Path) -> None:
    names: list[str] = []
    for node in ast.walk(ast.parse(program.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
    packages = [name.split(".")[0] for name in names]
    assert "semask" in packages
    assert "detectron2" not in packages[: packages.index("semask")]


def test_a_program_starts_by_itself(tmp_path: Path) -> None:
    program = TOOLS / "convert_checkpoint.py"  # it uses Detectron2 directly
    done = subprocess.run(
        [sys.executable, str(program), "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "usage: convert_checkpoint.py" in done.stdout
    assert "Warning" not in done.stderr


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_exit_statuses_are_documented(program: Path) -> None:
    assert "Exit status: 0;" in (ast.get_docstring(ast.parse(program.read_text())) or "")
