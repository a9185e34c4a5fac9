"""Detectron2's main branch, and other projects' keys in the same config."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import HookBase
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor

import tiny
from semask.config import add_semask_config, load_config
from semask.config.loading import MAIN_KEYS
from semask.engine import Trainer
from semask.engine.launch.run_setup import prepare_process
from semask.errors import ConfigError
from semask.modeling.heads.prior import PRIOR_TARGET
from semask.solver import build_lr_scheduler, build_optimizer
from tiny_instances import SMALL_MODEL, flat

# ---- another version ----


def written_by_main(path: Path, **changes: Any) -> str:
    """The config.yaml of a run under Detectron2's main branch."""
    content = yaml.safe_load(Path(tiny.write_config(path)).read_text())
    for key, value in {**MAIN_KEYS, **changes}.items():
        *sections, name = key.split(".")
        section = content
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_a_config_of_main_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    cfg = load_config(written_by_main(tmp_path / "config.yaml"))
    assert cfg.MODEL.SWIN.EMBED_DIM == 8
    if "REPEAT_SQRT" not in cfg.DATALOADER:
        assert "DATALOADER.REPEAT_SQRT" in caplog.text
        assert "Did you mean" not in caplog.text


@pytest.mark.skipif(
    "REPEAT_SQRT" in get_cfg().DATALOADER, reason="this is Detectron2's main branch"
)
def test_a_setting_that_only_main_has_is_refused(tmp_path: Path) -> None:
    path = written_by_main(tmp_path / "config.yaml", **{"DATALOADER.REPEAT_SQRT": False})
    with pytest.raises(ConfigError, match=r"DATALOADER\.REPEAT_SQRT False needs"):
        load_config(path)


@pytest.mark.parametrize("section", ["", "MODEL"])
def test_float32_precision_is_set(monkeypatch: pytest.MonkeyPatch, section: str) -> None:
    seen: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", seen.append)
    cfg = load_config("")
    prepare_process(cfg)
    assert seen == []
    node = cfg.MODEL if section else cfg
    node.FLOAT32_PRECISION = "high"
    prepare_process(cfg)
    assert seen == ["high"]
    node.FLOAT32_PRECISION = "low"
    with pytest.raises(ConfigError, match=r"FLOAT32_PRECISION is 'low'"):
        prepare_process(cfg)


def test_hooks_are_called_after_the_backward_pass(tmp_path: Path) -> None:
    seen: list[bool] = []

    class Hook(HookBase):
        def after_backward(self) -> None:
            trainer = self.trainer
            (first, *_) = [p for p in trainer.model.parameters() if p.requires_grad]
            seen.append(first.grad is not None and not trainer.optimizer.state)

    with tiny.datasets(tmp_path):
        path = tiny.write_config(tmp_path / "config.yaml", SOLVER={"MAX_ITER": 1})
        cfg = load_config(path, ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "out")])
        trainer = Trainer(cfg)
        trainer.register_hooks([Hook()])
        trainer.iter = 0
        with EventStorage():
            trainer.run_step()
    assert seen == [True]


def test_square_images_have_square_targets() -> None:
    """Some backbones of Detectron2's main branch ask for them."""
    cfg = load_config("coco/semask_swin_tiny_mask_rcnn_1x", flat(SMALL_MODEL))
    model = build_model(cfg)
    model.backbone.padding_constraints = {"square_size": 128}
    image = torch.zeros(3, 64, 96)
    target = torch.ones(64, 96, dtype=torch.int64)
    given: list[Tensor] = []
    model.prior_supervision.register_forward_pre_hook(lambda _, inputs: given.append(inputs[1]))
    instances = Instances(
        (64, 96), gt_boxes=Boxes([[4, 4, 40, 40]]), gt_classes=torch.zeros(1, dtype=torch.int64)
    )
    instances.gt_masks = BitMasks(torch.ones(1, 64, 96, dtype=torch.bool))
    sample = {"image": image, PRIOR_TARGET: target, "instances": instances}
    with EventStorage():
        model.train()([sample])
    (targets,) = given
    assert targets.shape == (1, 128, 128)
    assert targets[0, :64, :96].eq(1).all()
    assert targets[0, 64:].eq(255).all()
    assert targets[0, :, 96:].eq(255).all()


# ---- other projects ----


def add_other_swin(cfg: CfgNode) -> None:
    """As another project does: a section of the same name, with keys of its own."""
    cfg.MODEL.SWIN = CfgNode({"EMBED_DIM": 96, "PRETRAIN_IMG_SIZE": 224, "PATCH_SIZE": 4})


def test_a_section_that_another_project_replaces_is_named() -> None:
    cfg = get_cfg()
    add_semask_config(cfg)
    add_other_swin(cfg)
    cfg.MODEL.META_ARCHITECTURE = "SeMaskSegmentor"
    cfg.MODEL.BACKBONE.NAME = "SeMaskSwin"
    with pytest.raises(ConfigError, match=r"MODEL\.SWIN has no DEPTHS.*add_semask_config"):
        build_model(cfg)


def test_keys_of_both_projects_stay() -> None:
    cfg = get_cfg()
    add_other_swin(cfg)
    add_semask_config(cfg)
    assert cfg.MODEL.SWIN.PATCH_SIZE == 4
    assert cfg.MODEL.SWIN.DEPTHS == [2, 2, 6, 2]


def test_deeplabs_schedule_does_not_change_ours(caplog: pytest.LogCaptureFixture) -> None:
    def schedule(cfg: CfgNode) -> float:
        model = torch.nn.Linear(1, 1)
        optimizer = build_optimizer(cfg, model)
        scheduler = build_lr_scheduler(cfg, optimizer)
        optimizer.step()
        for _ in range(cfg.SOLVER.MAX_ITER // 2):
            scheduler.step()
        return optimizer.param_groups[0]["lr"] / cfg.SOLVER.BASE_LR

    short = ["SOLVER.MAX_ITER", "4", "SOLVER.WARMUP_ITERS", "0", "MODEL.DEVICE", "cpu"]
    assert schedule(load_config("ade20k/semask_swin_tiny_fpn", short)) == pytest.approx(0.5)
    assert "POLY_LR_POWER" not in caplog.text
    cfg = get_cfg()
    add_semask_config(cfg)
    cfg.SOLVER.POLY_LR_POWER, cfg.SOLVER.POLY_LR_CONSTANT_ENDING = 0.9, 0.0  # as DeepLab does
    full = load_config("ade20k/semask_swin_tiny_fpn", short)
    full.SOLVER.POLY_LR_CONSTANT_ENDING = 0.0
    cfg.merge_from_other_cfg(full)
    assert schedule(cfg) == pytest.approx(0.5)  # the shipped configs say the power
    assert "SOLVER.POLY_LR_POWER, which is 1.0 here" in caplog.text
