"""The training data pipeline alone, on one core: images per second."""

import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import SIDES, Case, case_of
from benchmarks.measure import Effort, spread
from benchmarks.process import Worker

HEIGHT, WIDTH = 512, 683
CLASSES = 150
COUNT = 12


def write_samples(folder: Path, images: Sequence[Path] = ()) -> list[dict[str, str]]:
    """Images with label maps.

    Args:
        folder: for what is generated: a label map for each image, and where none is given, JPEGs
            of 683 x 512 pixels with the smooth areas, edges and noise of photographs.
        images: files to use instead.

    Returns:
        Detectron2's dataset dicts.
    """
    import numpy as np
    from PIL import Image

    from semask.data.image_files import opened_image

    records = []
    for index in range(len(images) or COUNT):
        rng = np.random.default_rng(index)
        if images:
            path = images[index]
            with opened_image(path, "image") as image:
                size = image.size
        else:
            path, size = folder / f"{index}.jpg", (WIDTH, HEIGHT)
            pixels = np.zeros((HEIGHT, WIDTH, 3))
            for cells, strength in ((3, 90.0), (12, 50.0), (60, 25.0)):
                coarse = rng.integers(0, 255, (cells, cells * 4 // 3, 3), dtype=np.uint8)
                layer = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
                pixels += (np.asarray(layer) / 255 - 0.5) * strength
            pixels += 128 + rng.normal(0, 4, pixels.shape)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        label = rng.integers(0, CLASSES, (6, 8), dtype=np.uint8)
        label[0, 0] = 255
        label_path = folder / f"{index}.png"
        Image.fromarray(label).resize(size, Image.Resampling.NEAREST).save(label_path)
        records.append({"file_name": str(path), "sem_seg_file_name": str(label_path)})
    return records


def prepare_data(message: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """The worker's job: process all images once per turn, with the random numbers of the turn."""
    import cv2
    import numpy as np
    import torch

    from benchmarks.sides import import_project, load_case_config

    import_project()
    from semask.ops.apply import select_fast_paths
    from semask.ops.malloc import keep_freed_memory

    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    cfg = load_case_config(case_of(message["case"]))
    if "kept_memory" in select_fast_paths(cfg):
        # Data loading workers are forked from the training process and inherit its allocator
        # settings; here they are not forked, so both sides set them.
        keep_freed_memory()
    mapper = build_mapper(cfg, message["side"])
    records = message["records"]
    seed = 0

    def turn() -> dict[str, Any]:
        nonlocal seed
        if seed == 0:
            mapper(records[0])
        seed += 1
        np.random.seed(seed)
        random.seed(seed)
        start = time.perf_counter()
        for record in records:
            mapper(record)
        return {"images_per_second": len(records) / (time.perf_counter() - start)}

    return turn


def build_mapper(cfg: Any, side: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The project's data mapper, or the plain pipeline of the same config."""
    if side == "fast":
        from semask.data import SemSegMapper

        return SemSegMapper(cfg, is_train=True)
    from plain_pipeline import PlainPipeline

    crop = cfg.INPUT.CROP
    return PlainPipeline(
        scale=cfg.INPUT.SCALE,
        factors=cfg.INPUT.SCALE_FACTORS,
        sampling=cfg.INPUT.SCALE_SAMPLING,
        crop=crop.SIZE,
        max_category_area=crop.SINGLE_CATEGORY_MAX_AREA,
        ignore_value=cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
    )


def measure_data(case: Case, effort: Effort, images: Sequence[Path] = ()) -> dict[str, Any]:
    """Measure both pipelines alternately.

    Returns:
        "fast" and "plain", each the spread of "images_per_second" of one core, and "speedup".
    """
    turns: dict[str, list[float]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        records = write_samples(Path(folder), images)
        jobs = [
            {"job": "data", "case": case.as_dict(), "side": side, "records": records}
            for side in SIDES
        ]
        with Worker(1, jobs[0]) as fast, Worker(1, jobs[1]) as plain:
            start = time.monotonic()
            while len(turns["fast"]) < effort.repeats and (
                len(turns["fast"]) < effort.least or time.monotonic() - start < effort.seconds
            ):
                for side, worker in zip(SIDES, (fast, plain), strict=True):
                    turns[side].append(worker.turn()["images_per_second"])
    ratios = [f / p for f, p in zip(turns["fast"], turns["plain"], strict=True)]
    return {
        "model": case.model,
        "images": len(records),
        **{side: {"images_per_second": spread(values)} for side, values in turns.items()},
        "speedup": spread(ratios),
    }
