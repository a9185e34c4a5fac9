"""The built package, and the lock files that `make setup` installs from."""

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

LOCKS = ("requirements.lock", "requirements-detectron2.lock", "requirements-tools.lock")


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built as pip builds it, from a copy: building writes into the folder."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        if (repository / name).is_file():
            shutil.copy(repository / name, source)
    for folder in ("configs", "projects/SeMask/semask"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(repository / folder, source / folder, ignore=ignored)
    code = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(source / done.stdout.splitlines()[-1])


def test_wheel_has_every_module_and_config(repository: Path, wheel: zipfile.ZipFile) -> None:
    package = repository / "projects" / "SeMask" / "semask"
    expected = {
        f"semask/{name}/{file.relative_to(folder).as_posix()}".replace("//", "/")
        for name, folder, pattern in (
            ("", package, "*.py"),
            ("configs", repository / "configs", "*.yaml"),
            ("demo/templates", package / "demo" / "templates", "*"),
            ("report/templates", package / "report" / "templates", "*"),
        )
        for file in folder.rglob(pattern)
    }
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == expected, "setup.cfg lists the packages"


def test_no_text_of_the_package_names_a_file_that_only_the_repository_has(repository: Path) -> None:
    """An installed package has neither docs/ nor train_net.py, and its configs have names."""
    package = repository / "projects" / "SeMask" / "semask"
    named = []
    for file in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
                continue
            # The bare names are compared with a command or removed from a path.
            bare = node.value in ("configs/", "train_net.py")
            if not bare and re.search(r"\bdocs/|\bconfigs/|\btrain_net\.py", node.value):
                named.append(f"{file.relative_to(package)}:{node.lineno}: {node.value}")
    assert not named


def test_wheel_asks_for_no_detectron2(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    metadata = wheel.read(name).decode()
    required = re.findall(r"^Requires-Dist: ([\w.-]+)", metadata, re.MULTILINE)
    assert "torch" in required
    assert not [name for name in required if "detectron2" in name]
    assert "Requires-Python: >=3.10" in metadata


def run_installed(wheel: zipfile.ZipFile, folder: Path, *arguments: str) -> str:
    """What Python prints that finds the package in ``folder / "installed"`` alone."""
    wheel.extractall(folder / "installed")
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder / "installed")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_installed_package_finds_its_configs(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    code = """
import semask
path = semask.config_path("ade20k/semask_swin_tiny_fpn")
print(path, semask.load_config(path).MODEL.SEM_SEG_HEAD.NUM_CLASSES)
"""
    printed = run_installed(wheel, tmp_path, "-c", code)
    path = tmp_path / "installed/semask/configs/ade20k/semask_swin_tiny_fpn.yaml"
    assert printed.split() == [str(path), "150"]


def test_installed_package_runs_its_command(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
    assert "semask = semask.cli.main:main" in wheel.read(name).decode()
    options = ("scenes/semask_scenes", "--size", "64", "64")
    printed = run_installed(wheel, tmp_path, "-m", "semask", "analyze", *options)
    assert "semantic_layers" in printed


def test_git_ignores_no_source(repository: Path) -> None:
    if not (repository / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs git and a checkout made with it")
    command = ["git", "ls-files", "--others", "--ignored", "--exclude-standard"]
    folders = ["configs", "projects", "tests"]
    done = subprocess.run(
        [*command, "--", *folders], cwd=repository, capture_output=True, text=True, check=True
    )
    assert not [name for name in done.stdout.splitlines() if name.endswith((".py", ".yaml"))]


def requirements(text: str) -> list[str]:
    """The entries of a requirements file, each with its continuation lines, without comments."""
    joined = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE))
    return [line for line in joined.splitlines() if line.strip()]


@pytest.mark.parametrize("name", LOCKS)
def test_locks_pin_everything_by_hash_and_name_no_host(repository: Path, name: str) -> None:
    text = (repository / name).read_text()
    entries = requirements(text)
    assert entries
    for entry in entries:
        assert re.match(r"[\w.-]+==[\w.+]+ .*--hash=sha256:[0-9a-f]{64}", entry), entry
    assert not re.search(r"://|--index-url|--find-links|--trusted-host", text)


def test_lock_covers_what_the_package_declares(repository: Path) -> None:
    declared = configparser.ConfigParser()
    declared.read(repository / "setup.cfg")
    lines = declared["options"]["install_requires"] + declared["options.extras_require"]["dev"]
    wanted = {re.split(r"[<>=]", line)[0].lower() for line in lines.split()}
    locked = {entry.split("==")[0] for entry in requirements((repository / LOCKS[0]).read_text())}
    assert wanted <= locked, "run `make lock`"
