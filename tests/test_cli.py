"""The ``semask`` command as a user starts it: in a separate process, from any folder."""

import ast
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from scripts import ROOT, TOOLS
from semask.cli import main
from semask.cli.arguments import COMMANDS
from semask.cli.main import build_parser, parse
from semask.config import config_names, load_config, split_overrides
from semask.errors import ConfigError

OLD_SCRIPTS = {
    "analyze_model": "analyze",
    "check_dataset": "check",
    "convert_checkpoint": "convert",
    "export_model": "export",
    "plot_training": "plot",
    "predict": "predict",
}


def start(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run Python in ``folder``."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT / "projects" / "SeMask")},
        capture_output=True,
        text=True,
        check=False,
    )


# ---- help


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_does_not_wait_for_pytorch(tmp_path: Path, command: str) -> None:
    done = start(tmp_path, "-X", "importtime", "-m", "semask", *command.split(), "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: semask {command or 'COMMAND'}")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "semask.cli.arguments" in imported
    assert not imported & {"torch", "numpy", "detectron2", "matplotlib"}


@pytest.mark.parametrize("script", [ROOT / "train_net.py", TOOLS / "predict.py"])
def test_help_of_a_script_does_not_wait_for_pytorch(tmp_path: Path, script: Path) -> None:
    done = start(tmp_path, "-X", "importtime", str(script), "--help")
    assert done.returncode == 0, done.stderr
    assert not any(line.endswith(" torch") for line in done.stderr.splitlines())
    # Another program of that name, which may need all that is registered.
    (tmp_path / "train_net.py").write_text("import semask, sys; print('torch' in sys.modules)")
    if script.name == "train_net.py":
        assert start(tmp_path, "train_net.py").stdout == "True\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_exit_statuses_are_documented(command: str) -> None:
    description = build_parser(command).description or ""
    assert "Exit status: 0;" in " ".join(description.split())


def test_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"  {command} " in printed for command in COMMANDS)


@pytest.mark.parametrize("argv", [[], ["trian"], ["plot"], ["predict", "a.jpg"]])
def test_arguments_that_cannot_be_used(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main.main(argv)
    assert stop.value.code == 2


# ---- what the documents promise


def documented_commands() -> list[str]:
    """The lines of the documents and of the configs' head comments that call the command."""
    documents = (ROOT / "README.md", ROOT / "projects/SeMask/README.md", *ROOT.glob("docs/*.md"))
    texts = [document.read_text() for document in documents]
    for config in (ROOT / "configs").rglob("*.yaml"):
        head = config.read_text().partition("_BASE_")[0]
        texts.append("\n".join(line.removeprefix("#").strip() for line in head.splitlines()))
    lines = [line for text in texts for line in text.replace("\\\n", " ").splitlines()]
    calls = [re.match(r"(?:torchrun .* -m )?(semask [a-z]+ .*)", line) for line in lines]
    return list(dict.fromkeys(call[1] for call in calls if call))


def test_documented_commands_are_understood() -> None:
    commands = documented_commands()
    assert len(commands) > 80
    for line in commands:
        command, *arguments = shlex.split(line.replace("CONFIG", "name"), comments=True)[1:]
        args = parse(command, [argument for argument in arguments if argument != "..."])
        config = getattr(args, "config", None)
        if config and "/" in config and not config.startswith(("output/", "$")):
            assert config in config_names(), line
        if command in ("train", "evaluate"):
            split_overrides([text for text in args.opts if text != "${KEYS[@]}"])


# ---- the same program under its other names


@pytest.mark.parametrize("script", sorted(TOOLS.glob("*.py")), ids=lambda path: path.name)
def test_earlier_script_calls_its_command(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: semask {OLD_SCRIPTS[script.stem]}")


@pytest.mark.slow
def test_earlier_script_starts_by_itself(tmp_path: Path) -> None:
    done = start(tmp_path, str(TOOLS / "convert_checkpoint.py"), "--help")
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr


def test_every_earlier_script_is_there() -> None:
    assert {script.stem for script in TOOLS.glob("*.py")} == set(OLD_SCRIPTS)


def test_train_net_documents_its_exit_statuses() -> None:
    text = (ROOT / "train_net.py").read_text()
    assert "Exit status: 0;" in (ast.get_docstring(ast.parse(text)) or "")


@pytest.mark.slow
def test_command_loads_the_package_after_its_arguments(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text("no measurement\n{}\n")
    done = start(tmp_path, "-m", "semask", "plot", "metrics.json")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("MetricsError: ")
    done = start(tmp_path, "-m", "semask", "analyze", "ade20k/semask_swin_tiny_fpn", "--depth=1")
    assert done.returncode == 0, done.stderr
    assert "sem_seg_head" in done.stdout


# ---- configs and overrides


def test_train_takes_the_config_in_front_or_as_an_option() -> None:
    keys = ["SEED", "1", "OUTPUT_DIR=out"]
    for argv in (["name", *keys], ["--config-file", "name", *keys], ["--config", "name", *keys]):
        args = parse("train", [*argv, "--resume"])
        assert (args.config, args.opts, args.resume) == ("name", keys, True)
    assert parse("train", keys).config is None
    assert not parse("train", ["name"]).eval_only
    assert parse("evaluate", ["name"]).eval_only


def test_negative_values_are_no_options() -> None:
    args = parse("train", ["name", "SOLVER.BASE_LR", "-1e-4", "SEED", "-1", "--num-gpus", "-2"])
    assert split_overrides(args.opts) == ["SOLVER.BASE_LR", "-1e-4", "SEED", "-1"]
    assert args.num_gpus == -2


@pytest.mark.parametrize(
    "overrides",
    [
        ["SEED", "3", "OUTPUT_DIR", "a=b"],
        ["SEED=3", "OUTPUT_DIR=a=b"],
        ["SEED", "3", "OUTPUT_DIR=a=b"],
        ["SEED=3", "OUTPUT_DIR", "a=b"],
    ],
)
def test_two_ways_to_override(overrides: list[str]) -> None:
    cfg = load_config("scenes/semask_scenes", overrides)
    assert (cfg.SEED, cfg.OUTPUT_DIR) == (3, "a=b")


def test_value_that_looks_like_an_override() -> None:
    assert split_overrides(["OUTPUT_DIR", "SEED=3"]) == ["OUTPUT_DIR", "SEED=3"]
    with pytest.raises(ConfigError, match="SEED"):
        split_overrides(["OUTPUT_DIR=a", "SEED"])


def test_evaluate_is_an_evaluation_with_the_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.write_config(tmp_path / "config.yaml")
    arguments = [config, "--weights", "nowhere.pth", f"OUTPUT_DIR={tmp_path / 'out'}"]
    with tiny.datasets(tmp_path), tiny.own_loggers():
        assert main.main(["evaluate", *arguments, "MODEL.DEVICE=cpu"]) == 2
    assert "nowhere.pth" in capsys.readouterr().err
