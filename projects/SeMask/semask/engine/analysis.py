"""The cost of a model: parameters, arithmetic and activation memory of every module.

Most models are run on PyTorch's "meta" device, on which tensors have shapes but no values: the
largest ones then take seconds and no memory. This is impossible where values decide what is
computed: detectors, which select boxes by their scores, and the training step of mask
classification, which matches masks, are run on a real device.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from semask.errors import ConfigError, UserError
from semask.inference.model_outputs import predicts_scores
from semask.modeling.backbone import SemanticLayer
from semask.modeling.build import build_model
from semask.ops.apply import apply_fast_paths, select_fast_paths
from semask.ops.products import onednn_operations
from semask.tasks import Task, build_task
from semask.utils.text import one_line, table

WHOLE = "(whole model)"
# Faster forms with other matrix products than the definition; those of the definition are counted.
OTHER_PRODUCTS = {"winograd", "folded"}


@dataclass(frozen=True)
class ModuleCost:
    """The cost of one module, sub-modules included.

    Attributes:
        parameters: number of parameters, shared ones once.
        flops: operations of its matrix products, convolutions and deformable sampling in the
            inference of one image, two for each multiply-add. Normalisation, resizing and the
            like do not count.
        saved_bytes: memory that a training step's forward pass keeps for its backward pass, the
            parameters themselves left out.
    """

    parameters: int
    flops: int
    saved_bytes: int


@dataclass(frozen=True)
class ModelCost:
    """The cost of a model.

    Attributes:
        height, width: of the input, in pixels.
        batch_size: images of the training step.
        device: where the training step was run; "meta" = only shapes.
        modules: by dotted name, in the model's order; "" is the whole model.
        semantic_layers: names of SeMask's semantic layers among them.
        peak_bytes: the most memory that was allocated on the GPU at any time of a training step
            (parameters and gradients included, optimizer state not); None on other devices.
    """

    height: int
    width: int
    batch_size: int
    device: str
    modules: Mapping[str, ModuleCost]
    semantic_layers: tuple[str, ...]
    peak_bytes: int | None

    def sum_of(self, names: tuple[str, ...]) -> ModuleCost:
        """The sum over several modules, none inside another."""
        costs = [self.modules[name] for name in names]
        return ModuleCost(
            parameters=sum(cost.parameters for cost in costs),
            flops=sum(cost.flops for cost in costs),
            saved_bytes=sum(cost.saved_bytes for cost in costs),
        )

    def table(self, depth: int = 2) -> str:
        """The modules down to ``depth`` dots of their names, as text."""
        rows = [
            _row(name or WHOLE, cost)
            for name, cost in self.modules.items()
            if not name or (name.count(".") < depth and any(asdict(cost).values()))
        ]
        if self.semantic_layers:
            rows.append(_row("(all semantic layers)", self.sum_of(self.semantic_layers)))
        lines = [
            table(rows, ["module", "parameters", "GFLOP", "saved, MiB"]),
            "",
            f"GFLOP: inference of one image of {self.width}x{self.height} pixels; matrix products, "
            "convolutions and deformable sampling, two operations per multiply-add.",
            f"saved: what a training step on {self.batch_size} such image(s) keeps for the backward"
            f" pass in float32, on device '{self.device}'.",
        ]
        if self.device == "meta":
            lines.append(
                "On 'meta' nothing is computed: attention counts as if its weights were stored, "
                "which fused kernels avoid. Use --device cuda to measure."
            )
        if self.peak_bytes is not None:
            lines.append(f"Peak GPU memory of the step: {self.peak_bytes / 2**20:,.0f} MiB.")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Everything in plain types, for JSON."""
        return {**asdict(self), "modules": {k: asdict(v) for k, v in self.modules.items()}}


def analyze_model(
    cfg: CfgNode,
    size: tuple[int, int] | None = None,
    *,
    batch_size: int = 1,
    device: str | None = None,
) -> ModelCost:
    """Count the parameters, operations and saved activations of each module.

    Args:
        cfg: describes the model; it is not changed.
        size: height and width of the input in pixels; None = the training crop, or of a task
            without one its largest training image.
        batch_size: images of the training step.
        device: where the training step runs: "meta", or a real device such as "cuda", whose
            attention kernels decide what is kept. None = "meta"; "cpu" for detectors and mask
            classification, whose losses depend on values.

    Raises:
        ConfigError: the size, the batch or the device cannot be used.
    """
    task = build_task(cfg)
    height, width = size or task.training_size()
    if min(height, width, batch_size) < 1:
        raise ConfigError(
            f"An input of {batch_size} image(s) of {width}x{height} pixels cannot be analysed: "
            "each of the three must be at least 1."
        )
    if device == "meta" and not task.shapes_only:
        raise ConfigError(
            f"A model of TASK '{cfg.TASK}' cannot be analysed on device 'meta', which has only "
            "shapes: the boxes that it keeps depend on values. Leave the device out, or use "
            "another."
        )
    cfg = task.analysis_config()
    model = _build(cfg, "meta" if task.shapes_only else device or "cpu")
    head = getattr(model, "sem_seg_head", None)
    needs_values = getattr(head, "losses_need_values", False)
    if device == "meta" and needs_values:
        raise ConfigError(
            f"A training step of {cfg.MODEL.META_ARCHITECTURE} cannot be analysed on device "
            "'meta', which has only shapes: its losses depend on values. "
            "Leave the device out, or use another."
        )
    device = device or ("meta" if task.shapes_only and not needs_values else "cpu")
    flops = _flops(model, _inputs(model, task, (height, width), 1))
    if device != "meta" and task.shapes_only:
        model = _build(cfg, device)
    saved, peak_bytes = saved_bytes(model, _inputs(model, task, (height, width), batch_size))
    return ModelCost(
        height=height,
        width=width,
        batch_size=batch_size,
        device=device,
        modules={
            name: ModuleCost(
                parameters=sum(parameter.numel() for parameter in module.parameters()),
                flops=flops[name],
                saved_bytes=_inclusive(saved, name),
            )
            for name, module in model.named_modules()
        },
        semantic_layers=tuple(
            name for name, module in model.named_modules() if isinstance(module, SemanticLayer)
        ),
        peak_bytes=peak_bytes,
    )


def _inputs(
    model: nn.Module, task: Task, size: tuple[int, int], count: int
) -> list[dict[str, Any]]:
    with torch.device(_device_of(model)):
        return task.placeholder_inputs(size, count)


def _flops(model: nn.Module, inputs: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Operations of one inference, by module name; sub-modules included."""
    model.eval()
    images = [{key: entry[key] for key in ("image", "height", "width")} for entry in inputs]
    more = onednn_operations()
    # Not in detectors, which sample to paste masks into the image, after the network.
    if predicts_scores(model):
        more |= _deformable_operations()
    with (
        _frozen(model),  # otherwise the counter treats views of parameters as parts of the graph
        torch.no_grad(),
        FlopCounterMode(display=False, custom_mapping=more) as counter,
        _counted_modules(model, counter) as counted,
    ):
        model(images)
    flops: dict[str, int] = {}
    for name, module in reversed(list(model.named_modules())):
        # Containers such as nn.ModuleList have no forward pass: they cost what their members do.
        children = (f"{name}.{child}".lstrip(".") for child, _ in module.named_children())
        members = sum(flops.get(child, 0) for child in children)
        # A module without parameters only calls others, as the test protocol calls the backbone.
        own = counted.get(name, 0) if next(module.parameters(), None) is not None else 0
        flops[name] = max(own, members)
    return flops


@contextmanager
def _counted_modules(model: nn.Module, counter: FlopCounterMode) -> Iterator[dict[str, int]]:
    """Operations in the calls of each module, by its name in the model.

    The counter's own names differ where a module is called by a wrapper that is not a registered
    module, as the stages of timm's networks are.
    """
    counted: dict[str, int] = defaultdict(int)
    begun: list[int] = []

    def enter(module: nn.Module, args: Any) -> None:
        begun.append(counter.get_total_flops())

    def leave(name: str) -> Callable[..., None]:
        def add(module: nn.Module, args: Any, output: Any) -> None:
            counted[name] += counter.get_total_flops() - begun.pop()

        return add

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave(name)))
    try:
        yield counted
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learnt:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learnt:
            parameter.requires_grad_(True)


def _deformable_operations() -> dict[Any, Callable[..., int]]:
    """Operations that PyTorch's counter lacks: bilinear interpolation is four multiply-adds."""

    def grid_sampler(*_inputs: Any, out_shape: Sequence[int], **_options: Any) -> int:
        return 8 * math.prod(out_shape)

    def deform_conv2d(
        image: Sequence[int],
        weight: Sequence[int],
        *_inputs: Any,
        out_shape: Sequence[int],
        **_: Any,
    ) -> int:
        places = out_shape[0] * math.prod(out_shape[2:])
        sampled = image[1] * math.prod(weight[2:])
        return places * (8 * sampled + 2 * out_shape[1] * math.prod(weight[1:]))

    return {
        torch.ops.aten.grid_sampler_2d: grid_sampler,
        torch.ops.torchvision.deform_conv2d: deform_conv2d,
    }


@contextmanager
def _running_modules(model: nn.Module) -> Iterator[list[str]]:
    """The names of the modules whose ``forward`` is running, the innermost last.

    PyTorch's ModuleTracker would do, but it fails where a module runs inside an autograd function,
    as the recomputed forms do.
    """
    running = [""]

    def enter(name: str) -> Callable[..., None]:
        return lambda module, args: running.append(name)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name)))
        handles.append(module.register_forward_hook(leave))
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


def saved_bytes(
    model: nn.Module, inputs: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, int], int | None]:
    """The memory that a training step's forward pass keeps for its backward pass.

    Args:
        model: returns a dictionary of losses; it is put into training mode.
        inputs: of the step.

    Returns:
        Bytes by the name of the module that keeps them first, and the most memory that was
        allocated on the GPU (None on other devices).
    """
    model.train()
    device = _device_of(model)
    saved: dict[str, int] = defaultdict(int)
    # Several saved tensors may be views of one storage, which is counted once. The storages are
    # kept alive here, so that none is freed and its address reused by another one.
    pieces = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage()
        for tensor in [*model.parameters(), *model.buffers()]
    }

    def pack(tensor: Tensor) -> Tensor:
        piece = tensor.untyped_storage()
        if piece._cdata not in pieces:
            pieces[piece._cdata] = piece
            saved[running[-1]] += piece.nbytes()
        return tensor

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with (
        EventStorage(),  # detectors write to it
        _running_modules(model) as running,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
    ):
        losses = model(inputs)
    if device.type != "cuda":
        return saved, None
    pieces.clear()
    sum(losses.values()).backward()
    return saved, torch.cuda.max_memory_allocated(device)


def _build(cfg: CfgNode, device: str) -> nn.Module:
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = device
    cfg.TEST.PROTOCOL = "whole"
    if not device.startswith("cuda") and cfg.MODEL.SEM_SEG_HEAD.NORM == "SyncBN":
        cfg.MODEL.SEM_SEG_HEAD.NORM = "BN"  # of the same cost; SyncBN trains on GPUs only
    try:
        with torch.device(device):
            return apply_fast_paths(build_model(cfg), select_fast_paths(cfg) - OTHER_PRODUCTS)
    except UserError:
        raise
    except (RuntimeError, AssertionError) as error:  # there is no such device, or it is full
        reason = one_line(error).strip("'\"").rstrip(".")
        raise ConfigError(f"The model cannot be built on '{device}': {reason}.") from error


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _inclusive(own: Mapping[str, int], name: str) -> int:
    """The sum over a module and its sub-modules."""
    if not name:
        return sum(own.values())
    return sum(value for key, value in own.items() if key == name or key.startswith(f"{name}."))


def _row(name: str, cost: ModuleCost) -> tuple[str, str, str, str]:
    return (
        name,
        f"{cost.parameters:,}",
        f"{cost.flops / 1e9:,.2f}",
        f"{cost.saved_bytes / 2**20:,.1f}",
    )
