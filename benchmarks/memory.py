#!/usr/bin/env python3
"""Compare `semask fit`'s estimate for a training step with the memory of a real one.

    python benchmarks/memory.py
    python benchmarks/memory.py ade20k/semask_swin_small_fpn --images 4 MODEL.FAST_PATHS=none

Prints a line for each config, for a step on the CPU: the estimate, the peak reported by PyTorch's
allocator, and the growth of the process, which includes the kernels' own memory and fragmentation.
A step takes about twice as long as under the profiler.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Sequence

# isort: split
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch.profiler import ProfilerActivity, profile

from semask.config import load_config
from semask.engine import Trainer
from semask.engine.memory import training_memory
from semask.tasks import build_task
from semask.utils.precision import Precision

CONFIGS = (
    "ade20k/semask_swin_tiny_fpn",
    "ade20k/swin_tiny_fpn",
    "ade20k/semask_swin_tiny_mask2former",
)
GIB = 2**30


def measured(cfg: CfgNode, images: int) -> tuple[int, int]:
    """Peak memory of a real training step, in bytes.

    Args:
        cfg: of a model on the CPU.
        images: number of images of the step.

    Returns:
        The allocator's peak, and the growth of the process since before the model was built.
    """
    before = _status("VmRSS")
    model = Trainer.build_model(cfg).train()
    optimizer = Trainer.build_optimizer(cfg, model)
    task = build_task(cfg)
    inputs = task.placeholder_inputs(task.training_size(), images)

    def step() -> None:
        optimizer.zero_grad()
        with EventStorage(), Precision.from_config(cfg).autocast():
            losses = model(inputs)
        sum(losses.values()).backward()
        optimizer.step()

    step()  # creates the optimizer's state
    grown = _status("VmHWM") - before
    optimizer.zero_grad()
    state = [value for values in optimizer.state.values() for value in values.values()]
    held = [*model.parameters(), *model.buffers(), *state, *(s["image"] for s in inputs)]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak + sum(tensor.nbytes for tensor in held), grown


def _status(name: str) -> int:
    """A value in bytes from the kernel's status of this process."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def compare(name: str, images: int, overrides: Sequence[str]) -> list[str]:
    """Measure the row of a config."""
    cfg = load_config(name, ["MODEL.DEVICE=cpu", "SOLVER.AMP.ENABLED=False", *overrides])
    allocated, grown = measured(cfg, images)
    expected = training_memory(cfg, images).peak
    sizes = (f"{size / GIB:.2f}" for size in (expected, allocated, grown))
    return [name, *sizes, f"{100 * (expected / allocated - 1):+.1f} %"]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="*", metavar="CONFIG or KEY=VALUE")
    parser.add_argument("--images", type=int, default=2)
    args = parser.parse_intermixed_args(argv)
    overrides = [token for token in args.configs if "=" in token]
    names = [token for token in args.configs if "=" not in token] or list(CONFIGS)
    jobs = [(name, args.images, overrides) for name in names]
    # One process each, as a process's peak is that of its largest step.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        rows = pool.starmap(compare, jobs, chunksize=1)
    headers = ["model", "expected, GiB", "allocated", "process grew by", "expected / allocated"]
    print(tabulate(rows, headers, tablefmt="pipe", disable_numparse=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
