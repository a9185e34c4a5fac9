"""The plain data pipeline gives the project's images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from plain_comparison import config
from plain_pipeline import PlainPipeline
from semask.data.mappers.semantic import SemSegMapper


@pytest.mark.parametrize("limit", [1.0, 0.75])
@pytest.mark.parametrize("sampling", ["choice", "range"])
def test_plain_pipeline_gives_the_mapper_s_images(
    tmp_path: Path, sampling: str, limit: float
) -> None:
    rng = np.random.default_rng(0)
    for index in range(2):
        coarse = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((96, 70 + 10 * index), Image.Resampling.BICUBIC)
        picture.save(tmp_path / f"{index}.jpg")
        label = rng.integers(0, 5, (picture.height // 10, picture.width // 12), dtype=np.uint8)
        label[0] = 255
        Image.fromarray(label).resize(picture.size, Image.Resampling.NEAREST).save(
            tmp_path / f"{index}.png"
        )
    cfg = config()
    cfg.INPUT.SCALE = [256, 64]
    cfg.INPUT.SCALE_SAMPLING = sampling
    cfg.INPUT.SCALE_FACTORS = [0.5, 1.75]
    cfg.INPUT.CROP.SIZE = [64, 64]
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = limit
    mapper = SemSegMapper(cfg, is_train=True)
    plain = PlainPipeline(
        scale=cfg.INPUT.SCALE,
        factors=cfg.INPUT.SCALE_FACTORS,
        sampling=sampling,
        crop=cfg.INPUT.CROP.SIZE,
        max_category_area=limit,
    )
    for seed in range(40):
        record = {
            "file_name": str(tmp_path / f"{seed % 2}.jpg"),
            "sem_seg_file_name": str(tmp_path / f"{seed % 2}.png"),
        }
        np.random.seed(seed)
        got = mapper(record)
        np.random.seed(seed)
        want = plain(record)
        for key in ("image", "sem_seg"):
            assert torch.equal(got[key].float(), want[key].float()), (seed, key)
            assert got[key].dtype == want[key].dtype
