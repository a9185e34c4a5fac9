"""``TEST.AMP``: evaluation and prediction in mixed precision, as a choice."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode

import tiny
import tiny_masks
from semask import Predictor
from semask.config.loading import load_config
from semask.engine import Trainer
from semask.errors import ConfigError
from semask.utils.precision import evaluation_autocast
from tiny_model import checkpoint, config, photograph


def with_keys(folder: Path, **keys: Any) -> CfgNode:
    cfg = config(folder)
    for key, value in keys.items():
        section, name = key.replace("__", ".").rsplit(".", 1)
        cfg.merge_from_list([f"{section}.{name}", value])
    return cfg


def seen_dtype(predictor: Predictor) -> torch.dtype:
    """What the decoder's convolutions compute in."""
    seen: list[torch.dtype] = []
    model: Any = predictor.model
    handle = model.sem_seg_head.semantic_fpn.predictor.register_forward_hook(
        lambda _module, _inputs, output: seen.append(output.dtype)
    )
    predictor(photograph(40, 52))
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("fast_paths", ["none", "auto"])
def test_a_predictor_follows_it(tmp_path: Path, fast_paths: str) -> None:
    weights = checkpoint(tmp_path)
    keys = {"MODEL__FAST_PATHS": fast_paths}
    exact = Predictor(with_keys(tmp_path, **keys), weights)
    mixed = Predictor(with_keys(tmp_path, **keys, TEST__AMP__ENABLED=True), weights)
    training = Predictor(with_keys(tmp_path, **keys, SOLVER__AMP__ENABLED=True), weights)
    assert seen_dtype(mixed) == torch.bfloat16
    assert seen_dtype(exact) == seen_dtype(training) == torch.float32
    image = photograph(40, 52)
    predictors = (exact, mixed, training, exact)
    probabilities: list[Any] = [
        each(image, probabilities=True).probabilities for each in predictors
    ]
    assert np.array_equal(probabilities[0], probabilities[2])
    assert np.array_equal(probabilities[0], probabilities[3])
    assert not np.array_equal(probabilities[0], probabilities[1])
    np.testing.assert_allclose(probabilities[1], probabilities[0], atol=0.1)


@pytest.mark.parametrize("fast_paths", ["none", "auto"])
@pytest.mark.parametrize("decoder", ["fpn", "mask2former"])
def test_an_evaluation_follows_it_and_its_reports(
    tmp_path: Path, decoder: str, fast_paths: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = tiny.write_config if decoder == "fpn" else tiny_masks.write_config
    with tiny.datasets(tmp_path):
        model: Any = None
        seen: list[torch.dtype] = []
        for enabled in (False, True):
            cfg = load_config(write(tmp_path / "config.yaml"))
            cfg.MODEL.DEVICE, cfg.MODEL.FAST_PATHS = "cpu", fast_paths
            cfg.OUTPUT_DIR, cfg.TEST.AMP.ENABLED = str(tmp_path / "out"), enabled
            if model is None:
                model = Trainer.build_model(cfg)
                head = model.sem_seg_head
                last = head.semantic_fpn.predictor if decoder == "fpn" else head
                last.register_forward_hook(lambda *each: seen.append(dtype_of(each[-1])))
            Trainer.test(cfg, model)
            assert len(seen) > 2  # two images, and those of the report
            assert set(seen) == {torch.bfloat16 if enabled else torch.float32}
            seen.clear()


def dtype_of(output: Any) -> torch.dtype:
    """Of the decoder's last product: the logits of classes, or those of masks."""
    logits: torch.Tensor = output if isinstance(output, torch.Tensor) else output["pred_masks"]
    return logits.dtype


def test_it_is_off_by_default_and_refused_where_it_cannot_work() -> None:
    cfg = load_config()
    cfg.MODEL.DEVICE = "cpu"
    with evaluation_autocast(cfg):
        assert not torch.is_autocast_enabled("cpu")
    cfg.TEST.AMP.ENABLED = True
    with evaluation_autocast(cfg):
        assert torch.is_autocast_enabled("cpu")
    cfg.TEST.AMP.PRECISION = "float16"
    with pytest.raises(ConfigError, match=r"TEST\.AMP\.PRECISION"):
        evaluation_autocast(cfg)


def test_a_predictor_refuses_it_when_it_is_made(tmp_path: Path) -> None:
    cfg = with_keys(tmp_path, TEST__AMP__ENABLED=True, TEST__AMP__PRECISION="float16")
    with pytest.raises(ConfigError, match=r"TEST\.AMP\.PRECISION"):
        Predictor(cfg, checkpoint(tmp_path))
