"""Unreadable files do not end a run: they are skipped reproducibly, counted and listed."""

import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import TrainerBase

import runs
import tiny
from semask.config.loading import load_config
from semask.data.mappers.semantic import SemSegMapper
from semask.data.unreadable import (
    SKIPPED,
    ReadableBatches,
    ReadableDataset,
    UnreadableFiles,
)
from semask.engine import Trainer, check_run
from semask.engine.hooks import UnreadableFilesHook
from semask.errors import DataError, UnreadableError
from semask.tasks import build_task
from tiny_runs import TinyRuns

IMAGES = 6


@pytest.fixture
def records(tmp_path: Path) -> list[dict[str, Any]]:
    return tiny.write_images(tmp_path / "images", IMAGES)


def damage(record: dict[str, Any], key: str = "file_name") -> str:
    path = Path(record[key])
    path.write_bytes(path.read_bytes()[:50])
    return record["file_name"]


def mapper(is_train: bool = True) -> SemSegMapper:
    return SemSegMapper(is_train=is_train, augmentations=[], num_classes=len(tiny.CLASSES))


def training_batches(
    records: list[dict[str, Any]], limit: int, *, workers: int = 0
) -> ReadableBatches:
    torch.manual_seed(0)
    loader = build_detection_train_loader(
        ReadableDataset(records, mapper(), limit),
        mapper=None,
        sampler=Endless(len(records)),
        total_batch_size=2,
        num_workers=workers,
        aspect_ratio_grouping=False,
    )
    return ReadableBatches(loader, UnreadableFiles(limit))


class Endless(torch.utils.data.Sampler[int]):
    """0, 1, 2, ... and again."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        yield from itertools.cycle(range(self.size))


def names(batches: ReadableBatches, number: int) -> list[str]:
    """Files of the first samples, in order."""
    first = itertools.islice(batches, number)
    return [Path(sample["file_name"]).stem for batch in first for sample in batch]


def test_sound_files_are_not_touched(records: list[dict[str, Any]]) -> None:
    batches = training_batches(records, 10)
    (batch,) = itertools.islice(batches, 1)
    expected = mapper()(records[0])
    assert batch[0].keys() == expected.keys()
    assert torch.equal(batch[0]["image"], expected["image"])
    assert batches.unreadable.reasons == {}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("key", ["file_name", "sem_seg_file_name"])
def test_the_following_image_takes_the_place(
    records: list[dict[str, Any]], caplog: pytest.LogCaptureFixture, workers: int, key: str
) -> None:
    broken = [damage(records[2], key), damage(records[3], key), damage(records[5], key)]
    batches = training_batches(records, 3, workers=workers)
    seen = names(batches, 6)
    # With two processes each loads every other image; together they are the same ones.
    assert sorted(seen) == sorted(["0", "1", "4", "4", "4", "0"] * 2)
    assert sorted(batches.unreadable.reasons) == broken
    assert all("Cannot read" in reason for reason in batches.unreadable.reasons.values())
    assert caplog.text.count("Skipped (") == 3
    assert names(training_batches(records, 3, workers=workers), 6) == seen


def test_missing_files_count_too(records: list[dict[str, Any]]) -> None:
    Path(records[1]["sem_seg_file_name"]).unlink()
    batches = training_batches(records, 1)
    assert names(batches, 2) == ["0", "2", "2", "3"]
    (reason,) = batches.unreadable.reasons.values()
    assert reason.startswith("There is no label map '")


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many(records: list[dict[str, Any]], workers: int) -> None:
    broken = [damage(records[index]) for index in (0, 2, 4)]
    with pytest.raises(DataError, match=r"3 files.*MAX_UNREADABLE") as info:
        names(training_batches(records, 2, workers=workers), 9)
    assert all(path in str(info.value) for path in broken)
    assert "semask check" in str(info.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_more_in_a_row_than_the_limit(records: list[dict[str, Any]], workers: int) -> None:
    for index in (1, 2, 3):
        damage(records[index])
    with pytest.raises(DataError, match=r"3 files.* 2\b"):
        names(training_batches(records, 2, workers=workers), 1)


def test_nothing_can_be_read(records: list[dict[str, Any]]) -> None:
    for record in records:
        damage(record)
    with pytest.raises(DataError, match="6 files"):
        names(training_batches(records, 10), 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_limit_of_none(records: list[dict[str, Any]], workers: int) -> None:
    damage(records[1])
    with pytest.raises(UnreadableError, match=r"1\.png'"):
        names(training_batches(records, 0, workers=workers), 1)


def test_wrong_labels_are_never_skipped(records: list[dict[str, Any]]) -> None:
    strict = SemSegMapper(is_train=True, augmentations=[], num_classes=1)
    with pytest.raises(DataError, match="not classes"):
        ReadableDataset(records, strict, 10)[0]


def test_a_file_counts_once(records: list[dict[str, Any]]) -> None:
    damage(records[1])
    batches = training_batches(records, 1)
    names(batches, 30)
    assert len(batches.unreadable.reasons) == 1


# ---- evaluation: left out ----


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("key", ["file_name", "sem_seg_file_name"])
def test_evaluation_leaves_them_out(
    records: list[dict[str, Any]], caplog: pytest.LogCaptureFixture, workers: int, key: str
) -> None:
    damage(records[0], key)
    damage(records[4], key)
    dataset = ReadableDataset(records, mapper(is_train=False), 2, replace=False)
    loader = build_detection_test_loader(dataset, mapper=None, num_workers=workers)
    batches = ReadableBatches(loader, UnreadableFiles(2, "dataset 'x'"))
    assert len(batches) == IMAGES
    assert [Path(batch[0]["file_name"]).stem for batch in batches] == ["1", "2", "3", "5"]
    assert "2 files of dataset 'x'" in caplog.text
    with pytest.raises(DataError, match=r"2 files.* 'x'.* 1\b"):
        list(ReadableBatches(loader, UnreadableFiles(1, "dataset 'x'")))


# ---- named at the end ----


class Batches(TrainerBase):
    """A trainer that only loads."""

    def __init__(self, batches: ReadableBatches) -> None:
        super().__init__()
        self._iterator = iter(batches)
        self.register_hooks([UnreadableFilesHook(batches.unreadable)])

    def run_step(self) -> None:
        assert all(SKIPPED not in sample for sample in next(self._iterator))


def summary(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if "could not be read and were skipped" in record.getMessage()
    ]


def test_training_names_them_at_its_end(
    records: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    broken = [damage(records[index]) for index in (1, 3)]
    trainer = Batches(training_batches(records, 2))
    trainer.train(0, 6)
    (text,) = summary(caplog)
    assert text.startswith("2 files of the training data")
    assert all(path in text for path in broken)


def test_nothing_to_name(records: list[dict[str, Any]], caplog: pytest.LogCaptureFixture) -> None:
    trainer = Batches(training_batches(records, 2))
    trainer.train(0, 2)
    assert summary(caplog) == []
    assert "hooks" not in trainer.state_dict()


def test_a_resumed_run_remembers(
    records: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    broken = [damage(records[index]) for index in (1, 3)]
    first = Batches(training_batches(records, 2))
    first.train(0, 1)
    second = Batches(training_batches(records[2:], 2))
    second.load_state_dict(first.state_dict())
    caplog.clear()
    second.train(1, 3)
    (text,) = summary(caplog)
    assert all(path in text for path in broken)


# ---- whole runs ----


def config(tmp_path: Path, *overrides: Any) -> CfgNode:
    path = tiny.write_config(tmp_path / "config.yaml", SOLVER={"MAX_ITER": 4})
    fixed = ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "out")]
    return load_config(path, [*fixed, *(str(value) for value in overrides)])


def trained(cfg: CfgNode) -> Trainer:
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    return trainer


@pytest.mark.parametrize("key", ["file_name", "sem_seg_file_name"])
def test_a_run_goes_on_to_its_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str
) -> None:
    """4 images are trained on and 2 evaluated; one file of each cannot be read."""
    with tiny.datasets(tmp_path) as all_records:
        for index in (1, 4):
            damage(all_records[index], key)
        trainer = trained(config(tmp_path))
    assert trainer.iter == 4
    (text,) = summary(caplog)
    assert all_records[1][key] in text
    assert all_records[4][key] not in text
    assert "1 files of dataset 'tiny_val'" in caplog.text
    report = json.loads((tmp_path / "out/inference/tiny_val/sem_seg_evaluation.json").read_text())
    assert sum(map(sum, report["confusion_matrix"])) == tiny.SIDE**2
    assert (tmp_path / "out" / "panels.png").exists()
    assert (tmp_path / "out" / "model_final.pth").exists()


def test_skipping_is_reproducible(tmp_path: Path) -> None:
    def weights(name: str, workers: int) -> dict[str, torch.Tensor]:
        out = ("OUTPUT_DIR", tmp_path / name, "TEST.NUM_PANELS", 0)
        torch.manual_seed(0)
        trainer = trained(config(tmp_path, *out, "DATALOADER.NUM_WORKERS", workers))
        return trainer.model.state_dict()

    with tiny.datasets(tmp_path) as all_records:
        damage(all_records[1])
        first, again = weights("a", 0), weights("b", 2)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_run_gives_up(tmp_path: Path) -> None:
    with tiny.datasets(tmp_path) as all_records:
        damage(all_records[1])
        damage(all_records[2])
        with pytest.raises(DataError, match=r"2 files.* 1\b"):
            trained(config(tmp_path, "DATALOADER.MAX_UNREADABLE", 1))
        with pytest.raises(UnreadableError, match="Cannot read image"):
            trained(config(tmp_path, "DATALOADER.MAX_UNREADABLE", 0))
    assert not (tmp_path / "out" / "model_final.pth").exists()


def test_a_start_is_strict_and_a_resumption_is_not(tmp_path: Path) -> None:
    with tiny.datasets(tmp_path) as all_records:
        cfg = config(tmp_path)
        damage(all_records[0])
        with pytest.raises(DataError, match="'tiny_train', 1 of the 4 "):
            build_task(cfg).check_images("tiny_train", is_train=True)
        build_task(cfg).check_images("tiny_train", is_train=True, resume=True)
        with pytest.raises(DataError, match="'tiny_train', 1 of the 4 "):
            check_run(cfg)
        check_run(cfg, restarted=True)  # by torchrun: the run of days is under way
        unchecked = config(tmp_path, "DATASETS.CHECK_SAMPLE", 0)
        with pytest.raises(DataError, match="Cannot read image"):  # the first image always counts
            build_task(unchecked).check_images("tiny_train", is_train=True)
        damage(all_records[4])
        with pytest.raises(DataError, match="'tiny_val'"):
            build_task(cfg).check_images("tiny_val", is_train=False)


# ---- several processes ----


def tell_each_other(limit: int) -> dict[str, Any]:
    """One of two processes that have skipped different files and one in common."""
    rank = torch.distributed.get_rank()
    unreadable = UnreadableFiles(limit)
    for name in ("both.png", f"{rank}.png"):
        unreadable.add(name, f"Cannot read '{name}'")
    refusal = ""
    try:
        unreadable.sync()
    except DataError as error:
        refusal = str(error)
    return {"refusal": refusal, "known": sorted(unreadable.reasons), "pending": unreadable.pending}


def test_processes_share_one_limit(tmp_path: Path) -> None:
    expected = {"known": ["0.png", "1.png", "both.png"], "pending": {}}
    for own in runs.together(tell_each_other, 3, folder=tmp_path / "within"):
        assert own == {**expected, "refusal": ""}
    for own in runs.together(tell_each_other, 2, folder=tmp_path / "beyond"):
        refusal = own.pop("refusal")
        assert own == expected
        assert refusal.startswith("3 files of the training data cannot be read, and DATALOADER.MAX")


@pytest.mark.slow
def test_a_run_of_two_processes_names_what_both_have_skipped(tmp_path: Path) -> None:
    """Each process evaluates one of the two images, of which the second cannot be read."""
    two = TinyRuns(
        *(tmp_path / "runs", "SOLVER.MAX_ITER", 4, "TEST.NUM_PANELS", 0, "TEST.REPORT", False),
        images=8,
    )
    broken = [damage(two.records[index]) for index in (0, 1, 2, 7)]
    two.options += ["DATASETS.CHECK_SAMPLE", 0]
    printed = two.run("skipping", "--resume", size=2)
    first, last = "3 files of the training data", "1 files of dataset 'tiny_val'"
    assert first in printed
    assert last in printed
    summary = printed[printed.index(first) :]
    assert all(path in summary for path in broken[:3])
    assert broken[3] in printed
    processes = two.start("refusing", "--resume", "DATALOADER.MAX_UNREADABLE", 2, size=2)
    with runs.ended(processes):
        assert [process.status() for process in processes] == [2, 2]
    assert "Traceback" not in processes[0].output()
    assert processes[0].output().count("DATALOADER.MAX_UNREADABLE allows 2") == 1
