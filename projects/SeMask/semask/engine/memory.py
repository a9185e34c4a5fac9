"""Estimates the memory of a training step and an evaluation, without running them.

The model is run on tensors with shapes but no values (PyTorch's fake tensors), while each
allocation and release of memory is recorded. That takes seconds and no memory, for any batch.
Detectors depend on values and are run for real, on the CPU.

Temporary memory inside kernels, gaps of the allocator and the context of a GPU are not included.
``benchmarks/memory.py`` compares the estimate with measurements.
"""

import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from semask.inference.model_outputs import predict
from semask.modeling.build import build_model
from semask.modeling.losses.mask_losses import MaskCriterion
from semask.modeling.losses.matcher import MaskTarget, Match
from semask.modeling.mask_decoder.base import MaskPrediction
from semask.ops.apply import apply_fast_paths, select_fast_paths
from semask.solver import build_optimizer
from semask.tasks import build_task
from semask.utils.precision import Precision, evaluation_autocast

# Faster forms that compute with the values of tensors. They are left out, so the estimate is an
# upper bound for the models that use them.
NEED_VALUES = {"bagged", "factored"}


@dataclass(frozen=True)
class StepMemory:
    """Bytes at the peak of a step, by part.

    Attributes:
        weights: parameters and buffers.
        optimizer: what the optimizer keeps for each parameter; 0 in an evaluation.
        activations: what the forward pass keeps for the backward pass; 0 in an evaluation.
        transient: the rest of the peak: gradients, temporary results, the batch itself.
    """

    weights: int
    optimizer: int
    activations: int
    transient: int

    @property
    def peak(self) -> int:
        """All parts together."""
        return self.weights + self.optimizer + self.activations + self.transient


class LiveMemory(TorchDispatchMode):
    """A context that counts the memory of living tensors.

    Attributes:
        now: bytes at this moment.
        peak: the most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._pieces: dict[int, weakref.ref[Any]] = {}

    def note(self, tensors: Any) -> None:
        """Count the memory of existing tensors, also inside lists and dictionaries."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                self._note(tensor)

    def _note(self, tensor: Tensor) -> None:
        piece = tensor.untyped_storage()  # views share it
        key, size = piece._cdata, piece.nbytes()
        if key in self._pieces:
            return

        def freed(_: Any) -> None:
            del self._pieces[key]
            self.now -= size

        self._pieces[key] = weakref.ref(piece, freed)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.note(result)
        return result


class FirstQueries(nn.Module):
    """Replaces a matcher, which needs values; which pairs match does not change the memory."""

    def forward(self, prediction: MaskPrediction, targets: Sequence[MaskTarget]) -> list[Match]:
        """The first target with the first query, and so on; see :class:`MaskMatcher`."""
        matches = []
        for target in targets:
            pairs = torch.arange(min(len(target.labels), prediction.logits.shape[1]))
            matches.append(Match(pairs, pairs, True))
        return matches


def training_memory(
    cfg: CfgNode,
    images: int,
    size: tuple[int, int] | None = None,
    *,
    several_devices: bool = False,
) -> StepMemory:
    """The memory of one part of a training step on one device.

    Args:
        cfg: the config; it is not changed. The faster forms are those of its ``MODEL.DEVICE``.
        images: of the part: ``IMS_PER_BATCH`` / (devices x ``ACCUMULATE_STEPS``).
        size: height and width in pixels; None = the training crop, or of a task without one its
            largest training image.
        several_devices: the gradients are summed over devices, in memory that is held throughout.

    Raises:
        ConfigError: the model cannot be built from the config.
    """
    cfg, model, fake = _build(cfg)
    task = build_task(cfg)
    inputs = task.placeholder_inputs(size or task.training_size(), images)
    for sample in inputs:
        _fake(sample, fake)
    optimizer = build_optimizer(cfg, model)
    with torch.random.fork_rng(devices=[]), LiveMemory() as live:
        live.note([*model.parameters(), *model.buffers()])
        weights = live.now
        live.note(inputs)
        with EventStorage(), Precision.from_config(cfg).autocast():  # detectors write to a storage
            if several_devices:
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.grad = torch.zeros_like(parameter)
            before = live.now
            losses = model.train()(inputs)
        activations = live.now - before
        sum(losses.values()).backward()
        of_passes, held = live.peak, live.now
        live.peak = 0
        optimizer.step()
        state = live.now - held
    transient = max(of_passes + state, live.peak) - weights - state - activations
    if cfg.SOLVER.EMA.ENABLED:
        weights *= 2  # the averaged weights
    return StepMemory(weights, state, activations, transient)


def evaluation_memory(cfg: CfgNode, size: tuple[int, int]) -> StepMemory:
    """The memory of the evaluation of one image by ``TEST.PROTOCOL``, up to its labels.

    Args:
        cfg: see :func:`training_memory`.
        size: height and width of the image in pixels, before it is resized for the network.

    Raises:
        ConfigError: the model cannot be built from the config.
    """
    cfg, model, fake = _build(cfg)
    channels = len(cfg.MODEL.PIXEL_MEAN)
    inputs = (
        build_task(cfg)
        .build_mapper(is_train=False)
        .transform(np.zeros((*size, channels), np.uint8))
    )
    _fake(inputs, fake)
    with LiveMemory() as live, torch.no_grad(), evaluation_autocast(cfg):
        live.note([*model.parameters(), *model.buffers()])
        weights = live.now
        output = predict(model.eval(), inputs, priors=False)
        if "sem_seg" in output:
            output["sem_seg"].labels()
    return StepMemory(weights, 0, 0, live.peak - weights)


def _build(cfg: CfgNode) -> tuple[CfgNode, nn.Module, FakeTensorMode | None]:
    """Config and model on the CPU, with the faster forms of the config's device.

    Returns:
        The config, the model, and the mode of its fake tensors; None = they are real.
    """
    names = select_fast_paths(cfg) - NEED_VALUES
    task = build_task(cfg)
    cfg = task.analysis_config()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.TIMM.PRETRAINED = False  # the estimate needs no values
    cfg.SOLVER.AMP.PRECISION = cfg.TEST.AMP.PRECISION = "bfloat16"  # float16 is of the same size
    if cfg.MODEL.SEM_SEG_HEAD.NORM == "SyncBN":
        cfg.MODEL.SEM_SEG_HEAD.NORM = "BN"  # of the same size; SyncBN trains on GPUs only
    if not task.shapes_only:
        return cfg, apply_fast_paths(build_model(cfg), names), None
    on_meta = cfg.clone()
    on_meta.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = apply_fast_paths(build_model(on_meta), names)
    for module in model.modules():
        if isinstance(module, MaskCriterion):
            module.add_module("matcher", FirstQueries())
    # Faster forms look at the addresses of tensors, which these do not have.
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        return cfg, model.to_empty(device="cpu"), fake


def _fake(inputs: dict[str, Any], fake: FakeTensorMode | None) -> None:
    """Replace the images by ones without values; labels keep theirs, which the losses need."""
    if fake is not None:
        inputs["image"] = fake.from_tensor(inputs["image"])
        if "images" in inputs:  # of multi-scale evaluation
            inputs["images"] = [fake.from_tensor(image) for image in inputs["images"]]
