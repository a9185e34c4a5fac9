"""The converting program, weights behind a URL, and weights that were converted before."""

import functools
import http.server
import os
import pickle
import re
import threading
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import faults
from reference import CASES, Model, load_meta
from semask.checkpoint import SeMaskCheckpointer, read_checkpoint
from semask.checkpoint.folder import write_checkpoint
from semask.cli import main
from semask.errors import CheckpointError

CONFIGS = {
    "semask_t_ade20k": "ade20k/semask_swin_tiny_fpn",
    "semask_l_cityscapes": "cityscapes/semask_swin_large_fpn",
    "swin_t_ade20k": "ade20k/swin_tiny_fpn",
}


def published(case: str) -> dict[str, Tensor]:
    """Placeholders for all parameters of a published model, by the published names."""
    shapes = dict(load_meta(case)["state_dict"])
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}


def imagenet(case: str) -> dict[str, Tensor]:
    """Those of an ImageNet classifier with the case's backbone."""
    own = (".semantic_layer.", *(f"backbone.norm{stage}." for stage in range(4)))
    backbone = {
        name.removeprefix("backbone."): value
        for name, value in published(case).items()
        if name.startswith("backbone.") and not any(part in name for part in own)
    }
    classifier = {"norm.weight": torch.ones(768), "head.bias": torch.ones(1000)}
    buffers = {"layers.0.blocks.1.attn_mask": torch.zeros(2)}
    return {**backbone, **classifier, **buffers}


def run(source: Path, target: Path, *options: str) -> int:
    return main.run("convert", [str(source), str(target), *options])


@pytest.mark.parametrize("case", CASES)
def test_published_models(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    source, target = tmp_path / "published.pth", tmp_path / "converted.pth"
    state = {k: v for k, v in published(case).items() if not k.endswith("num_batches_tracked")}
    torch.save({"state_dict": state, "meta": {"epoch": 1}, "optimizer": {}}, source)
    assert run(source, target, "--config", CONFIGS[case]) == 0
    printed = capsys.readouterr().out
    kind = "Swin-FPN" if case.startswith("swin") else "SeMask-FPN"
    assert f"Found: published {kind}" in printed
    assert "Left out, entries besides the weights: meta, optimizer" in printed
    content = torch.load(target, weights_only=True)
    assert set(content) == {"model"}
    with torch.device("meta"):
        model = Model(case)
    counters = {name for name in model.state_dict() if name.endswith("num_batches_tracked")}
    assert set(content["model"]) | counters == set(model.state_dict())
    for path in (source, target):  # neither counts the batches
        SeMaskCheckpointer(model, complete=True).check(str(path))


def test_imagenet_swin_converted_is_still_a_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "swin.pth", tmp_path / "converted.pth"
    torch.save({"model": imagenet("swin_t_ade20k")}, source)
    assert run(source, target, "--config", "ade20k/semask_swin_tiny_fpn") == 0
    printed = capsys.readouterr().out
    assert "Found: ImageNet-pretrained Swin" in printed
    assert "Left out, the classifier: norm.weight, head.bias" in printed
    assert "Left out, buffers that the model computes: layers.0.blocks.0.attn.relative_" in printed
    with torch.device("meta"):
        small, large = Model("semask_t_ade20k"), Model("semask_l_cityscapes")
    SeMaskCheckpointer(small).check(str(target))
    with pytest.raises(CheckpointError, match=r"names\) does not fit.*with another shape"):
        SeMaskCheckpointer(large).check(str(target))
    converted = torch.load(target, weights_only=True)["model"]
    del converted["backbone.encoder.stages.0.blocks.0.attn.qkv.bias"]
    torch.save({"model": converted}, target)
    with pytest.raises(CheckpointError, match="1 missing"):
        SeMaskCheckpointer(small).check(str(target))
    assert run(target, tmp_path / "again.pth", "--config", "ade20k/semask_swin_tiny_fpn") == 2
    assert not (tmp_path / "again.pth").exists()


class Small(nn.Module):
    """A model by this project's names."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict(
            {
                "encoder": nn.ModuleDict({"stages": nn.ModuleList([nn.Linear(2, 2)])}),
                "output_norms": nn.ModuleDict({"res2": nn.LayerNorm(2)}),
            }
        )
        self.sem_seg_head = nn.BatchNorm2d(2)


def test_own_checkpoints_and_averaged_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Small()
    weights = model.state_dict()
    averaged = {name: value + 1 for name, value in weights.items()}
    source, target = tmp_path / "model_final.pth", tmp_path / "weights.safetensors"
    content: dict[str, Any] = {"model": weights, "trainer": {"iteration": 5}, "iteration": 5}
    torch.save({**content, "ema": {"steps": 3, "model": averaged}}, source)

    for flags, expected in (((), weights), (("--ema",), averaged)):
        assert run(source, target, *flags) == 0
        assert "Found: this project's own" in capsys.readouterr().out
        found = load_file(target)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        SeMaskCheckpointer(Small()).load(str(target))

    before = target.read_bytes()
    nothing: tuple[Any, ...] = ({}, None, [1.0], torch.zeros(1))
    for entry in nothing:
        torch.save({**content, "ema": {"steps": 0, "model": entry}}, source)
        assert run(source, target, "--ema") == 2
        assert "no averaged weights" in capsys.readouterr().err
    torch.save({**content, "ema": {"steps": 1, "model": {"weight": 1.0}}}, source)
    assert run(source, target, "--ema") == 2
    assert "has a float under 'weight'" in capsys.readouterr().err
    assert target.read_bytes() == before


@pytest.mark.parametrize("mistake", ["names", "ending", "missing", "hostile", "pickle"])
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], mistake: str) -> None:
    source, target = tmp_path / "source.pth", tmp_path / "target.pth"
    words = ""
    if mistake == "names":
        torch.save({"model": {"fc.weight": torch.zeros(1)}}, source)
        words = "match no known kind"
    elif mistake == "ending":
        target, words = tmp_path / "target.ckpt", "must end in .pth or .safetensors"
    elif mistake == "missing":
        words = "does not exist"
    elif mistake == "hostile":
        torch.save({"model": os.system}, source)
        words = "could run code"
    else:
        source, words = tmp_path / "source.pkl", "can run arbitrary code"
        arrays = {name: value.numpy() for name, value in Small().state_dict().items()}
        source.write_bytes(pickle.dumps({"model": arrays, "made": PurePosixPath("x")}))
    assert run(source, target) == 2
    message = capsys.readouterr().err
    assert words in message
    for of_a_run in ("OUTPUT_DIR", "--resume", "MODEL.WEIGHTS"):
        assert of_a_run not in message
    assert sorted(path.name for path in tmp_path.iterdir()) in ([], [source.name])
    if mistake == "pickle":
        assert run(source, target, "--allow-pickle") == 0


@pytest.mark.parametrize("room", [0, 1000, 30_000, 39_000])
def test_a_full_disk_leaves_no_half_file(tmp_path: Path, room: int) -> None:
    weights = {f"weight{index}": torch.zeros(1000) for index in range(10)}
    for name in ("target.pth", "target.safetensors"):
        with (
            faults.full_disk(room),
            pytest.raises(CheckpointError, match=rf"{name}'.*File too large") as caught,
        ):
            write_checkpoint(str(tmp_path / name), {"model": weights})
        assert "OUTPUT_DIR" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# ---- URLs ----


class Handler(http.server.SimpleHTTPRequestHandler):
    requests: list[str]

    def do_GET(self) -> None:
        self.requests.append(self.path)
        super().do_GET()

    def log_message(self, *_arguments: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a server of the folder "served", and what it was asked for."""
    (tmp_path / "served").mkdir()
    requests: list[str] = []
    handler = type("OwnHandler", (Handler,), {"requests": requests})
    serve = functools.partial(handler, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", requests
        server.shutdown()
        thread.join()


def test_weights_behind_a_url(
    tmp_path: Path,
    server: tuple[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """They are fetched once, with a progress bar, and kept."""
    address, requests = server
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    model, other = Small(), Small()
    torch.save({"model": model.state_dict()}, tmp_path / "served" / "weights.pth")
    for _ in range(2):
        SeMaskCheckpointer(other).load(f"{address}/weights.pth")
        assert requests == ["/weights.pth"]
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))
    assert re.search(r"weights\.pth: [\d.]+kB", capfd.readouterr().err)
    assert (tmp_path / "cache" / "weights.pth").is_file()

    assert main.run("convert", [f"{address}/weights.pth", str(tmp_path / "local.safetensors")]) == 0
    assert requests == ["/weights.pth"]
    with pytest.raises(CheckpointError, match=r"none\.pth.*404"):
        read_checkpoint(f"{address}/none.pth")
    assert not (tmp_path / "cache" / "none.pth").exists()
