"""How config files are read and refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN

from semask.config import config_path
from semask.config.loading import KEYS_VERSION, load_config
from semask.errors import ConfigError


def write(folder: Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be a mapping of keys to values; it holds nothing"),
        ("- a\n- b\n", "it holds list"),
        ("just words\n", "it holds str"),
        ("MODEL:\n", "sets 'MODEL' to None, but it is a section"),
        ("SOLVER: [1, 2]\n", "sets 'SOLVER' to .*, but it is a section"),
        ("MODEL: [\n", "is not valid YAML"),
        ("_BASE_: config.yaml\n", "is its own _BASE_"),
        ("MODEL: " + "[" * 100_000, "is nested too deeply"),
        ("_BASE_: missing.yaml\n", "missing.yaml"),
        (
            "MODEL:\n  SEMSAK:\n    DROPOUT: 0.1\n",
            r"no key 'MODEL\.SEMSAK'\. Did you mean 'MODEL\.SEMASK'",
        ),
        ("SOLVER:\n  BASE_LRR: 0.1\n", "Did you mean 'SOLVER.BASE_LR'"),
        ("SOLVER:\n  MAX_ITER: many\n", "SOLVER.MAX_ITER|MAX_ITER"),
        ("VERSION: !!python/object/apply:os.getcwd []\n", "would run code when loaded"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_its_reason(
    tmp_path: Path, text: str, message: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(path)
    assert path in str(error.value)


def test_a_tag_that_runs_code_does_not_run(tmp_path: Path) -> None:
    made = tmp_path / "made"
    path = write(tmp_path, f"OUTPUT_DIR: !!python/object/apply:pathlib.Path.touch ['{made}']\n")
    with pytest.raises(ConfigError, match="would run code"):
        load_config(path)
    assert not made.exists()


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'nowhere\.yaml'"):
        load_config("nowhere.yaml")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["SOLVER.BASE_LR"], "pairs KEY VALUE"),
        (["SOLVER.BASE_LRR", "1"], "BASE_LR"),
        (["SOLVER.MAX_ITER", "many"], "MAX_ITER"),
    ],
)
def test_overrides_that_cannot_be_used_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("", overrides)


def test_a_number_is_text_where_the_key_is_text() -> None:
    cfg = load_config("", ["OUTPUT_DIR=2024", "MODEL.WEIGHTS", "1e5", "SOLVER.BASE_LR=0.5"])
    assert (cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS, cfg.SOLVER.BASE_LR) == ("2024", "1e5", 0.5)


def test_bases_are_merged_in_order(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("SEED: 1\nOUTPUT_DIR: a\n")
    (tmp_path / "b.yaml").write_text("SEED: 2\n")
    cfg = load_config(write(tmp_path, "_BASE_: [a.yaml, b.yaml]\nSOLVER:\n  MAX_ITER: 7\n"))
    assert (cfg.SEED, cfg.OUTPUT_DIR, cfg.SOLVER.MAX_ITER) == (2, "a", 7)


# ---- other versions ----


def config_with(tmp_path: Path, **keys: Any) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(keys))
    return str(path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"SEMASK_VERSION": KEYS_VERSION + 1, "NEW": 1}, "newer release of this project"),
        ({"VERSION": 3, "NEW": 1}, r"newer release of Detectron2 \(VERSION 3, here 2\)"),
    ],
)
def test_config_of_a_newer_version(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(config_with(tmp_path, **keys))
    assert "config.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("mapper", "architecture", "task"),
    [
        ("sem_seg", "SeMaskSegmentor", "semantic"),
        ("instances", "SeMaskGeneralizedRCNN", "instance"),
        ("instances", "SeMaskPanopticFPN", "panoptic"),
        ("instances", "PanopticFPN", "panoptic"),
        ("instances", "OwnPanopticRCNN", "instance"),
    ],
)
def test_the_older_key_of_the_task_is_taken_over(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    mapper: str,
    architecture: str,
    task: str,
) -> None:
    monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, "OwnPanopticRCNN", GeneralizedRCNN)
    older = {"INPUT": {"MAPPER": mapper, "FORMAT": "RGB"}, "SEMASK_VERSION": 1}
    path = config_with(tmp_path, MODEL={"META_ARCHITECTURE": architecture}, **older)
    cfg = load_config(path)
    assert (task, "RGB") == (cfg.TASK, cfg.INPUT.FORMAT)
    assert cfg.SEMASK_VERSION == KEYS_VERSION
    lines = [record for record in caplog.records if "INPUT.MAPPER" in record.getMessage()]
    assert len(lines) == 1
    assert f"TASK '{task}'" in lines[0].getMessage()
    if mapper == "instances":
        model = {"META_ARCHITECTURE": architecture}
        path = config_with(tmp_path, MODEL=model, TASK="panoptic", **older)
        assert load_config(path).TASK == "panoptic"


@pytest.mark.parametrize(
    "unused", ["MODEL.SEM_SEG_HEAD.PRIOR_LOSS_WEIGHT=0.0", "MODEL.SEMASK.NUM_BLOCKS=[0,0,0,0]"]
)
def test_the_number_of_prior_classes_counts_where_priors_are_supervised(unused: str) -> None:
    overrides = ["MODEL.SEM_SEG_HEAD.NUM_CLASSES=5", "MODEL.SEMASK.NUM_CLASSES=4"]
    load_config("ade20k/semask_swin_tiny_fpn", [*overrides, unused])
    with pytest.raises(ConfigError, match="NUM_CLASSES is 4"):
        load_config("ade20k/semask_swin_tiny_fpn", overrides)


def test_an_older_file_below_a_new_one_keeps_the_new_ones_task(tmp_path: Path) -> None:
    base = config_path("coco/semask_swin_tiny_panoptic_fpn_1x")
    assert load_config(config_with(tmp_path, _BASE_=base)).TASK == "panoptic"
    older = config_with(tmp_path, _BASE_=base, INPUT={"MAPPER": "instances"})
    assert load_config(older).TASK == "panoptic"
    assert load_config(config_with(tmp_path, INPUT={"FORMAT": "BGR"})).TASK == "semantic"


def test_the_older_key_of_the_task_is_refused_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"INPUT\.MAPPER is now TASK"):
        load_config(overrides=["INPUT.MAPPER", "instances"])
    with pytest.raises(ConfigError, match=r"INPUT\.MAPPER is 'boxes'"):
        load_config(config_with(tmp_path, INPUT={"MAPPER": "boxes"}))


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(ConfigError, match=r"TASK is 'depth'.*--import"):
        load_config(overrides=["TASK", "depth"])


def test_config_of_an_older_detectron2(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = load_config(config_with(tmp_path, VERSION=1, SOLVER={"BASE_LR": 0.5}))
    assert (old.VERSION, old.SOLVER.BASE_LR) == (2, 0.5)
