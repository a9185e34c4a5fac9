"""The two sides of a case: the project's model and the plain one, called as by a user."""

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import SIDES, Case
from benchmarks.peers import prepare_peer

ROOT = Path(__file__).resolve().parents[1]
UNIT_SIDE = 2048
UNIT_OPERATIONS = 2 * UNIT_SIDE**3
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}

Step = Callable[[], None]


def import_project() -> None:
    """Make ``semask`` and the plain data pipeline importable from any current folder."""
    for folder in (ROOT / "tests" / "helpers", ROOT / "projects" / "SeMask"):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    import semask  # noqa: F401  (before Detectron2)


def set_number_format(case: Case) -> None:
    """Disable TensorFloat32 unless requested."""
    torch.backends.cuda.matmul.allow_tf32 = case.dtype == "tf32"
    torch.backends.cudnn.allow_tf32 = case.dtype == "tf32"
    torch.backends.cudnn.benchmark = True


def autocast(case: Case) -> contextlib.AbstractContextManager[Any]:
    """The autocast context of a forward pass."""
    if case.dtype not in HALF:
        return contextlib.nullcontext()
    return torch.autocast(case.device, dtype=HALF[case.dtype])


def load_case_config(case: Case) -> Any:
    """Load the config of the case's model."""
    from semask import config_path, load_config

    opts = ["MODEL.DEVICE", case.device]
    if case.classes:
        opts += ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", str(case.classes)]
    cfg = load_config(config_path(case.config), [*opts, *case.opts])
    if cfg.MODEL.SEM_SEG_HEAD.NORM == "SyncBN":  # SyncBN equals BatchNorm on one device
        cfg.MODEL.SEM_SEG_HEAD.NORM = "BN"
    return cfg


def build(case: Case, side: str, cfg: Any) -> nn.Module:
    """Build the model of one side as in a run; "plain" is ``MODEL.FAST_PATHS`` "none"."""
    from detectron2.modeling import build_model

    from semask.ops.apply import apply_fast_paths, select_fast_paths
    from semask.ops.malloc import keep_freed_memory

    if side == "plain":
        cfg = cfg.clone()
        cfg.MODEL.FAST_PATHS = "none"
    names = select_fast_paths(cfg)
    if "kept_memory" in names:
        keep_freed_memory()
    return apply_fast_paths(build_model(cfg), names)


def inputs(case: Case, classes: int) -> list[dict[str, Any]]:
    """Images as from a data loader, with labels in blocks, a tenth of them ignored."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(case.batch):
        shape = (3, case.height, case.width)
        image = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        side = case.label_side
        rows, columns = -(-case.height // side), -(-case.width // side)
        label = torch.randint(0, min(classes, 255), (rows, columns), generator=generator)
        label = label.repeat_interleave(side, 0).repeat_interleave(side, 1)
        label = label[: case.height, : case.width].clone()
        label[: case.height // 10] = 255
        samples.append(
            {"image": image, "sem_seg": label, "height": case.height, "width": case.width}
        )
    return samples


def prepare(case: Case, side: str) -> Step:
    """Build the model of a side; returns a function that runs it once.

    Args:
        case: what to run.
        side: one of the case's.
    """
    import_project()
    set_number_format(case)
    cfg = load_case_config(case)
    torch.manual_seed(0)
    classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    samples = inputs(case, classes)
    if side not in SIDES:
        return prepare_peer(side, case.kind, samples, classes)
    model = build(case, side, cfg)
    if case.kind == "inference":
        return _inference(case, model.eval(), samples)
    if case.kind == "labels":
        return _labels(case, side, model.eval(), samples)
    return _training(case, side, cfg, model.train(), samples)


def _inference(case: Case, model: nn.Module, samples: list[dict[str, Any]]) -> Step:
    def step() -> None:
        with torch.inference_mode(), autocast(case):
            model(samples)

    return step


def _labels(case: Case, side: str, model: Any, samples: list[dict[str, Any]]) -> Step:
    def step() -> None:
        with torch.inference_mode(), autocast(case):
            if side == "fast":
                for sample in samples:
                    model.predict(sample)["sem_seg"].labels()
            else:
                for output in model(samples):
                    output["sem_seg"].argmax(dim=0)

    return step


def _training(
    case: Case, side: str, cfg: Any, model: nn.Module, samples: list[dict[str, Any]]
) -> Step:
    if side == "fast":
        from semask.solver import build_optimizer

        optimizer = build_optimizer(cfg, model)
    else:
        solver = cfg.SOLVER
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY
        )
    scaler = torch.amp.GradScaler(case.device, enabled=case.dtype == "float16")

    def step() -> None:
        optimizer.zero_grad()
        with autocast(case):
            losses = model(samples)
        scaler.scale(sum(losses.values())).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def prepare_unit(case: Case) -> Step:
    """The product of two 2048 x 2048 matrices, in the case's number format."""
    set_number_format(case)
    dtype = HALF.get(case.dtype, torch.float32)
    generator = torch.Generator().manual_seed(0)
    shape = (UNIT_SIDE, UNIT_SIDE)
    left, right = (torch.randn(shape, generator=generator).to(case.device, dtype) for _ in range(2))
    result: Tensor = torch.empty_like(left)

    def step() -> None:
        torch.mm(left, right, out=result)

    return step


def seconds_of(step: Step, device: str, times: int = 1) -> float:
    """The time of one run, as the mean of ``times`` in a row; synchronises the device before and
    after.
    """
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


def operations(case: Case) -> int:
    """Operations in the plain model's matrix products and convolutions, two per multiply-add.

    A training step counts as three forward passes: the backward pass has two products for each.
    """
    import_project()
    cfg = load_case_config(case).clone()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model: Any = build(case, "plain", cfg).eval().requires_grad_(False)
        image = torch.zeros(1, 3, case.height, case.width)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.sem_seg_head.predict(model.backbone(image))
    passes = 3 if case.kind == "training" else 1
    return counter.get_total_flops() * case.batch * passes
