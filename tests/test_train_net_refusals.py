"""User errors of the command: one message, exit status 2, nothing written."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from PIL import Image

import tiny
import tiny_masks
import train_command
from semask.cli.main import parse
from semask.cli.train import setup
from semask.config.loading import load_config
from semask.data.datasets.camvid import CLASSES_AND_COLORS as CAMVID
from semask.engine import Trainer


@pytest.fixture(autouse=True)
def records(tmp_path: Path) -> Iterator[list[dict[str, Any]]]:
    with tiny.datasets(tmp_path) as records, tiny.own_loggers():
        yield records


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., int]:
    return functools.partial(train_command.run, tmp_path)


def refusal(
    status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], *, out: str = "out"
) -> str:
    assert status == 2
    assert not (tmp_path / out).exists()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["MODEL.SWIM.DEPTHS", "[1, 1]"], ["MODEL.SWIM", "MODEL.SWIN"]),
        (["SOLVER.BASE_RL", "0.1"], ["no key 'BASE_RL'|SOLVER.BASE_RL", "SOLVER.BASE_LR"]),
        (["SOLVER.MAX_ITER"], ["pairs", "Put options such as --resume before them"]),
        (["MODEL.SWIN.DEPTHS", "[1, 1, 1]"], ["MODEL.SWIN.DEPTHS has 3", "NUM_HEADS has 2"]),
        (["MODEL.SWIN.NUM_HEADS", "[1]"], ["MODEL.SWIN.NUM_HEADS has 1"]),
        (["MODEL.SEMASK.ATTENTION", "['window']"], ["MODEL.SEMASK.ATTENTION has 1"]),
        (["MODEL.SEMASK.ATTENTION", "['window', 'glob']"], ["MODEL.SEMASK.ATTENTION[1]", "glob"]),
        (["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "4"], ["'tiny_train' has 3", "NUM_CLASSES is 4"]),
        (["MODEL.SEMASK.NUM_CLASSES", "7"], ["MODEL.SEMASK.NUM_CLASSES is 7", "has 3"]),
        (["MODEL.SEM_SEG_HEAD.IGNORE_VALUE", "254"], ["ignores the label 255", "IGNORE_VALUE"]),
        (["MODEL.BACKBONE.NAME", "SeMaskSwan"], ["cannot be built", "SeMaskSwan"]),
        (["DATASETS.TRAIN", "('tiny_trian',)"], ["'tiny_trian'", "Did you mean 'tiny_train'"]),
        (["DATASETS.TRAIN", "()"], ["DATASETS.TRAIN is empty"]),
        (["SOLVER.OPTIMIZER", "ADAM"], ["SOLVER.OPTIMIZER is 'ADAM'"]),
        (["SOLVER.LR_SCHEDULER_NAME", "Poly"], ["SOLVER.LR_SCHEDULER_NAME 'Poly'"]),
        (["INPUT.RANDOM_FLIP", "vertical"], ["INPUT.RANDOM_FLIP"]),
        (["INPUT.SCALE", "[0, 0]"], ["INPUT.SCALE"]),
        (["MODEL.DEVICE", "gpu"], ["MODEL.DEVICE 'gpu'"]),
        (
            ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", "float16"],
            ["SOLVER.AMP.PRECISION is 'float16', which needs a CUDA device"],
        ),
        (["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", "half"], ["is 'half'; use"]),
        (["SOLVER.ACCUMULATE_STEPS", "0"], ["SOLVER.ACCUMULATE_STEPS is 0"]),
        (["SOLVER.ACCUMULATE_STEPS", "4"], ["IMS_PER_BATCH is 2", "in 4 accumulated batches"]),
        (["SOLVER.EMA.ENABLED", "True", "SOLVER.EMA.DECAY", "1.0"], ["SOLVER.EMA.DECAY is 1.0"]),
        (["DATALOADER.SAMPLER_TRAIN", "RandomSubsetTrainingSampler"], ["SAMPLER_TRAIN"]),
        (["MODEL.WEIGHTS", "nowhere.pth"], ["'nowhere.pth' does not exist", "MODEL.WEIGHTS"]),
        (["--eval-only", "DATASETS.TEST", "()"], ["DATASETS.TEST is empty"]),
        (["--eval-only"], ["--eval-only has no weights", "MODEL.WEIGHTS", "--resume"]),
        (["--eval-only", "--resume"], ["--eval-only has no weights"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) and len(value[0]) > 30 else None,
)
def test_config_mistakes(
    tmp_path: Path,
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    parts: list[str],
) -> None:
    device = [] if "MODEL.DEVICE" in overrides or len(overrides) == 1 else ["MODEL.DEVICE", "cpu"]
    message = refusal(command(*overrides, *device), tmp_path, capsys)
    for part in parts:
        assert any(choice in message for choice in part.split("|")), message
    assert len(message.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 0], ["MODEL.MASK_FORMER.NUM_OBJECT_QUERIES"]),
        (["MODEL.MASK_FORMER.DECODER", "segformer"], ["'segformer'", "mask2former_fapn"]),
        (["MODEL.SWIN.OUT_FEATURES", "['res3', 'res4']"], ["IN_FEATURES", "has res2, res5"]),
        (
            ["MODEL.SEM_SEG_HEAD.IN_FEATURES", "['res3', 'res4']"],
            ["IN_FEATURES", "res3 of stride 8, res4"],
        ),
        (["MODEL.SEM_SEG_HEAD.NUM_CLASSES", 4], ["'tiny_train' has 3", "NUM_CLASSES is 4"]),
        (["MODEL.SEMASK.NUM_CLASSES", 7], ["MODEL.SEMASK.NUM_CLASSES is 7", "has 3"]),
        (["MODEL.MASK_FORMER.TEST.SEMANTIC_ON", False], ["MODEL.MASK_FORMER.TEST.SEMANTIC_ON"]),
        (["TASK", "depth"], ["TASK is 'depth'", "semantic"]),
        (["TASK", "panoptic"], ["TASK", "MODEL.MASK_FORMER.TEST.PANOPTIC_ON"]),
    ],
    ids=lambda value: value[0] if len(value) == 2 and "." in value[0] else None,
)
@pytest.mark.parametrize("decoder", ["maskformer", "mask2former"])
def test_mistakes_with_mask_classification(
    tmp_path: Path,
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    decoder: str,
    overrides: list[Any],
    parts: list[str],
) -> None:
    file = tiny_masks.write_config(tmp_path / "masks.yaml", decoder)
    message = refusal(command(*overrides, config=file), tmp_path, capsys)
    for part in parts:
        assert part in message, message
    assert len(message.strip().splitlines()) == 1


def test_config_that_runs_code_is_refused(
    tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    target, path = tmp_path / "executed", tmp_path / "evil.yaml"
    path.write_text(f"OUTPUT_DIR: !!python/object/apply:os.system ['touch {target}']\n")
    message = refusal(command(config=str(path)), tmp_path, capsys)
    assert "evil.yaml" in message
    assert "run code" in message
    assert not target.exists()


def test_checkpoint_of_another_class_count(
    tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("OUTPUT_DIR", tmp_path / "first", "MODEL.DEVICE", "cpu") == 0
    capsys.readouterr()
    weights = ("MODEL.WEIGHTS", tmp_path / "first" / "model_final.pth")
    four = tiny.write_config(
        tmp_path / "four.yaml",
        MODEL={"SEM_SEG_HEAD": {"NUM_CLASSES": 4}},
        DATASETS={"TRAIN": ["tiny_four"], "TEST": ["tiny_four"]},
    )
    tiny.register("tiny_four", DatasetCatalog.get("tiny_val"), stuff_classes=list("abcd"))
    try:
        for flags in ((), ("--eval-only",)):
            message = refusal(command(*flags, *weights, config=four), tmp_path, capsys)
            assert "blocks.0.query.weight (3, 8) -> (4, 8)" in message
            assert "with another shape (checkpoint -> model)" in message
            assert "set MODEL.SEM_SEG_HEAD.NUM_CLASSES to 3" in message
            assert "use the config.yaml in the OUTPUT_DIR of its run" in message
            assert "name the 3 classes in DATASETS.FOLDER_CLASSES" in message
    finally:
        tiny.unregister("tiny_four")


def weights_of(tmp_path: Path, decoder: str, **model: Any) -> Path:
    """A checkpoint of the model that another config describes."""
    path = tmp_path / "other.yaml"
    if decoder == "fpn":
        file = tiny.write_config(path, MODEL={"DEVICE": "cpu", **model})
    else:
        file = tiny_masks.write_config(path, decoder, MODEL=model)
    state = Trainer.build_model(load_config(file)).state_dict()
    torch.save({"model": state, "iteration": 7}, tmp_path / "other.pth")
    return tmp_path / "other.pth"


PLAIN = {"SEMASK": {"ATTENTION": ["none"] * 4}}


@pytest.mark.parametrize(
    ("of", "model", "to", "parts"),
    [
        ("maskformer", {}, "mask2former", ["'maskformer'", "'mask2former'", "DECODER"]),
        ("mask2former_fapn", {}, "mask2former_msfapn", ["'mask2former_fapn'", "DECODER"]),
        ("mask2former", PLAIN, "mask2former", ["lacks the semantic layers", "'initialise'"]),
    ],
)
def test_checkpoint_of_another_mask_model(
    tmp_path: Path,
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    of: str,
    model: dict[str, Any],
    to: str,
    parts: list[str],
) -> None:
    """Refused with its name, and loaded partially on request."""
    weights = ("MODEL.WEIGHTS", weights_of(tmp_path, of, **model))
    file = tiny_masks.write_config(tmp_path / "masks.yaml", to)
    for flags in ((), ("--eval-only",)):
        message = refusal(command(*flags, *weights, config=file), tmp_path, capsys)
        for part in (*parts, "other.pth"):
            assert part in message, message
    short = ("TEST.REPORT", False, "TEST.NUM_PANELS", 0, "SOLVER.MAX_ITER", 1)
    assert command(*weights, *short, "MODEL.WEIGHTS_MODE", "initialise", config=file) == 0
    assert "tensors are not loaded" in (tmp_path / "out" / "log.txt").read_text()


@pytest.mark.parametrize("decoder", ["fpn", "maskformer", "mask2former"])
def test_an_own_checkpoint_with_other_classes_is_a_start(
    tmp_path: Path, command: Callable[..., int], decoder: str
) -> None:
    """From its weights to a trained and evaluated model."""
    weights = weights_of(tmp_path, decoder, SEM_SEG_HEAD={"NUM_CLASSES": 5})
    if decoder == "fpn":
        file = tiny.write_config(tmp_path / "own.yaml", MODEL={"DEVICE": "cpu"})
    else:
        file = tiny_masks.write_config(tmp_path / "own.yaml", decoder)
    options = ("SOLVER.MAX_ITER", 1, "SOLVER.BASE_LR", 1e-9, "SOLVER.WEIGHT_DECAY", 0.0)
    start = ("MODEL.WEIGHTS", weights, "MODEL.WEIGHTS_MODE", "initialise")
    assert command(*start, *options, config=file) == 0
    assert "they depend on the classes" in (tmp_path / "out" / "log.txt").read_text()
    assert (tmp_path / "out" / "inference" / "tiny_val" / "report.html").is_file()
    given = torch.load(weights, weights_only=True)["model"]
    trained = torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)["model"]
    different = {name for name, value in trained.items() if value.shape != given[name].shape}
    assert {name.split(".")[0] for name in different} == {"backbone", "sem_seg_head"}
    for name, value in trained.items():
        if name not in different and "running" not in name and "num_batches" not in name:
            assert torch.allclose(value, given[name], atol=1e-6), name


def test_a_pretrained_backbone_cannot_be_evaluated(
    tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = load_config(tiny.write_config(tmp_path / "config.yaml"), ["MODEL.DEVICE", "cpu"])
    backbone = {
        name: value
        for name, value in Trainer.build_model(cfg).state_dict().items()
        if name.startswith("backbone.") and "semantic" not in name and "output_norms" not in name
    }
    torch.save({"model": backbone}, tmp_path / "imagenet.pth")
    weights = ("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", tmp_path / "imagenet.pth")
    message = refusal(command("--eval-only", *weights), tmp_path, capsys)
    assert "imagenet.pth' (ImageNet-pretrained Swin, by" in message
    assert "is not a complete model: it lacks" in message
    assert command(*weights) == 0  # a training can start from it


def test_dataset_folder_missing(
    tmp_path: Path,
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nothing"))
    config = tiny.write_config(
        tmp_path / "camvid.yaml",
        DATASETS={"TRAIN": ["camvid_sem_seg_train"], "TEST": ["camvid_sem_seg_val"]},
        MODEL={"SEM_SEG_HEAD": {"NUM_CLASSES": len(CAMVID)}},
    )
    message = refusal(command(config=config), tmp_path, capsys)
    assert "DETECTRON2_DATASETS" in message
    assert str(tmp_path / "nothing") in message
    assert "camvid/images/{train,val,test}" in message
    assert not (tmp_path / "nothing").exists()


def broken(record: dict[str, Any], kind: str) -> str:
    """Damage one pair of files; what the message has to say."""
    image, label = record["file_name"], record["sem_seg_file_name"]
    if kind == "label of another size":
        Image.fromarray(np.zeros((8, 9), dtype=np.uint8)).save(label)
        return "9x8"
    if kind == "label value":
        Image.fromarray(np.full((tiny.SIDE, tiny.SIDE), 99, dtype=np.uint8)).save(label)
        return "99 ("
    if kind == "label with three channels":
        Image.fromarray(np.zeros((tiny.SIDE, tiny.SIDE, 3), dtype=np.uint8)).save(label)
        return "3 channels"
    content = Path(image).read_bytes()
    Path(image).write_bytes(content[: len(content) // 2])
    return "Cannot read image"


DAMAGES = ("label of another size", "label value", "label with three channels", "truncated image")


@pytest.mark.parametrize("of", [tiny, tiny_masks])
@pytest.mark.parametrize("kind", DAMAGES)
def test_bad_first_image(
    tmp_path: Path,
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    records: list[dict[str, Any]],
    kind: str,
    of: Any,
) -> None:
    words = broken(records[0], kind)
    message = refusal(command(config=of.write_config(tmp_path / "c.yaml")), tmp_path, capsys)
    assert words in message
    assert records[0]["file_name"].removesuffix(".png") in message


def test_bad_label_found_by_a_data_loading_process(
    tmp_path: Path,
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    records: list[dict[str, Any]],
) -> None:
    for record in records[1:4]:
        broken(record, "label value")
    options = ("MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "1", "DATASETS.CHECK_SAMPLE", 1)
    assert command(*options) == 2
    captured = capsys.readouterr()
    message = captured.err.strip().splitlines()[-1]
    assert message.startswith("DataError: Label map '")
    assert "not classes: 99" in message
    assert "Traceback" not in captured.out + captured.err  # one message is enough
    assert captured.out.count("no class") == 0
    assert "not classes: 99" in (tmp_path / "out" / "log.txt").read_text()


def test_empty_dataset(
    tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.register("tiny_empty", [])
    try:
        message = refusal(command("DATASETS.TRAIN", "('tiny_empty',)"), tmp_path, capsys)
    finally:
        tiny.unregister("tiny_empty")
    assert "'tiny_empty' has no images" in message


# ---- devices ----


@pytest.mark.parametrize(
    ("arguments", "found", "part"),
    [
        (["MODEL.DEVICE", "cuda"], 0, "MODEL.DEVICE is 'cuda', but PyTorch finds 0"),
        (["MODEL.DEVICE", "cuda:3"], 2, "MODEL.DEVICE is 'cuda:3', but PyTorch finds 2"),
        (["--num-gpus=2"], 0, "--num-gpus is 2, but this machine has 0 CUDA"),
        (["--num-gpus=9"], 8, "--num-gpus is 9, but this machine has 8 CUDA"),
        (["--num-gpus=-1"], 8, "--num-gpus is -1"),
        (["--num-gpus=2", "MODEL.DEVICE", "cpu"], 2, "torchrun --nproc-per-node 2 -m semask train"),
        (["--num-gpus=2", "MODEL.DEVICE", "cuda:0"], 2, "set it to 'cuda'"),
        (["--num-gpus=2", "SOLVER.IMS_PER_BATCH", "3"], 2, "which 2 processes cannot share"),
        (["--num-gpus=2", "SOLVER.REFERENCE_WORLD_SIZE", "8"], 2, "which 8 processes cannot share"),
    ],
)
def test_device_mistakes(
    tmp_path: Path,
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    found: int,
    part: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    assert part in refusal(command(*arguments), tmp_path, capsys)


@pytest.mark.parametrize(
    ("gpus", "found", "device"), [(1, 0, "cpu"), (0, 2, "cpu"), (1, 2, "cuda")]
)
def test_device_is_chosen_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, found: int, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    path = tiny.write_config(tmp_path / "config.yaml")
    args = parse("train", [path, "--num-gpus", str(gpus)])
    cfg = setup(args)
    assert device == cfg.MODEL.DEVICE
