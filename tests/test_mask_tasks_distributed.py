"""Instance and panoptic segmentation by mask classification, in two processes and in one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

import runs
from semask import load_config
from semask.engine import Trainer, wrap_ddp
from semask.engine.train_step import TrainStep
from semask.tasks import build_task
from test_mask_tasks import TASKS, Perfect, own_folder
from test_mask_training import Batches, same_points

pytestmark = pytest.mark.usefixtures("catalogs", "one_thread")

IMAGES = 3


class Shifted(Perfect):
    """The ground truth, moved by another number of pixels in each image."""

    def forward(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        (output,) = super().forward([{}])
        (entry,) = batch
        shift = 2 * int(entry["image_id"])
        ids, segments = output["panoptic_seg"]
        output["panoptic_seg"] = (ids.roll(shift, 1), segments)
        output["sem_seg"] = output["sem_seg"].roll(shift, 2)
        found = output["instances"]
        found.pred_masks = found.pred_masks.roll(shift, 2)
        found.pred_boxes = Boxes(found.pred_boxes.tensor + torch.tensor([shift, 0, shift, 0]))
        found.scores -= 0.1 * shift
        return [output]


def trained_and_evaluated(folder: str, task: str) -> dict[str, Any]:
    """Two steps of this process's share of two images; then the results on three."""
    keys: dict[str, Any] = {
        "DATASETS.FOLDER_ROOT": f"{folder}/own",
        "OUTPUT_DIR": f"{folder}/out{comm.get_world_size()}",
        "MODEL.DEVICE": "cpu",
        **{"MODEL.SWIN.EMBED_DIM": 8, "MODEL.SWIN.DEPTHS": [1, 1, 1, 1]},
        **{"MODEL.SWIN.NUM_HEADS": [1, 1, 2, 2], "MODEL.SWIN.DROP_PATH_RATE": 0.0},
        **{"MODEL.SEMASK.DROPOUT": 0.0, "MODEL.MASK_FORMER.DROPOUT": 0.0},
        **{"MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 64, "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 8},
        **{"INPUT.CROP.ENABLED": False, "INPUT.RANDOM_FLIP": "none"},
        **{"INPUT.MIN_SIZE_TRAIN": (64,), "INPUT.PHOTOMETRIC_DISTORTION": False},
        **{"TEST.REPORT": False, "TEST.BOUNDARY_IOU": True},
    }
    options = [f"{key}={value}" for key, value in keys.items()]
    cfg = load_config(f"own_dataset/semask_mask2former_{task}_example", options)
    torch.manual_seed(comm.get_rank())  # the weights are those of the first process
    model = Trainer.build_model(cfg).double()
    mapper = build_task(cfg).build_mapper(is_train=True)
    samples = [mapper(record) for record in DatasetCatalog.get(cfg.DATASETS.TRAIN[0])[:2]]
    assert len(samples[0]["instances"]) == (4 if task == "panoptic" else 2)
    own = samples[comm.get_rank() :: comm.get_world_size()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    step = TrainStep(wrap_ddp(model), Batches([own] * 2), optimizer)
    with EventStorage() as storage, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", same_points)
        for step.iter in range(2):
            step.run_step()
        losses = {name: value for name, (value, _) in storage.latest().items() if "loss" in name}
    results = Trainer.test(cfg, Shifted())
    return {
        "losses": losses,
        "state": dict(model.state_dict()),
        "results": {f"{k}/{n}": v for k, values in results.items() for n, v in values.items()},
    }


@pytest.mark.parametrize("task", TASKS)
def test_two_processes_equal_one(tmp_path: Path, task: str) -> None:
    own_folder(tmp_path, task, IMAGES)
    first, second = runs.together(
        trained_and_evaluated, str(tmp_path), task, folder=tmp_path / "group"
    )
    expected = trained_and_evaluated(str(tmp_path), task)
    assert {"loss_ce", "loss_mask", "loss_dice", "loss_prior"} <= set(expected["losses"])
    assert first["losses"] == pytest.approx(expected["losses"], rel=1e-8)
    for found in (first, second):
        torch.testing.assert_close(found["state"], expected["state"], rtol=1e-8, atol=1e-10)
    assert second["results"] == {}
    np.testing.assert_equal(first["results"], expected["results"])
    kinds = ["bbox/AP", "segm/AP", "boundary/AP"]
    kinds += ["panoptic_seg/PQ", "panoptic_seg/SQ", "sem_seg/mIoU"] if task == "panoptic" else []
    for kind in kinds:
        assert 5 < expected["results"][kind] < 95, kind
