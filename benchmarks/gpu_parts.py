"""The parts of ``benchmarks/gpu.py``: ``python -m benchmarks.gpu_parts PART FILE [options]``.

Each row is written to FILE as soon as it is measured, one JSON object per line; a failed row has
"failed". No row starts after the part's time.
"""

import argparse
import contextlib
import copy
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.sides import (
    HALF,
    ROOT,
    autocast,
    build,
    import_project,
    inputs,
    load_case_config,
    set_number_format,
)

Row = dict[str, Any]

MODELS = {
    "SeMask-T FPN": "ade20k/semask_swin_tiny_fpn",
    "SeMask-T Mask2Former": "ade20k/semask_swin_tiny_mask2former",
}
LARGE = "ade20k/semask_swin_large_fpn"
TINY = (
    *("MODEL.SWIN.EMBED_DIM", "8", "MODEL.SWIN.DEPTHS", "[1,2,1,1]"),
    *("MODEL.SWIN.NUM_HEADS", "[1,1,1,1]", "MODEL.SEM_SEG_HEAD.CONVS_DIM", "32"),
    *("MODEL.SEM_SEG_HEAD.MASK_DIM", "32", "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", "1"),
    *("MODEL.MASK_FORMER.HIDDEN_DIM", "32", "MODEL.MASK_FORMER.DIM_FEEDFORWARD", "16"),
    *("MODEL.MASK_FORMER.DEC_LAYERS", "2", "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", "5"),
    *("MODEL.MASK_FORMER.TRAIN_NUM_POINTS", "64", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "7"),
)
# Tolerance for each format, relative to the scale of an array: rounding accumulates over layers.
TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-1, "float16": 2e-2}
STEPS = 3  # warm-up steps
MEASURED_SECONDS = 4.0
CAMVID_GRACE = 20.0  # seconds for the checkpoint of a training that is told to end


@dataclass(frozen=True)
class Task:
    """The settings of a part.

    Attributes:
        device, dtype, batch, tiny: see the command.
        end: ``time.monotonic()`` after which no row starts.
    """

    device: str
    dtype: str
    batch: int
    tiny: bool
    end: float

    def case(self, model: str, kind: str, size: int, batch: int) -> Case:
        """A case of ``benchmarks.sides``, small if requested."""
        side = 64 if self.tiny else size
        opts = TINY if self.tiny else ()
        return Case(
            model,
            kind,
            batch,
            side,
            side,
            dtype=self.dtype,
            device=self.device,
            opts=opts,
            label_side=max(8, side // 4),
        )


def fixtures(task: Task) -> Iterator[Callable[[], Row]]:
    """Every model of the reference on the device, in float32 and in the half format."""
    import reference
    import reference_masks

    # cuDNN's convolutions use TensorFloat32 by default, with a mantissa of 10 bits.
    set_number_format(task.case(MODELS["SeMask-T FPN"], "inference", 128, 1))
    formats = dict.fromkeys(["float32", task.dtype])
    # Without masked attention, whose mask changes with rounding (see the fixtures' README).
    for case in reference.CASES[:1] if task.tiny else reference.CASES:
        for dtype in formats:
            yield partial(_fpn_fixture, task, case, dtype)
    for case in reference_masks.CASES[:1] if task.tiny else reference_masks.CASES:
        for dtype in formats:
            yield partial(_mask_fixture, task, case, dtype)


def _fpn_fixture(task: Task, case: str, dtype: str) -> Row:
    import reference

    file = "eval_101x137.npz"
    spec = reference.load_meta(case)["files"][file]["image"]
    made = reference.weights.make_image(
        spec["batch"], spec["height"], spec["width"], seed=spec["seed"]
    )
    model = reference.build_reference(case).to(task.device)
    with torch.no_grad(), _autocast(task.device, dtype):
        features = model.backbone(torch.from_numpy(made).to(task.device), return_priors=True)
        arrays = {f"feat{i}": (features[f"res{i + 2}"], 16, 8) for i in range(4)}
        arrays["logits"] = (model.sem_seg_head.predict(features)["logits"], 32, 16)
    expected = reference.load_arrays(case, file)
    return _errors(case, dtype, arrays, expected, reference.weights)


def _mask_fixture(task: Task, case: str, dtype: str) -> Row:
    import reference_masks as masks

    file = f"eval_{masks.SIZES[-1]}.npz"
    backbone = masks.reference_backbone(case).to(task.device)
    decoder = masks.reference_pixel_decoder(case).to(task.device)
    with torch.no_grad(), _autocast(task.device, dtype):
        features = backbone(masks.reference_image(case, file).to(task.device), return_priors=True)
        mask_features, _ = decoder(features)
    arrays = {f"feat{i}": (features[f"res{i + 2}"], 16, 8) for i in range(4)}
    arrays["mask_features"] = (mask_features, 16, 8)
    return _errors(case, dtype, arrays, masks.load_arrays(case, file), masks.weights)


def _errors(
    case: str, dtype: str, arrays: dict[str, tuple[Tensor, int, int]], expected: Any, weights: Any
) -> Row:
    row: Row = {"case": case, "dtype": dtype}
    worst = 0.0
    for name, (array, channels, side) in arrays.items():
        got = weights.summarize(name, array.double().cpu().numpy(), channels, side)
        scale = float(expected[f"{name}.stats"][2])
        errors = [
            float(abs(value.astype("float64") - expected[key]).max()) / scale
            for key, value in got.items()
            if not key.endswith((".shape", ".stats"))
        ]
        row[name] = max(errors)
        worst = max(worst, *errors)
    return judged(row, worst, dtype)


def judged(row: Row, worst: float, dtype: str) -> Row:
    if not worst <= TOLERANCE[dtype]:  # also False for NaN
        row["failed"] = f"{worst:.2g} is more than {TOLERANCE[dtype]:g}"
    return row


def equality(task: Task) -> Iterator[Callable[[], Row]]:
    """Losses, gradients and scores of each fast form, and of all, against the plain model."""
    for title, model in MODELS.items():
        for dtype in dict.fromkeys(["float32", task.dtype]):
            case = replace(task.case(model, "training", 128, 2), dtype=dtype)
            for name, paths in variants_of(case).items():
                if name != "none":
                    yield partial(_equal, case, title, name, paths)


def _equal(case: Case, title: str, name: str, paths: str) -> Row:
    from semask.ops.apply import apply_fast_paths, select_fast_paths

    without_chance = ("MODEL.SWIN.DROP_PATH_RATE", "0.0", "MODEL.SEMASK.DROPOUT", "0.0")
    opts = (*case.opts, *without_chance, "MODEL.SEM_SEG_HEAD.DROPOUT", "0.0")
    case = replace(case, opts=(*opts, "MODEL.FAST_PATHS", paths))
    set_number_format(case)
    cfg = load_case_config(case)
    torch.manual_seed(0)
    plain = build(case, "plain", cfg)
    fast = apply_fast_paths(copy.deepcopy(plain), select_fast_paths(cfg))
    samples = inputs(case, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
    results = []
    for model in (plain, fast):
        torch.manual_seed(1)  # the points that Mask2Former compares masks at
        model.train()
        with autocast(case):
            losses = model(samples)
        total = torch.stack(list(losses.values())).sum()
        total.backward()
        squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
        model.eval()
        with torch.inference_mode(), autocast(case):
            scores = model(samples[:1])[0]["sem_seg"].double()
        results.append((total.detach().double(), torch.stack(squares).sum().sqrt(), scores))
    row: Row = {"case": title, "dtype": case.dtype, "fast path": name}
    errors = [
        float((want - got).abs().max() / want.abs().max())
        for want, got in zip(*results, strict=True)
    ]
    row |= dict(zip(("loss", "norm of the gradient", "scores"), errors, strict=True))
    return judged(row, max(errors), case.dtype)


def variants_of(case: Case) -> dict[str, str]:
    """Title and ``MODEL.FAST_PATHS`` for: none, each form suited to the device, all of them."""
    from semask.ops.apply import select_fast_paths

    names = sorted(select_fast_paths(load_case_config(case)))
    return {"none": "none", **{name: name for name in names}, "all": ",".join(names)}


def training(task: Task) -> Iterator[Callable[[], Row]]:
    """A step of each model, plain, with each fast form alone and with all, and compiled."""
    yield from _measured(task, "training", task.batch)


def inference(task: Task) -> Iterator[Callable[[], Row]]:
    """As ``training``, for one image and several."""
    yield from _measured(task, "inference", task.batch)
    for title, model in MODELS.items():
        for paths in ("none", "auto"):
            case = task.case(model, "inference", 512, 1)
            yield partial(_speed, case, title, paths, paths)


def _measured(task: Task, kind: str, batch: int) -> Iterator[Callable[[], Row]]:
    for title, model in MODELS.items():
        case = task.case(model, kind, 512, batch)
        variants = variants_of(case)
        # The two most important first.
        for name in dict.fromkeys(["none", "all", *variants]):
            yield partial(_speed, case, title, name, variants[name])
        yield partial(_speed, case, title, "all, compiled", variants["all"], compiled=True)


def large(task: Task) -> Iterator[Callable[[], Row]]:
    """SeMask-L at 640 x 640, plain and fast."""
    for kind, batch in (("training", max(1, task.batch // 4)), ("inference", 1)):
        for paths in ("auto", "none"):
            case = task.case(LARGE, kind, 640, batch)
            yield partial(_speed, case, "SeMask-L FPN", paths, paths)


def _speed(case: Case, title: str, name: str, paths: str, compiled: bool = False) -> Row:
    """Images per second and memory of a step, repeated for some seconds."""
    case = replace(case, opts=(*case.opts, "MODEL.FAST_PATHS", paths))
    set_number_format(case)
    cfg = load_case_config(case)
    torch.manual_seed(0)
    model = build(case, "fast", cfg).train(case.kind == "training")
    if compiled:
        torch._dynamo.reset()
        for part in model.children():
            part.compile(dynamic=False)
    step = _step(case, cfg, model, inputs(case, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES))
    started = time.monotonic()
    for _ in range(STEPS):
        step()
    _synchronize(case)
    warm = time.monotonic() - started
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    began = time.monotonic()
    while len(times) < 3 or time.monotonic() - began < min(MEASURED_SECONDS, 10 * warm):
        start = time.perf_counter()
        step()
        _synchronize(case)
        times.append(time.perf_counter() - start)
    median = sorted(times)[len(times) // 2]
    row: Row = {
        "case": f"{title}, {case.batch} x {case.height} x {case.width}",
        "kind": case.kind,
        "fast paths": name,
        "images/s": case.batch / median,
        "ms a step": 1000 * median,
        "fastest": 1000 * min(times),
        "slowest": 1000 * max(times),
        "start, s": warm,
    }
    if case.device == "cuda":
        row["GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def _step(case: Case, cfg: Any, model: nn.Module, samples: list[Row]) -> Callable[[], None]:
    from semask.solver import build_optimizer

    if case.kind == "inference":

        def predict() -> None:
            with torch.inference_mode(), autocast(case):
                model(samples)

        return predict
    optimizer = build_optimizer(cfg, model)
    scaler = torch.amp.GradScaler(case.device, enabled=case.dtype == "float16")

    def train() -> None:
        optimizer.zero_grad()
        with autocast(case):
            losses = model(samples)
        scaler.scale(torch.stack(list(losses.values())).sum()).backward()
        scaler.step(optimizer)
        scaler.update()

    return train


def camvid(task: Task) -> Iterator[Callable[[], Row]]:
    """SeMask-T FPN from scratch on CamVid at 360 x 480, until the time is up."""
    yield partial(_camvid, task)


def _camvid(task: Task) -> Row:
    data = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    if not (data / "camvid").is_dir():
        return {"case": "CamVid", "failed": f"{data}/camvid does not exist (DETECTRON2_DATASETS)"}
    output = ROOT / "output" / "gpu" / "camvid"
    steps = 4 if task.tiny else 20_000
    period = 4 if task.tiny else 500
    command = [sys.executable, str(ROOT / "train_net.py"), "--overwrite", "camvid/semask_camvid"]
    settings: dict[str, Any] = {
        "MODEL.DEVICE": task.device,
        "MODEL.SWIN.EMBED_DIM": 96,
        "INPUT.SCALE": "[480,360]",
        "INPUT.CROP.SIZE": "[360,480]",
        "SOLVER.IMS_PER_BATCH": task.batch,
        "SOLVER.AMP.ENABLED": task.dtype in HALF,
        "SOLVER.AMP.PRECISION": task.dtype if task.dtype in HALF else "bfloat16",
        "SOLVER.MAX_ITER": steps,
        "TEST.EVAL_PERIOD": period,
        "SOLVER.CHECKPOINT_PERIOD": period,
        "TEST.REPORT": False,
        "DATALOADER.NUM_WORKERS": 0 if task.tiny else min(12, os.cpu_count() or 1),
        "OUTPUT_DIR": output,
    }
    if task.tiny:
        settings |= dict(zip(TINY[::2], TINY[1::2], strict=True))
        settings |= {"MODEL.SEM_SEG_HEAD.NUM_CLASSES": 11, "SOLVER.IMS_PER_BATCH": 2}
        settings |= {"INPUT.SCALE": "[64,48]", "INPUT.CROP.SIZE": "[48,64]"}
    metrics = output / "metrics.json"
    metrics.unlink(missing_ok=True)  # of an earlier run
    process = subprocess.Popen([*command, *(str(w) for pair in settings.items() for w in pair)])
    try:
        process.wait(max(1.0, task.end - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # it writes a checkpoint
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(CAMVID_GRACE)
    finally:
        if process.poll() is None:  # otherwise it would occupy the GPU
            process.kill()
            process.wait()
    row: Row = {"case": "SeMask-T FPN, CamVid 360 x 480", "batch": settings["SOLVER.IMS_PER_BATCH"]}
    for line in metrics.read_text().splitlines() if metrics.is_file() else ():
        entry = json.loads(line)
        row |= {"steps": entry["iteration"] + 1} if "total_loss" in entry else {}
        row |= {name: value for name, value in entry.items() if name.endswith("mIoU")}
    if process.returncode not in (0, 128 + signal.SIGTERM):
        row["failed"] = f"status {process.returncode}"
    return row


def _autocast(device: str, dtype: str) -> Any:
    return torch.autocast(device, dtype=HALF.get(dtype), enabled=dtype in HALF)


def _synchronize(case: Case) -> None:
    if case.device == "cuda":
        torch.cuda.synchronize()


PARTS: dict[str, Callable[[Task], Iterator[Callable[[], Row]]]] = {
    "fixtures": fixtures,
    "equality": equality,
    "training": training,
    "inference": inference,
    "large": large,
    "camvid": camvid,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("file", type=Path)
    parser.add_argument("--device", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(argv)
    import_project()
    end = time.monotonic() + args.seconds
    task = Task(args.device, args.dtype, args.batch, args.tiny, end)
    with args.file.open("w", encoding="utf-8") as file:
        for row in PARTS[args.part](task):
            if time.monotonic() > end:
                print("the part's time is up", flush=True)
                break
            try:
                result = row()
            except Exception as error:  # the other rows continue
                reason = " ".join(str(error).split())
                result = {"case": args.part, "failed": f"{type(error).__name__}: {reason}"[:300]}
            file.write(json.dumps(result) + "\n")
            file.flush()
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
