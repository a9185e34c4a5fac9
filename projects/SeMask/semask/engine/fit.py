"""The memory of a training, and settings with which it fits into a device."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from detectron2.config import CfgNode
from tabulate import tabulate

from semask.config import merge_overrides
from semask.engine.launch.ending import is_out_of_memory
from semask.engine.memory import StepMemory, evaluation_memory, training_memory
from semask.errors import ConfigError, OutOfMemoryError
from semask.tasks import build_task
from semask.utils.host_memory import host_memory
from semask.utils.text import one_line

logger = logging.getLogger(__name__)

GIB = 2**30
# Bytes that a process needs in addition to PyTorch's tensors: the context and libraries of a GPU,
# or the program itself on the CPU; temporary memory inside kernels; and gaps in the allocator.
RESERVE = {"cuda": 1 * GIB, "cpu": int(1.5 * GIB)}
# Sections of MODEL that have the key ACTIVATION_CHECKPOINT.
_ENCODERS = ("TIMM", "SWIN")


@dataclass(frozen=True)
class Plan:
    """Settings with which one device can process its share of the config's batch.

    Attributes:
        option: what it changes, for people.
        images: in each part of a step.
        accumulate: number of parts of a step, ``SOLVER.ACCUMULATE_STEPS``.
        memory: of a training step.
        pairs: the changes, each as KEY=VALUE.
    """

    option: str
    images: int
    accumulate: int
    memory: StepMemory
    pairs: tuple[str, ...]


class Fit:
    """Whether and with which settings a config's training fits into the memory of its devices."""

    def __init__(self, cfg: CfgNode, limit: int, *, devices: int = 1) -> None:
        """
        Args:
            cfg: the config; it is not changed. The faster forms are those of its ``MODEL.DEVICE``.
            limit: total memory of one device, in bytes.
            devices: number of devices that share ``SOLVER.IMS_PER_BATCH``.

        Raises:
            ConfigError: ``SOLVER.IMS_PER_BATCH`` is no multiple of the number of devices.
        """
        self.cfg = cfg
        self.limit = limit
        self.devices = devices
        #: bytes for PyTorch's tensors
        self.usable = limit - RESERVE.get(torch.device(cfg.MODEL.DEVICE).type, 0)
        parts = devices * cfg.SOLVER.ACCUMULATE_STEPS
        if cfg.SOLVER.IMS_PER_BATCH % devices or devices > cfg.SOLVER.IMS_PER_BATCH:
            raise ConfigError(
                f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} cannot be shared by {devices} "
                "devices: it must be a multiple of their number."
            )
        self.images = cfg.SOLVER.IMS_PER_BATCH // devices
        self.part = max(1, cfg.SOLVER.IMS_PER_BATCH // parts)
        self._known: dict[tuple[tuple[str, ...], int], StepMemory] = {}

    @cached_property
    def options(self) -> list[tuple[str, tuple[str, ...]]]:
        """Name and KEY=VALUE pairs of each way to need less memory, the least costly first."""
        precision: tuple[str, ...] = ()
        checkpoint: tuple[str, ...] = ()
        if not self.cfg.SOLVER.AMP.ENABLED:
            precision = ("SOLVER.AMP.ENABLED=True",)
        name = self.cfg.MODEL.BACKBONE.NAME.upper()
        for section in _ENCODERS:
            stages = self.cfg.MODEL[section].ACTIVATION_CHECKPOINT
            if section in name and not all(stages):
                every = ",".join(["True"] * len(stages))
                checkpoint = (f"MODEL.{section}.ACTIVATION_CHECKPOINT=[{every}]",)
                break
        both = "mixed precision and activation checkpointing"
        options = [
            ("as configured", ()),
            ("mixed precision", precision),
            ("activation checkpointing", checkpoint),
            (both, precision + checkpoint if precision and checkpoint else ()),
        ]
        return [(name, pairs) for name, pairs in options if pairs or name == "as configured"]

    def memory(self, pairs: Sequence[str], images: int) -> StepMemory:
        """The memory of a part of a training step, with changes of the config."""
        key = (tuple(pairs), images)
        if key not in self._known:
            cfg = self.cfg.clone()
            cfg.defrost()
            merge_overrides(cfg, pairs)
            self._known[key] = training_memory(cfg, images, several_devices=self.devices > 1)
        return self._known[key]

    def plans(self) -> list[Plan]:
        """For each option, the fewest parts of a step of which each fits into the memory.

        Options with which not even one image fits are left out.
        """
        found = []
        for option, pairs in self.options:
            accumulate = self.cfg.SOLVER.ACCUMULATE_STEPS
            while accumulate <= self.images:
                images = self.images // accumulate
                # `memory` runs the model, so it is called only where the cheap `_estimate` fits.
                if self.images % accumulate == 0 and self._estimate(pairs, images) <= self.usable:
                    memory = self.memory(pairs, images)
                    if memory.peak <= self.usable:
                        if accumulate != self.cfg.SOLVER.ACCUMULATE_STEPS:
                            pairs = (*pairs, f"SOLVER.ACCUMULATE_STEPS={accumulate}")
                        found.append(Plan(option, images, accumulate, memory, pairs))
                        break
                accumulate += 1
        return found

    def _estimate(self, pairs: Sequence[str], images: int) -> float:
        """Bytes at the peak, by a line through those of one image and of the config's part."""
        first, last = self.memory(pairs, 1).peak, self.memory(pairs, self.part).peak
        return first + (last - first) * (images - 1) / max(1, self.part - 1)

    def table(self) -> str:
        """The peak of a training step for each option and number of images, as text."""
        counts = [1]
        while counts[-1] < self.part:
            counts.append(min(2 * counts[-1], self.part))
        rows = [
            [option, *(self._shown(self._estimate(pairs, count)) for count in counts)]
            for option, pairs in self.options
        ]
        headers = ["training step, peak in GiB", *(_images(count) for count in counts)]
        return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True)

    def parts(self) -> str:
        """What the peak of the unchanged config consists of, as text."""
        memory = self.memory((), self.part)
        height, width = build_task(self.cfg).training_size()
        return (
            f"{_images(self.part)} of {width}x{height} pixels, as configured: "
            f"{memory.weights / GIB:.2f} GiB weights, {memory.optimizer / GIB:.2f} optimizer, "
            f"{memory.activations / GIB:.2f} activations, {memory.transient / GIB:.2f} gradients "
            f"and temporaries; {memory.peak / GIB:.2f} in total."
        )

    def advice(self) -> str:
        """A line for each plan, with its overrides; or a sentence that nothing fits."""
        usable = f"{self.usable / GIB:.1f} of {self.limit / GIB:.1f} GiB"
        plans = self.plans()
        if not plans:
            return (
                f"Not even one image fits into the {usable} available to tensors: use a smaller "
                "model or smaller images (INPUT)."
            )
        step = f"{_images(self.images)} a step"
        if not plans[0].pairs:
            return f"The config fits unchanged into the {usable} available to tensors ({step})."
        ways = (f"    {' '.join(p.pairs)}  ({p.memory.peak / GIB:.2f} GiB)" for p in plans)
        return "\n".join([f"{step} fit into the {usable} available to tensors with:", *ways])

    def _shown(self, peak: float) -> str:
        return f"{peak / GIB:.2f}" + ("" if peak <= self.usable else " (too much)")


def evaluation_text(cfg: CfgNode, size: tuple[int, int] | None = None) -> str:
    """A sentence with the peak memory of an evaluation.

    Args:
        cfg: the config.
        size: height and width of the image in pixels; None = the height of a training image and
            a third more.
    """
    side = build_task(cfg).training_size()[0]
    height, width = size or (side, side * 4 // 3)
    memory = evaluation_memory(cfg, (height, width))
    return (
        f"Evaluation of an image of {width}x{height} pixels (TEST.PROTOCOL {cfg.TEST.PROTOCOL}): "
        f"{memory.peak / GIB:.2f} GiB, {memory.weights / GIB:.2f} of them weights."
    )


def device_memory(device: str) -> int:
    """Bytes of the GPU that ``device`` names, or of this machine or container."""
    if torch.device(device).type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.device(device)).total_memory
    return host_memory()


def log_expected_memory(cfg: CfgNode, devices: int) -> None:
    """Log the memory that a training step will need, and warn if the device has less.

    Nothing is logged for models such as detectors, whose estimate is a real training step.
    """
    if not build_task(cfg).shapes_only:
        return
    try:
        fit = Fit(cfg, device_memory(cfg.MODEL.DEVICE), devices=devices)
        memory = fit.memory((), fit.part)
    except Exception as error:  # of a user's own model: the training can do without the estimate
        logger.info("The memory of a training step is unknown: %s", one_line(error))
        return
    logger.info(
        "Memory of a training step: %.2f GiB of tensors; %s has %.1f GiB",
        memory.peak / GIB,
        cfg.MODEL.DEVICE,
        fit.limit / GIB,
    )
    if memory.peak > fit.usable:
        logger.warning("That may be too much; 'semask fit' lists settings that fit.")


@contextlib.contextmanager
def explained_out_of_memory(
    cfg: CfgNode, devices: int, *, eval_only: bool = False
) -> Iterator[None]:
    """A context that adds settings that would fit to an out-of-memory error of the device.

    The message for an error of the machine's own memory has the error's notes, for instance on the
    image that was being read.

    Args:
        cfg: of the run.
        devices: of the run.
        eval_only: nothing is trained.

    Raises:
        OutOfMemoryError: replaces PyTorch's and Python's.
    """
    try:
        yield
        return
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        message = _without_traceback(error)
        of_device = _is_of_device(error, cfg.MODEL.DEVICE)
        notes = getattr(error, "__notes__", ())
    if not of_device:
        keys = ["DATALOADER.NUM_WORKERS", *([] if eval_only else ["SOLVER.IMS_PER_BATCH"])]
        lines = [f"The memory of this machine is not enough: lower {' or '.join(keys)}.", *notes]
        raise OutOfMemoryError(f"{' '.join(lines)}\n({message})")
    # After the handler, whose exception holds the tensors of the step.
    advice = _advice(cfg, devices, eval_only=eval_only)
    raise OutOfMemoryError(f"The memory of {cfg.MODEL.DEVICE} is not enough. {advice}\n({message})")


def _without_traceback(error: Exception) -> str:
    """The message in one line, without the traceback that a data loading process puts before it."""
    lines = str(error).splitlines()
    if any(line.startswith("Original Traceback") for line in lines):
        while any(line.startswith((" ", "Original Traceback")) for line in lines):
            del lines[0]
        return " ".join(lines)
    return one_line(error)


def _is_of_device(error: Exception, device: str) -> bool:
    """Whether an out-of-memory error is of the model's device, not of data in the main memory."""
    if isinstance(error, MemoryError):  # of Python and NumPy
        return False
    return isinstance(error, torch.OutOfMemoryError) or torch.device(device).type == "cpu"


def _advice(cfg: CfgNode, devices: int, *, eval_only: bool) -> str:
    if eval_only:
        return "TEST.PROTOCOL=slide and TEST.AMP.ENABLED=True need less."
    if not build_task(cfg).shapes_only:  # the estimate would be a real training step
        return "'semask fit' says what fits."
    try:
        fit = Fit(cfg, device_memory(cfg.MODEL.DEVICE), devices=devices)
        # The step did not fit, so less memory than its peak was available: other processes may
        # use the device, too.
        fit.usable = min(fit.usable, fit.memory((), fit.part).peak - 1)
        return fit.advice()
    except Exception as error:  # of a model of the user's
        logger.info("The memory of a training step is unknown: %s", one_line(error))
        return "SOLVER.ACCUMULATE_STEPS and SOLVER.AMP.ENABLED=True reduce what a step needs."


def _images(count: int) -> str:
    return f"{count} image" + ("s" if count > 1 else "")
