"""Mask-classification models evaluated and asked for predictions, with fast forms and without."""

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model

import semask
import tiny
import tiny_masks
import train_command
from semask.modeling.heads.mask_classification import DECODERS, register_decoder
from semask.modeling.pixel_decoder import FPNPixelDecoder
from tiny_model import photograph

PROTOCOLS: Mapping[str, tuple[Any, ...]] = {
    "whole": (),
    "multi_scale": ("TEST.PROTOCOL", "multi_scale"),
    "multi_scale_resized_twice": (
        *("TEST.PROTOCOL", "multi_scale", "TEST.AUG.FROM_RESIZED", True),
    ),
    "slide": (
        *("TEST.PROTOCOL", "slide"),
        *("TEST.SLIDE_CROP", "[32, 32]", "TEST.SLIDE_STRIDE", "[16, 24]"),
    ),
}


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Callable[..., int]]:
    with tiny.datasets(tmp_path), tiny.own_loggers():
        yield functools.partial(train_command.run, tmp_path)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_fast_and_plain_evaluation_find_the_same_pixels(
    tmp_path: Path, command: Callable[..., int], protocol: str
) -> None:
    weights = tiny_masks.checkpoint(tmp_path)
    file = str(tmp_path / "config.yaml")
    options = ("--eval-only", "MODEL.WEIGHTS", weights, *PROTOCOLS[protocol])
    matrices, queries = [], []
    for paths in ("auto", "none"):
        keys = ("MODEL.FAST_PATHS", paths, "OUTPUT_DIR", tmp_path / paths)
        assert command(*options, *keys, config=file) == 0
        folder = tmp_path / paths / "inference" / "tiny_val"
        found = json.loads((folder / "sem_seg_evaluation.json").read_text())
        matrices.append(np.array(found["confusion_matrix"]))
        page = (folder / "report.html").read_text()
        queries.append(re.findall(r"<figcaption>(\w+ [01]\.\d\d · query \d)</figcaption>", page))
        assert "sums over the queries" in page  # no probabilities, says the calibration
    np.testing.assert_array_equal(matrices[0], matrices[1])
    assert queries[0] == queries[1]
    assert len(set(queries[0])) > 1
    assert (matrices[0].sum(axis=1) > 0).sum() > 1


@pytest.mark.parametrize("decoder", tiny_masks.DECODERS)
def test_predictor(tmp_path: Path, decoder: str) -> None:
    weights = tiny_masks.checkpoint(tmp_path, decoder)
    predictor = semask.Predictor(tmp_path / "config.yaml", weights)
    prediction = predictor(photograph(50, 70), probabilities=True, priors=True)
    probabilities = prediction.probabilities
    assert probabilities is not None
    assert probabilities.shape == (3, 50, 70)
    np.testing.assert_allclose(probabilities.sum(axis=0), 1, rtol=1e-5)
    np.testing.assert_array_equal(prediction.labels, probabilities.argmax(axis=0))
    assert set(prediction.prior_pictures()) == {"prior2", "prior3", "prior4", "prior5"}


def test_a_decoder_of_ones_own_is_one_function(tmp_path: Path) -> None:
    """Mask2Former's queries on the plain FPN of MaskFormer."""

    @register_decoder("own")
    def own(cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        arguments = DECODERS["mask2former"](cfg, input_shape)
        head = cfg.MODEL.SEM_SEG_HEAD
        arguments["pixel_decoder"] = FPNPixelDecoder(
            input_shape=input_shape,
            channels=head.CONVS_DIM,
            mask_channels=head.MASK_DIM,
            norm=head.NORM,
        )
        return {**arguments, "inside_only": False}

    try:
        model = build_model(tiny_masks.config("own")).train()
        assert not model.sem_seg_head.inside_only
        losses = model(tiny_masks.batch((64, 64)))
        assert {"loss_ce", "loss_mask", "loss_dice", "loss_prior"} <= set(losses)
        with pytest.raises(ValueError, match="'own'"):
            register_decoder("own")(own)
    finally:
        del DECODERS["own"]
